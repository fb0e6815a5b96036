"""What "equal" means in the tests: exact where the arithmetic is the same, else close to a result.

Values are arrays of NumPy or of any framework, numbers, or mappings and sequences of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from doconv_core import difference

TOLERANCE = 1e-5  # relative to the largest entry of the expected, float64 or float32, result


def same(found: Any, expected: Any) -> bool:
    """Whether two values are equal bit for bit, and of the same names, shapes and dtypes."""
    return not any(_differences(found, expected, None, ""))


def close(found: Any, expected: Any, tolerance: float = TOLERANCE) -> bool:
    """Whether two values are of the same names and shapes, and equal but for rounding."""
    return not any(_differences(found, expected, tolerance, ""))


def assert_same(found: Any, expected: Any, case: str = "") -> None:
    """Assert `same`; the message starts with the case and tells every difference."""
    _assert(found, expected, None, case)


def assert_close(found: Any, expected: Any, tolerance: float = TOLERANCE, case: str = "") -> None:
    """Assert `close`; the message starts with the case and tells every difference."""
    _assert(found, expected, tolerance, case)


def as_array(value: Any) -> np.ndarray:
    """Return a framework's array, or anything else that NumPy takes, as a NumPy array.

    Values of types that NumPy lacks, such as bfloat16, come in float32.
    """
    if hasattr(value, "value") and hasattr(value, "assign"):  # a variable of Keras
        value = value.value
    if hasattr(value, "asnumpy"):  # MXNet
        return value.asnumpy()
    if hasattr(value, "detach"):  # PyTorch
        value = value.detach().cpu()
        value = (value.float() if "bfloat16" in str(value.dtype) else value).numpy()
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def _assert(found: Any, expected: Any, tolerance: float | None, case: str) -> None:
    told = list(_differences(found, expected, tolerance, ""))
    assert not told, "\n".join([case, *told] if case else told)


def _differences(found: Any, expected: Any, tolerance: float | None, path: str) -> Iterator[str]:
    """Yield what differs, a line each; a tolerance of None asks for the same bits and dtypes."""
    where = f"{path}: " if path else ""
    if found is None or expected is None:
        if found is not expected:
            yield f"{where}{found!r} where {expected!r} is expected"
    elif isinstance(expected, Mapping):
        if not isinstance(found, Mapping) or found.keys() != expected.keys():
            names = list(found) if isinstance(found, Mapping) else found
            yield f"{where}{names!r} where {list(expected)} are expected"
        else:
            for name in expected:
                inner = f"{path}.{name}" if path else str(name)
                yield from _differences(found[name], expected[name], tolerance, inner)
    elif isinstance(expected, list | tuple) and not hasattr(found, "dtype"):
        if len(found) != len(expected):
            yield f"{where}{len(found)} values where {len(expected)} are expected"
        else:
            for i, pair in enumerate(zip(found, expected, strict=True)):
                yield from _differences(*pair, tolerance, f"{path}[{i}]")
    else:
        yield from (where + line for line in _unequal(found, expected, tolerance))


def _unequal(found: Any, expected: Any, tolerance: float | None) -> Iterator[str]:
    dtypes = [_dtype(value) for value in (found, expected)]
    a, b = as_array(found), as_array(expected)
    if a.shape != b.shape:
        yield f"shape {a.shape} where {b.shape} is expected"
        return
    if tolerance is None and None not in dtypes and dtypes[0] != dtypes[1]:
        yield f"dtype {dtypes[0]} where {dtypes[1]} is expected"
    if tolerance is None and a.dtype.kind in "fc" and np.array_equal(a, b, equal_nan=True):
        return
    off = difference(a, b)
    if not off.relative <= (tolerance or 0):
        yield f"{off}; allowed {tolerance or 0:.2e} relative"


def _dtype(value: Any) -> str | None:
    """Return the name of an array's dtype, the same in every framework; None for other values."""
    dtype = getattr(value, "dtype", None)
    if isinstance(dtype, type):  # MXNet
        return np.dtype(dtype).name
    return None if dtype is None else str(getattr(dtype, "name", dtype)).removeprefix("torch.")
