"""Numbers in files: their types, also those that NumPy lacks, as bytes and as arrays."""

from __future__ import annotations

from collections.abc import Iterable
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from doconv_core.files.checkpoint import CheckpointError

Array = NDArray[Any]

BFLOAT16 = "bfloat16"
COPIED_AT_ONCE = 1 << 20
COMPUTED_AT_ONCE = 1 << 18  # elements
FLOATS = ("float16", "float32", "float64", BFLOAT16)


# How arrays hold bfloat16 as it is stored: numbers that NumPy moves about and cannot compute with.
BITS = np.dtype([(BFLOAT16, "<u2")])
INFINITE = 0x7F80  # bfloat16's exponent, all ones where a number is not finite


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """Return the little-endian NumPy dtype in which values of type `dtype` are stored."""
    return BITS if dtype == BFLOAT16 else np.dtype(dtype).newbyteorder("<")


def computing_dtype(stored: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of `from_storage`'s arrays for stored values of type `stored`."""
    return np.dtype(np.float32) if stored == BITS else stored.newbyteorder("=")


def from_storage(stored: Array) -> Array:
    """Return stored values to compute with; bfloat16 as float32, which loses nothing."""
    if stored.dtype != BITS:
        return stored.astype(computing_dtype(stored.dtype), copy=False)
    return (stored.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_storage(values: Array, dtype: str) -> Array:
    """Return values as `dtype` stores them; rounded to the nearest, ties to even, for bfloat16."""
    if dtype != BFLOAT16:
        return np.ascontiguousarray(values, storage_dtype(dtype))
    if values.dtype == BITS:
        return np.ascontiguousarray(values)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # A NaN's fraction could round over into the sign; keep it a NaN.
    return np.where(np.isnan(values), 0x7FC0, rounded).astype("<u2").view(BITS)


def all_finite(stored: Array) -> bool:
    """Return whether no entry is infinite or not a number; little memory is used."""
    is_bits = stored.dtype == BITS
    numbers = stored.view("<u2") if is_bits else stored
    blocks = np.nditer(
        numbers, ["external_loop", "buffered", "zerosize_ok"], buffersize=COMPUTED_AT_ONCE
    )
    for block in cast(Iterable[Array], blocks):
        finite = (block & INFINITE) != INFINITE if is_bits else np.isfinite(block)
        if not np.all(finite):
            return False
    return True


def read_array(file: BinaryIO, path: Path, shape: tuple[int, ...], dtype: str) -> Array:
    """Return an array, as stored, that lies in `file`, the file at `path`, from where it stands."""
    # np.fromfile would turn a signal's SystemExit into a TypeError.
    stored = np.empty(prod(shape), storage_dtype(dtype))
    if cast(BufferedReader, file).readinto(stored.view(np.uint8).data) != stored.nbytes:
        raise CheckpointError(f"{path} was truncated while it was read.")
    try:
        return stored.reshape(shape)
    except ValueError as error:  # of too many axes, or of none times too many
        problem = str(error).rstrip(".")
        raise CheckpointError(f"{path}: no array here can be {shape}: {problem}.") from error


def copy_bytes(source: BinaryIO, target: BinaryIO, size: int, path: Path) -> None:
    """Copy `size` bytes from where `source`, the file at `path`, stands; little memory is used."""
    while size:
        block = source.read(min(size, COPIED_AT_ONCE))
        if not block:
            raise CheckpointError(f"{path} was truncated while it was read.")
        target.write(block)
        size -= len(block)
