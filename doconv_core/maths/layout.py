"""Layouts: where each framework keeps the axes of a weight, and the way between them.

A layout is a word of signs: `O` output channels and `I` input channels, of which the second is
counted within the group, and `*` everything over the taps, which is the kernel's spatial axes or,
where `S > M`, the one axis of the depth multiplier. A depthwise layout has `C` for the layer's
input channels and `N` for the output channels of each. The canonical orders are `(O, I/g, taps…)`
of a convolution, `(I, O/g, taps…)` of a transposed one, and `(out, in)` of a linear layer.

    "OI*"  PyTorch; Gluon, channels first      "O*I"  Gluon, channels last
    "*IO"  Keras convolutions                  "*CN"  Keras depthwise convolutions
    "IO*"  PyTorch and Gluon, transposed       "I*O"  Gluon, transposed, channels last
    "*OI"  Keras, transposed
    "OI"   linear: PyTorch, Gluon              "IO"   linear: Keras

D is `(I, M, S)` in every framework and needs none.
"""

from __future__ import annotations

from math import prod
from typing import TypeAlias

import numpy as np

from doconv_core.maths.numeric import Array
from doconv_core.maths.spec import check_choice

# Which of the canonical order's axes are elsewhere in each layout, and where.
_Axes: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...]]"
_MOVED: dict[str, _Axes] = {
    **dict.fromkeys(("OI*", "IO*", "OI"), ((), ())),
    **dict.fromkeys(("O*I", "I*O"), ((1,), (-1,))),
    **dict.fromkeys(("*IO", "*OI", "IO"), ((0, 1), (-1, -2))),
}
_DEPTHWISE = "*CN"
LAYOUTS = (*_MOVED, _DEPTHWISE)


def from_canonical(weight: Array, layout: str, groups: int = 1) -> Array:
    """Return a canonical weight, `(O, I/g, taps…)`, in `layout`, as a view where that is possible.

    groups: the layer's, which "*CN" alone needs; there it is the number of input channels.
    Raises ValueError for a layout that is not in LAYOUTS, and for "*CN" where `I/g` is not 1.

    >>> from_canonical(np.zeros((16, 8, 3, 3)), "*IO").shape  # as Keras has it
    (3, 3, 8, 16)
    """
    if layout != _DEPTHWISE:
        here, there = _moved(layout)
        return np.moveaxis(weight, here, there)
    if weight.shape[1] != 1:
        raise ValueError(
            "a depthwise weight must be (O, 1, taps…) in canonical order; received shape "
            f"{weight.shape}."
        )
    return np.moveaxis(weight.reshape(groups, -1, *weight.shape[2:]), (0, 1), (-2, -1))


def to_canonical(weight: Array, layout: str) -> Array:
    """Return a weight kept in `layout` in canonical order, `(O, I/g, taps…)`.

    Raises ValueError for a layout that is not in LAYOUTS.

    >>> to_canonical(np.zeros((3, 3, 8, 16)), "*IO").shape
    (16, 8, 3, 3)
    """
    if layout != _DEPTHWISE:
        there, here = _moved(layout)
        return np.moveaxis(weight, here, there)
    return np.moveaxis(weight.reshape(*weight.shape[:-2], -1), -1, 0)[:, None]


def to_channels_first(features: Array, positions: tuple[int, ...]) -> Array:
    """Return an array whose last axis is an image flattened channels last, in channels-first order.

    positions: the image's size, without its channels.
    """
    image = features.reshape(*features.shape[:-1], *positions, -1)
    return np.moveaxis(image, -1, features.ndim - 1).reshape(features.shape)


def from_channels_first(features: Array, positions: tuple[int, ...]) -> Array:
    """Return what `to_channels_first` gives `features` for."""
    channels = features.shape[-1] // prod(positions)
    image = features.reshape(*features.shape[:-1], channels, *positions)
    return np.moveaxis(image, features.ndim - 1, -1).reshape(features.shape)


def _moved(layout: str) -> _Axes:
    check_choice("layout", layout, LAYOUTS)
    return _MOVED[layout]
