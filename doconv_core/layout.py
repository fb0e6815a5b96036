"""Layouts: where each framework keeps the axes of a convolution's weight, and the way between them.

The canonical order is `(O, I/g, taps…)`. A layout is a word of three signs: `O` output channels,
`I` input channels of the group, `*` everything over the taps, which is the kernel's spatial axes
or, where `S > M`, the one axis of the depth multiplier. A depthwise layout has `C` for the layer's
input channels and `N` for the output channels of each.

    "OI*"  PyTorch; Gluon, channels first      "O*I"  Gluon, channels last
    "*IO"  Keras convolutions                  "*CN"  Keras depthwise convolutions

D is `(I, M, S)` in every framework and needs none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LAYOUTS = ("OI*", "O*I", "*IO", "*CN")


def from_canonical(weight: Array, layout: str, groups: int = 1) -> Array:
    """Return a canonical weight, `(O, I/g, taps…)`, in `layout`, as a view where that is possible.

    groups: the layer's, which "*CN" alone needs; there it is the number of input channels.
    Raises ValueError for a layout that is not in LAYOUTS, and for "*CN" where `I/g` is not 1.
    """
    if layout == "OI*":
        return weight
    if layout == "O*I":
        return np.moveaxis(weight, 1, -1)
    if layout == "*IO":
        return np.moveaxis(weight, (0, 1), (-1, -2))
    if layout != "*CN":
        raise _unknown(layout)
    if weight.shape[1] != 1:
        raise ValueError(
            "a depthwise weight must be (O, 1, taps…) in canonical order; received shape "
            f"{weight.shape}."
        )
    return np.moveaxis(weight.reshape(groups, -1, *weight.shape[2:]), (0, 1), (-2, -1))


def to_canonical(weight: Array, layout: str) -> Array:
    """Return a weight kept in `layout` in canonical order, `(O, I/g, taps…)`.

    Raises ValueError for a layout that is not in LAYOUTS.
    """
    if layout == "OI*":
        return weight
    if layout == "O*I":
        return np.moveaxis(weight, -1, 1)
    if layout == "*IO":
        return np.moveaxis(weight, (-1, -2), (0, 1))
    if layout != "*CN":
        raise _unknown(layout)
    return np.moveaxis(weight.reshape(*weight.shape[:-2], -1), -1, 0)[:, None]


def _unknown(layout: str) -> ValueError:
    return ValueError(f"layout must be one of {', '.join(LAYOUTS)}; received {layout!r}.")
