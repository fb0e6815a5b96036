"""Numbers in files: their types, also those that NumPy lacks, as bytes and as arrays."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from doconv_core.checkpoint import CheckpointError

Array = NDArray[Any]

BFLOAT16 = "bfloat16"
COPIED_AT_ONCE = 1 << 20
FLOATS = ("float16", "float32", "float64", BFLOAT16)


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """Return the little-endian NumPy dtype in which values of type `dtype` are stored."""
    return np.dtype("uint16" if dtype == BFLOAT16 else dtype).newbyteorder("<")


def from_storage(stored: Array, dtype: str) -> Array:
    """Return stored values to compute with; bfloat16 as float32, which loses nothing."""
    if dtype != BFLOAT16:
        return stored.astype(stored.dtype.newbyteorder("="), copy=False)
    return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_storage(values: Array, dtype: str) -> Array:
    """Return values as `dtype` stores them; rounded to the nearest, ties to even, for bfloat16."""
    if dtype != BFLOAT16:
        return np.ascontiguousarray(values, storage_dtype(dtype))
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # A NaN's fraction could round over into the sign; keep it a NaN.
    return np.where(np.isnan(values), 0x7FC0, rounded).astype("<u2")


def read_array(file: BinaryIO, path: Path, shape: tuple[int, ...], dtype: str) -> Array:
    """Return an array that lies in `file`, the file at `path`, from where that stands."""
    stored = np.fromfile(file, storage_dtype(dtype), prod(shape))
    if stored.size != prod(shape):
        raise CheckpointError(f"{path} was truncated while it was read.")
    return from_storage(stored.reshape(shape), dtype)


def copy_bytes(source: BinaryIO, target: BinaryIO, size: int, path: Path) -> None:
    """Copy `size` bytes from where `source`, the file at `path`, stands; little memory is used."""
    while size:
        block = source.read(min(size, COPIED_AT_ONCE))
        if not block:
            raise CheckpointError(f"{path} was truncated while it was read.")
        target.write(block)
        size -= len(block)
