"""Folding BSConv layers: the arithmetic, and the rule of what is exact.

A batch norm of inference is a factor and a shift for each channel. Behind a pointwise convolution
it always becomes a part of it, which then has a bias. That pointwise and the depthwise convolution
become one dense convolution only where padding and shift can change places: the depthwise one pads
what has been shifted, and a dense one would pad what has not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from doconv_core.maths.batchnorm import NotFoldable, fuse_batchnorm
from doconv_core.maths.geometry import Geometry
from doconv_core.maths.numeric import Array


class Pointwise(NamedTuple):
    """A pointwise convolution. weight: `(O, I)`. bias: `(O,)`, or None.

    >>> fold_pointwise([Pointwise([[1.0, 2.0]]), Pointwise([[3.0]], bias=[1.0])])
    Folded(kernel=array([[3., 6.]]), bias=array([1.]))
    """

    weight: ArrayLike
    bias: ArrayLike | None = None


class Normalization(NamedTuple):
    """A batch norm of inference, as `fuse_batchnorm` takes it; each array is `(O,)`.

    >>> norm = Normalization(mean=[2.0], variance=[4.0], epsilon=0.0)
    >>> fold_pointwise([Pointwise([[1.0, 2.0]]), norm])
    Folded(kernel=array([[0.5, 1. ]]), bias=array([-1.]))
    """

    mean: ArrayLike
    variance: ArrayLike
    epsilon: float
    scale: ArrayLike | None = None
    offset: ArrayLike | None = None


Step: TypeAlias = "Pointwise | Normalization"


class Folded(NamedTuple):
    """A kernel and its bias, or None, in float64. kernel: `(O, I)`, or `(O, I, M)` of a dense.

    >>> fold_pointwise([Pointwise([[1.0, 2.0]])])
    Folded(kernel=array([[1., 2.]]), bias=None)
    """

    kernel: Array
    bias: Array | None


def fold_pointwise(steps: Sequence[Step]) -> Folded:
    """Return the one pointwise convolution that equals several and their batch norms, in order.

    steps: what comes before the depthwise convolution; the first is a pointwise one.
    Raises ValueError for steps that do not follow each other, NotFoldable where the result is not
    finite.

    >>> fold_pointwise([Pointwise([[1.0, 2.0]]), Pointwise([[3.0]])]).kernel
    array([[3., 6.]])
    """
    if not steps or not isinstance(steps[0], Pointwise):
        raise ValueError("steps must begin with a pointwise convolution.")
    kernel, bias = _wide(steps[0].weight), _optional(steps[0].bias)
    for step in steps[1:]:
        if isinstance(step, Pointwise):
            weight, own = _wide(step.weight), _optional(step.bias)
            if weight.shape[1] != len(kernel):
                raise ValueError(
                    f"a pointwise convolution of {weight.shape[1]} input channels follows one of "
                    f"{len(kernel)} output channels."
                )
            kernel = weight @ kernel
            carried = None if bias is None else weight @ bias
            bias = own if carried is None else carried if own is None else carried + own
        else:
            kernel, bias = fuse_batchnorm(kernel, bias, **step._asdict())
    return _finite(kernel, bias)


def fold_dense(
    pointwise: Folded, depthwise: ArrayLike, bias: ArrayLike | None, geometry: Geometry
) -> Folded:
    """Return the dense convolution that equals a pointwise one, then a depthwise one.

    depthwise: `(O, M)`, and its bias, `(O,)` or None. geometry: the depthwise one's, which becomes
    the dense one's. Raises NotFoldable where it would not be exact.

    >>> pointwise, geometry = fold_pointwise([Pointwise([[2.0]])]), Geometry((1,), (1,), ((1, 1),))
    >>> fold_dense(pointwise, [[1.0, 0.0, 3.0]], None, geometry).kernel
    array([[[2., 0., 6.]]])
    """
    if pointwise.bias is not None:
        check_dense(geometry)
    dw, own = _wide(depthwise), _optional(bias)
    kernel = pointwise.kernel[:, :, None] * dw[:, None, :]
    if pointwise.bias is not None:
        carried = pointwise.bias * dw.sum(axis=1)
        own = carried if own is None else own + carried
    return _finite(kernel, own)


def check_dense(geometry: Geometry) -> None:
    """Raise NotFoldable where a shift before the depthwise convolution meets zero padding.

    Without padding there is nothing to meet; reflected, replicated and circular padding repeats
    what has been shifted.

    >>> check_dense(Geometry((1,), (1,), ((1, 1),), "reflect"))
    >>> check_dense(Geometry((1,), (1,), ((1, 1),)))
    Traceback (most recent call last):
        ...
    doconv_core.maths.batchnorm.NotFoldable: the batch norm, or bias, between ...
    """
    if geometry.padding_mode == "zeros" and any(
        isinstance(pad, str) or any(pad) for pad in geometry.padding
    ):
        raise NotFoldable(
            "the batch norm, or bias, between the pointwise and the depthwise convolution meets "
            f"zero padding {geometry.padding}, which no dense convolution computes; use "
            "form='merge', which is exact, or train it without padding, without batch norm, or "
            "with padding that reflects, replicates or wraps around."
        )


def _finite(kernel: Array, bias: Array | None) -> Folded:
    if not np.isfinite(kernel).all() or (bias is not None and not np.isfinite(bias).all()):
        raise NotFoldable("the folded kernel or bias would not be finite.")
    return Folded(kernel, bias)


def _wide(array: ArrayLike) -> Array:
    return np.asarray(array).astype(np.float64)


def _optional(array: ArrayLike | None) -> Array | None:
    return None if array is None else _wide(array)
