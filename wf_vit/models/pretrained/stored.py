"""One step of a run's checkpoints on disk: its arrays, each checked by a digest.

A step's folder has three items, written by Orbax: ``state``, the arrays; ``meta``, what
rebuilds the model, with the digest of every array; ``metrics``, if the step was
evaluated.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from wf_vit.errors import UsageError
from wf_vit.models.pretrained import guards

# What ``meta`` calls the digests of the arrays, and that of all else that it holds.
DIGESTS = "sha256"
_OF_META = "sha256_of_meta"


class DamagedError(UsageError):
    """A checkpoint's files are not what was written."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a step's folder holds.

    Attributes:
      meta: what was saved as such, in terms of JSON.
      arrays: by their path in the tree, such as ``params/head/bias``.
    """

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]


def by_path(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, as Orbax names them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(map(_name, path)): leaf for path, leaf in leaves}


def sealed(meta: dict[str, Any], tree: PyTree) -> dict[str, Any]:
    """Returns ``meta`` with the digests by which ``read_step`` checks everything.

    Args:
      meta: in terms of JSON.
      tree: of the arrays that are saved beside it.
    """
    digests = {path: _digest(leaf) for path, leaf in by_path(tree).items()}
    # A copy: it is written later, and the caller's may have changed by then.
    meta = json.loads(json.dumps({**meta, DIGESTS: digests}))
    return {**meta, _OF_META: _digest_of_meta(meta)}


def read_step(
    folder: Path, choose: Callable[[dict[str, Any]], Sequence[str]] | None = None
) -> Stored:
    """Reads a step and checks every array that it reads.

    Args:
      folder: of the step.
      choose: from the state's tree of metadata to the top-level entries to read; None:
        all of them.

    Raises:
      DamagedError: a file is missing, cut or changed; the message says which array or
        what Orbax says.
      PermissionError: a file may not be read.
    """
    try:
        stored = _read(folder, choose)
    except (PermissionError, MemoryError):
        raise
    # Orbax, TensorStore and JSON each raise their own, of any kind.
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        raise DamagedError(f"{type(error).__name__}: {text[:300]}") from error
    expected = stored.meta.get(DIGESTS)
    seal = stored.meta.pop(_OF_META, None)
    if expected is None and seal is None:  # A checkpoint of an earlier version.
        return stored
    if seal != _digest_of_meta(stored.meta):
        raise DamagedError("its meta is not what was written")
    for path, array in stored.arrays.items():
        if expected.get(path) != _digest(array):
            raise DamagedError(f"the array {path} is not what was written")
    return stored


def step_folders(directory: Path) -> list[Path]:
    """Returns the folders of the finished steps of a run, the newest last.

    Args:
      directory: of the checkpoints, which may not exist.
    """
    if not directory.is_dir():
        return []
    steps = [f for f in directory.iterdir() if f.name.isdecimal() and f.is_dir()]
    return sorted(steps, key=lambda folder: int(folder.name))


def read_metrics(folder: Path) -> dict[str, float]:
    """Returns the metrics of a step; none if it was not evaluated.

    Raises:
      DamagedError: they are damaged.
    """
    file = folder / "metrics" / "metrics"
    if not file.parent.is_dir():
        return {}
    try:
        metrics = json.loads(file.read_bytes())
        return {str(name): float(value) for name, value in metrics.items()}
    except PermissionError:
        raise
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DamagedError(f"its metrics cannot be read ({error})") from error


def _read(folder: Path, choose: Callable | None) -> Stored:
    # Files of others need none of it, and its import takes a third of a second.
    import orbax.checkpoint as ocp

    size = guards.regular_files(folder)
    json_item = ocp.JsonCheckpointHandler()
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(), meta=json_item, metrics=json_item
    )
    with ocp.Checkpointer(handler) as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata["state"].tree
        wanted = tree if choose is None else {name: tree[name] for name in choose(tree)}
        declared = (
            math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
            for leaf in jax.tree.leaves(wanted)
        )
        guards.check_total(sum(declared), size, folder)
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        restored = checkpointer.restore(
            folder,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    item=wanted,
                    restore_args=jax.tree.map(lambda _: as_numpy, wanted),
                    partial_restore=choose is not None,
                ),
                meta=ocp.args.JsonRestore(),
            ),
        )
    meta = restored["meta"]
    if not isinstance(meta, dict):
        raise TypeError(f"meta is a {type(meta).__name__}, expected an object")
    return Stored(meta, by_path(restored["state"]))


def _name(entry: Any) -> str:
    """Returns a step of a path: an index, a key, or the name of an attribute."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    raise TypeError(f"{entry!r} is no step of a path of a tree.")


def _digest_of_meta(meta: dict[str, Any]) -> str:
    text = json.dumps(meta, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(array: Any) -> str:
    # As bytes: hashlib does not know bfloat16.
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8)).hexdigest()
