"""Numbers: half precision, and the one answer to the question whether two results are equal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]


def as_floats(name: str, array: ArrayLike) -> Array:
    """Return `array` as an array of floats; TypeError names it where its dtype is another."""
    array = np.asarray(array)
    # ml_dtypes' bfloat16, which NumPy does not count among its own floats, has kind "V".
    if array.dtype.kind not in "fV":
        raise TypeError(f"{name} must be an array of floats; received dtype {array.dtype}.")
    return array


def shaped(name: str, array: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Return `array` as an array of floats; ValueError names it where its shape is another."""
    array = as_floats(name, array)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}; received {array.shape}.")
    return array


def as_matrix(name: str, array: ArrayLike) -> Array:
    """Return a pointwise weight as floats; ValueError names it where it has other axes than two."""
    matrix = as_floats(name, array)
    if matrix.ndim != 2:
        raise ValueError(
            f"{name} must have shape (output, input) channels; received {matrix.shape}."
        )
    return matrix


def widened(array: Array) -> Array:
    """Return `array` in the dtype it is computed in: float32 for half types, else its own."""
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array


class Difference(NamedTuple):
    """How far a result lies from the expected one.

    absolute: the largest difference of two entries. relative: the same, divided by the largest
    magnitude of any expected entry; so an entry near zero does not decide. Both are infinite where
    one result has a NaN or an infinity that the other lacks, and NaN where both have the same: of
    values that are not finite nothing can be told. So no comparison takes them for equal.

    >>> Difference(absolute=0.5, relative=0.25).relative
    0.25
    """

    absolute: float
    relative: float


def difference(found: ArrayLike, expected: ArrayLike) -> Difference:
    """Return the largest absolute and relative difference of `found` from `expected`, in float64.

    Two results are equal "exactly" where both are 0, and equal "to r relative" where `relative` is
    at most r. Empty arrays are equal. Of complex numbers, magnitudes count. Raises ValueError where
    the shapes differ.

    >>> difference([1.0, 2.5], [1.0, 2.0])
    Difference(absolute=0.5, relative=0.25)
    """
    a, b = np.asarray(found), np.asarray(expected)
    if a.shape != b.shape:
        raise ValueError(f"expected a result of shape {b.shape}; received {a.shape}.")
    apart = distances(a, b)
    a, b = _wide(a), _wide(b)
    if not np.isfinite(apart).all():
        a_too, b_too = np.isfinite(a), np.isfinite(b)
        alike = (a == b) | (np.isnan(a) & np.isnan(b)) | (a_too & b_too & np.isfinite(apart))
        nothing = np.nan if alike.all() else np.inf
        return Difference(nothing, nothing)
    largest = float(apart.max(initial=0.0))
    if not largest:
        return Difference(0.0, 0.0)
    scale = float(np.abs(b).max())
    return Difference(largest, largest / scale if scale else np.inf)


def distances(a: Array, b: Array) -> Array:
    """Return the magnitude of each entry's difference, in float64; NaN where nothing can be told.

    Of integers, which float64 has not all beyond 2**53, those that differ do so by 1 at least.
    """
    with np.errstate(all="ignore"):  # what is not finite is in the result
        apart: Array = np.abs(_wide(a) - _wide(b))
    if a.dtype.kind in "iu" and b.dtype.kind in "iu":
        apart = np.maximum(apart, a != b)
    return apart


def _wide(array: Array) -> Array:
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def largest(values: Iterable[float]) -> float:
    """Return the largest of differences: infinite where one is, else NaN where one is; 0 of none.

    >>> largest([1.0, float("nan")])
    nan
    """
    found = list(values)
    if any(map(math.isnan, found)) and math.inf not in found:
        return math.nan
    return max((each for each in found if not math.isnan(each)), default=0.0)
