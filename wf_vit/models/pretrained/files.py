"""Arrays from .npz and .safetensors files, of which only the bytes are believed."""

import json
import math
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.lib import format as npy
from safetensors import safe_open

from wf_vit.errors import UsageError
from wf_vit.models.pretrained import guards

# Names and shapes of a ViT take 0.1 MB.
_MOST_HEADER = 16 * 2**20
_PIECE = 2**20
# By version. The others are for what is no plain array.
_NPY_HEADERS = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a file.

    The library checks that they fill the file exactly, without overlaps.
    """
    size = guards.regular_file(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _MOST_HEADER):
            raise UsageError(
                f"{path} ({size:,} bytes) has a header of {length:,} bytes, expected "
                f"at most {_MOST_HEADER:,} and less than the file: it cannot be read. "
                "Download it again."
            )
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise UsageError(f"{path} has a header of no names: Download it again.")
    guards.check_names(header, path)
    # NumPy finds bfloat16 because ml_dtypes is imported.
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a file; checksums are compared to the last byte."""
    guards.check_zip(path)
    arrays = {}
    with zipfile.ZipFile(path) as file:
        for member in file.infolist():
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise UsageError(f"{path} has two arrays {name!r}: download it again.")
            arrays[name] = _read_npy(file, member, name)
    return arrays


def _read_npy(file: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> np.ndarray:
    """Returns one array; ValueError where the header and the bytes differ."""
    with file.open(member) as content:
        read_header = _NPY_HEADERS.get(npy.read_magic(content))
        if read_header is None:
            raise ValueError(f"{name} is no array of numbers")
        shape, fortran, dtype = read_header(content)
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which are never unpickled")
        left = member.file_size - content.tell()
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != left:
            raise ValueError(
                f"{name} says that it is {dtype} {shape}, but has {left:,} bytes"
            )
        raw = np.empty(left, np.uint8)
        place = 0
        while place < left:
            piece = content.read(min(_PIECE, left - place))
            if not piece:
                raise ValueError(f"{name} ends after {place:,} of {left:,} bytes")
            raw[place : place + len(piece)] = np.frombuffer(piece, np.uint8)
            place += len(piece)
        # Only here zipfile compares the checksum of what is empty.
        if content.read(1):
            raise ValueError(f"{name} goes on after its end")
    # NumPy stores bfloat16 as two bytes without a type.
    dtype = np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype
    array = raw.view(dtype) if dtype.itemsize else np.empty(0, dtype)
    if fortran:
        return array.reshape(shape[::-1]).T
    return array.reshape(shape)
