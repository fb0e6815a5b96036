"""Starting a BSConv from a trained kernel: the nearest one, by singular value decomposition.

A filter of an ordinary convolution is a matrix, `(I, M)`: a `k x k` image for each input channel.
Where these images are alike up to a factor, one blueprint says it all; the paper finds that they
nearly are. How nearly is the explained variance: the share of the kernel's squared Frobenius norm
that the BSConv has.
Source: BSConv, arXiv 2003.13549, on correlations within kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from doconv_core.kinds.bsconv import BSConvSpec
from doconv_core.maths.numeric import Array, shaped

# The subspace and the blueprints are each improved for the other, which converges in a few rounds.
ROUNDS, ENOUGH = 20, 1e-4


class Blueprints(NamedTuple):
    """The BSConv that is nearest to a kernel, in the kernel's dtype.

    pointwise: weights in the order of their use: `pw` `(O, I)`, or `W1` `(mid, I)`, whose rows are
    orthonormal, and `W2` `(O, mid)`. depthwise: `dw`, `(O, M)`. explained: the share of the
    kernel's squared Frobenius norm, 0 to 1; 1 for a kernel of zeros.

    >>> found = blueprints(np.array([[[4.0, 0.0], [4.0, 0.0]]]), BSConvSpec(2, 1, (2,)))
    >>> round(found.explained, 6), found.depthwise.shape
    (1.0, (1, 2))
    """

    pointwise: tuple[Array, ...]
    depthwise: Array
    explained: float


def blueprints(kernel: ArrayLike, spec: BSConvSpec) -> Blueprints:
    """Return the BSConv of `spec`'s sizes that is nearest to a trained kernel.

    "u": the best approximation of each filter of rank 1, the optimum. "s": the best of those whose
    pointwise weights lie in one subspace of `mid` dimensions, found by turns: the subspace that is
    best for the blueprints, then the blueprints that are best for the subspace. Each turn explains
    more; what is found may be a local optimum.
    A filter's scale is divided evenly between its blueprint and its weights. Batch norms are taken
    for the identity.

    kernel: `(O, I, *kernel_size)`. Computed in float64 and rounded once.
    Raises ValueError where the shape disagrees with `spec` or an entry is not finite.

    >>> alike = np.array([[[1.0, 2.0], [2.0, 4.0]], [[1.0, 0.0], [0.0, 1.0]]])
    >>> round(blueprints(alike, BSConvSpec(2, 2, (2,))).explained, 3)  # one filter has two images
    0.963
    """
    shape = spec.dense.kernel_shape
    original = shaped("kernel", kernel, shape)
    filters = original.astype(np.float64).reshape(*shape[:2], spec.taps)
    if not np.isfinite(filters).all():
        raise ValueError("kernel must be finite; received one with infinities or NaNs.")
    first, second, images = _nearest(filters, spec.mid_channels)
    second, images = _balanced(second, images)
    weights = (second,) if first is None else (first, second)
    pw = second if first is None else second @ first
    return Blueprints(
        tuple(weight.astype(original.dtype) for weight in weights),
        images.astype(original.dtype),
        _explained(filters, pw, images),
    )


def _nearest(filters: Array, mid: int | None) -> tuple[Array | None, Array, Array]:
    """Return `W1`, or None for "u"; the weights behind it; and blueprints of length 1."""
    images = _images(filters)
    if mid is None:
        return None, _weights(filters, images), images
    basis = _basis(_weights(filters, images), mid)
    projected = _projected(filters, basis)
    reached = 0.0
    for _ in range(ROUNDS):
        images = _images(projected)
        explains = float((_weights(projected, images) ** 2).sum())
        if explains <= reached * (1 + ENOUGH):
            break
        reached = explains
        basis = _basis(_weights(filters, images), mid)
        projected = _projected(filters, basis)
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


def _projected(filters: Array, basis: Array) -> Array:
    projected: Array = basis @ filters  # (mid, I) and each (I, M)
    return projected


def _balanced(weights: Array, images: Array) -> tuple[Array, Array]:
    """Return both with one length for each filter.

    A filter of zeros keeps its blueprint: were both zero, no gradient would ever change them.
    """
    lengths = np.sqrt(np.linalg.norm(weights, axis=1, keepdims=True))
    factors = np.where(lengths > 0, lengths, 1.0)
    return weights / factors, images * factors


def _explained(filters: Array, weights: Array, images: Array) -> float:
    total = float((filters**2).sum())
    if not total:
        return 1.0
    rest = filters - weights[:, :, None] * images[:, None, :]
    return min(1.0, max(0.0, 1.0 - float((rest**2).sum()) / total))
