"""How far a D has moved from the identity, and how well conditioned it is."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from doconv_core.kinds.do_conv import identity
from doconv_core.maths.numeric import widened
from doconv_core.maths.spec import ConvSpec

Array = NDArray[Any]
_CHUNK = 1 << 22  # entries of which the singular values are computed at once: 32 MiB


class Measures(NamedTuple):
    """What is worth knowing of one layer's `D`, over its input channels.

    relative: `‖D‖ / ‖E‖`, Frobenius norms over all channels. largest: the largest `|D|`.
    taps: `M`, which is full rank. least_rank, median_rank: numerical ranks of `E + D`, a
    singular value counting where it exceeds `max(M, S)` roundings of the largest.
    median_condition, worst_condition: the ratio of the largest singular value to the smallest;
    infinite where the smallest is 0. All but `taps` are NaN where D is not finite.
    """

    relative: float
    largest: float
    taps: int
    least_rank: float
    median_rank: float
    median_condition: float
    worst_condition: float


def measure(depthwise: Array, dtype: str) -> Measures:
    """Return the measures of `D`, `(I, M, S)`. dtype: in which it is stored, by name."""
    channels, taps, multiplier = depthwise.shape
    if not np.isfinite(depthwise).all():
        return Measures(np.nan, np.nan, taps, *(np.nan,) * 4)
    unit = identity(ConvSpec(1, 1, (taps,), 1, multiplier))
    squares = np.square(widened(depthwise), dtype=np.float64).sum()
    singular = _singular_values(depthwise, unit)
    rounding = {"bfloat16": 2.0**-7}.get(dtype) or float(np.finfo(dtype).eps)
    ranks = (singular > singular[:, :1] * rounding * max(taps, multiplier)).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        conditions = singular[:, 0] / singular[:, -1]
    conditions[np.isnan(conditions)] = np.inf  # E + D is 0
    return Measures(
        relative=float(np.sqrt(squares / (np.square(unit).sum() * channels))),
        largest=float(np.abs(depthwise).max()),
        taps=taps,
        least_rank=float(ranks.min()),
        median_rank=float(np.median(ranks)),
        median_condition=float(np.median(conditions)),
        worst_condition=float(conditions.max()),
    )


def _singular_values(depthwise: Array, unit: Array) -> Array:
    """Return those of each channel's `E + D`, in float64, largest first: `(I, M)`."""
    step = max(1, _CHUNK // unit.size)
    parts = [
        np.linalg.svd(unit + depthwise[start : start + step], compute_uv=False)
        for start in range(0, len(depthwise), step)
    ]
    values: Array = np.concatenate(parts)
    return values
