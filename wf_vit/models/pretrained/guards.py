"""What a file of a stranger may be, claim and hold, before anything is made of it.

Nothing here trusts a size that a file declares: it is compared with the bytes that are
there. So a small file can neither take much memory nor much time.
"""

import contextlib
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from wf_vit.errors import UsageError

# The largest published configs name 21,000 classes, twice, in 2 MB.
MOST_TEXT = 16 * 2**20
# A file with optimizer states and several networks has some thousands.
MOST_ARRAYS = 50_000
MOST_LETTERS = 1000
# Weights hardly compress; what is small may inflate as it likes.
_MOST_INFLATION, _HARMLESS = 32, 64 * 2**20

FLOATS = tuple(
    np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
)
# Of the exponents of floats of 16 bits: all of them are set in NaN and infinity.
_EXPONENTS = {FLOATS[1]: 0x7C00, FLOATS[2]: 0x7F80}
_CHUNK = 2**18
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@contextlib.contextmanager
def explained(path: Path | str, advice: str) -> Iterator[None]:
    """Turns what goes wrong with a file into a usage error that names it.

    Args:
      path: the file, or what stands for it in messages.
      advice: what to do, a sentence.
    """
    try:
        yield
    except UsageError as error:
        if not isinstance(path, Path) or str(path) in str(error):
            raise
        raise UsageError(f"{path}: {error}") from error
    except Exception as error:  # NumPy, zipfile, json, Orbax: each has its own.
        reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        raise UsageError(f"{path} cannot be read: {reason}. {advice}") from error


def regular_file(path: Path) -> int:
    """Returns the size of a file in bytes; links are followed.

    Raises:
      UsageError: it is something else, which might never end or never answer.
    """
    status = path.stat()
    for holds, kind in _KINDS:
        if holds(status.st_mode):
            raise UsageError(
                f"{path} is {kind}, expected a file: give the file itself."
            )
    return status.st_size


def regular_files(folder: Path) -> int:
    """Returns the size of all files of a folder in bytes; see ``regular_file``."""
    return sum(regular_file(path) for path in folder.rglob("*") if not path.is_dir())


def within(file: Path, folder: Path) -> bool:
    """Whether a file lies in a folder, wherever links lead.

    The cache of Hugging Face's hub counts: its files are links to ``blobs``.
    """
    real, home = file.resolve(), folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    return any(real.is_relative_to(home) for home in homes)


def read_text(path: Path) -> str:
    """Returns the text of a file of bounded size."""
    size = regular_file(path)
    with path.open("rb") as file:
        content = file.read(MOST_TEXT + 1)
    if len(content) > MOST_TEXT:
        raise UsageError(
            f"{path} has {size:,} bytes, expected at most {MOST_TEXT:,}: it is no "
            "config of a model. Take it away, or download it again."
        )
    return content.decode("utf-8")


def check_names(names: Iterable[Any], path: Path | str) -> None:
    """Raises UsageError if there are too many names, or some that are none."""
    names = list(names)
    if len(names) > MOST_ARRAYS:
        raise UsageError(
            f"{path} has {len(names):,} entries, expected at most {MOST_ARRAYS:,}, "
            "which is more than any vision transformer: save its parameters alone."
        )
    for name in names:
        if not isinstance(name, str) or len(name) > MOST_LETTERS:
            raise UsageError(
                f"{path} has an entry of the name {repr(name)[:60]}, expected texts of "
                f"at most {MOST_LETTERS} letters: save model.state_dict()."
            )


def class_names(value: Any) -> tuple[str, ...]:
    """Returns class names; raises UsageError if they are no list of texts."""
    if not isinstance(value, list | tuple) or not all(
        isinstance(name, str) for name in value
    ):
        raise UsageError(
            f"class_names is {repr(value)[:60]}, expected a list of texts: correct it."
        )
    return tuple(value)


def check_total(declared: int, size: int, path: Path | str) -> None:
    """Raises UsageError if the arrays of a file are out of proportion to its size.

    Args:
      declared: bytes of the arrays, as the file says.
      size: bytes of the file.
      path: for the message.
    """
    most = max(_MOST_INFLATION * size, _HARMLESS)
    if declared > most:
        raise UsageError(
            f"{path} has {size:,} bytes, but says that it holds {declared:,}; expected "
            f"are at most {most:,}. Weights do not compress so well: it is damaged, or "
            "made to fill the memory. Download it from its authors."
        )


def check_zip(path: Path) -> None:
    """Checks the directory of a zip file: .npz, or PyTorch's.

    Raises:
      UsageError: what is in it is too much for its size, encrypted, or there twice.
    """
    size = regular_file(path)
    with zipfile.ZipFile(path) as file:
        members = file.infolist()
    check_names((member.filename for member in members), path)
    check_total(sum(member.file_size for member in members), size, path)
    if len({member.filename for member in members}) < len(members):
        raise UsageError(f"{path} has two entries of one name: download it again.")
    if any(member.flag_bits & 1 for member in members):
        raise UsageError(f"{path} is encrypted: decrypt it first.")


def check_weights(arrays: Mapping[str, Any]) -> None:
    """Checks that arrays are finite floats of some size, in one pass.

    Raises:
      UsageError: some are not; the message names them.
    """
    wrong = [
        f"{name} {problem}"
        for name, array in arrays.items()
        if (problem := _problem(np.asarray(array)))
    ]
    if wrong:
        rest = len(wrong) - 8
        listing = "\n  ".join(wrong[:8]) + (f"\n  and {rest} more" * (rest > 0))
        raise UsageError(
            "The checkpoint has weights that cannot be used; expected are finite "
            "floats (float16, bfloat16, float32 or float64). It is damaged, or its "
            f"training diverged: take another.\n  {listing}"
        )


def _problem(array: np.ndarray) -> str:
    if array.dtype not in FLOATS:
        small = array.dtype.kind in "iuV" and array.dtype.itemsize == 1
        quantised = ", quantised weights, which are not supported: dequantise them"
        return f"is {array.dtype}{quantised if small else ''}"
    if not array.size:
        # Transformers save the registers of a model that has none.
        none = array.ndim == 3 and array.shape[:2] == (1, 0)
        return "" if none else f"has no elements, shape {array.shape}"
    return "" if _is_finite(array) else "has NaN or infinity"


def _is_finite(array: np.ndarray) -> bool:
    """Whether all numbers are finite, in float32 too."""
    flat = array.reshape(-1) if array.flags.c_contiguous else array.ravel(order="K")
    exponent = _EXPONENTS.get(array.dtype)
    if exponent is not None:
        flat = flat.view(np.uint16)
    largest = np.finfo(np.float32).max
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        if exponent is not None:
            if (part & exponent).max() == exponent:
                return False
        # NaN spreads, and fails every comparison.
        elif not (part.min() >= -largest and part.max() <= largest):
            return False
    return True
