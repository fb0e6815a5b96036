"""Separable convolutions, pointwise and then depthwise, as arrays: folding, and the nearest one.

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
from doconv_core.maths.numeric import Array, as_matrix, shaped, widened

# Subspace and blueprints are each improved for the other, which converges in a few rounds.
ROUNDS, ENOUGH = 20, 1e-4


def merge_pointwise(first: ArrayLike, second: ArrayLike) -> Array:
    """Return the weight of the pointwise convolution that equals BSConv-S's two, `W2·W1`.

    first: `W1`, `(mid, I)`. second: `W2`, `(O, mid)`. Returns `(O, I)`, in W2's dtype; half types
    are computed in float32 and rounded once. Raises ValueError where the shapes do not agree.

    >>> merge_pointwise(np.array([[1.0, 2.0]]), np.array([[1.0], [3.0]]))
    array([[1., 2.],
           [3., 6.]])
    """
    w1, w2 = _pair(first, second)
    merged: Array = widened(w2) @ widened(w1)
    return merged.astype(w2.dtype)


def merge_pointwise_gradient(
    first: ArrayLike, second: ArrayLike, gradient: ArrayLike
) -> tuple[Array, Array]:
    """Return the gradients with respect to `W1` and `W2`, from that of `W2·W1`, `(O, I)`.

    >>> first, second = np.array([[1.0, 2.0]]), np.array([[1.0], [3.0]])
    >>> merge_pointwise_gradient(first, second, np.ones((2, 2)))
    (array([[4., 4.]]), array([[3.],
           [3.]]))
    """
    w1, w2 = _pair(first, second)
    product = widened(shaped("gradient", gradient, (len(w2), w1.shape[1])))
    return (
        (widened(w2).T @ product).astype(w1.dtype),
        (product @ widened(w1).T).astype(w2.dtype),
    )


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[Array, Array]:
    w1, w2 = as_matrix("first", first), as_matrix("second", second)
    if w2.shape[1] != len(w1):
        raise ValueError(
            f"second must have {len(w1)} input channels, as many as first has output channels; "
            f"received shapes {w1.shape} and {w2.shape}."
        )
    return w1, w2


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


def nearest(filters: Array, mid: int | None) -> tuple[tuple[Array, ...], Array, float]:
    """Return the separable convolution nearest to a dense one, and how much of it that is.

    filters: `(O, I, M)`, in float64. mid: how many dimensions the pointwise weights' subspace has;
    None for no such limit. Returns the pointwise weights, `(O, I)`, or `(mid, I)` and `(O, mid)`;
    the filters' blueprints, `(O, M)`, as long as their weights; and the explained variance.
    """
    first, second, images = _nearest(filters, mid)
    # A filter of zeros keeps its blueprint: were both zero, no gradient would ever change them.
    lengths = np.sqrt(np.linalg.norm(second, axis=1, keepdims=True))
    factors = np.where(lengths > 0, lengths, 1.0)
    second, images = second / factors, images * factors
    if first is None:
        return (second,), images, _explained(filters, second, images)
    return (first, second), images, _explained(filters, second @ first, images)


def _nearest(filters: Array, mid: int | None) -> tuple[Array | None, Array, Array]:
    """Return the subspace, or None; the weights behind it; and blueprints of length 1."""
    images = _images(filters)
    if mid is None:
        return None, _weights(filters, images), images
    basis = _basis(_weights(filters, images), mid)
    projected = basis @ filters  # (mid, I) and each (I, M)
    reached = 0.0
    for _ in range(ROUNDS):
        images = _images(projected)
        explains = float((_weights(projected, images) ** 2).sum())
        if explains <= reached * (1 + ENOUGH):
            break
        reached = explains
        basis = _basis(_weights(filters, images), mid)
        projected = basis @ filters
    return basis, _weights(projected, images), images


def _images(filters: Array) -> Array:
    """Return the blueprint of each filter, `(O, M)`: its first right singular vector."""
    images: Array = np.linalg.svd(filters, full_matrices=False)[2][:, 0]
    # A singular vector's sign is arbitrary; the largest entry's is to be positive.
    largest = np.take_along_axis(images, np.abs(images).argmax(axis=1)[:, None], axis=1)
    signs: Array = np.where(largest < 0, -1.0, 1.0)
    return np.multiply(images, signs)


def _weights(filters: Array, images: Array) -> Array:
    """Return the best weights for blueprints of length 1, `(O, I)`."""
    weights: Array = np.einsum("oim,om->oi", filters, images)
    return weights


def _basis(weights: Array, mid: int) -> Array:
    """Return the subspace that is best for the weights, as `mid` orthonormal rows."""
    basis: Array = np.linalg.svd(weights, full_matrices=mid > len(weights))[2][:mid]
    return basis


def _explained(filters: Array, weights: Array, images: Array) -> float:
    total = float((filters**2).sum())
    if not total:
        return 1.0
    rest = filters - weights[:, :, None] * images[:, None, :]
    return min(1.0, max(0.0, 1.0 - float((rest**2).sum()) / total))
