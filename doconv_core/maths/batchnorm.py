"""Folding: the error for what has no ordinary layer of the same function, and batch norm's rule."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from doconv_core.maths.numeric import Array, as_floats


class NotFoldable(TypeError):
    """A layer or model that no ordinary one computes exactly: which, and why not.

    >>> raise NotFoldable("layer 'stem' has a forward of its own")
    Traceback (most recent call last):
        ...
    doconv_core.maths.batchnorm.NotFoldable: layer 'stem' has a forward of its own
    """


NOT_FINITE = "the folded kernel is not finite; its trained weights have overflowed."


def fuse_batchnorm(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    *,
    mean: ArrayLike,
    variance: ArrayLike,
    epsilon: float,
    scale: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """Return the kernel and bias of a convolution that includes the batch norm that follows it.

    kernel: `(O, I/g, *kernel_size)`. bias: `(O,)`, or None for zero. mean, variance: the batch
    norm's running statistics, `(O,)`; epsilon: what it adds to the variance; scale, offset: its
    gamma and beta, `(O,)`, or None for ones and zeros. That is the batch norm of inference:
    `(y - mean) / sqrt(variance + epsilon) * scale + offset`, for each output channel.
    Computed in float64 and rounded once, to kernel's dtype.
    Raises ValueError where a shape disagrees with the kernel's output channels.

    >>> kernel, mean, variance = np.ones((1, 1, 3)), np.array([2.0]), np.array([4.0])
    >>> fuse_batchnorm(kernel, None, mean=mean, variance=variance, epsilon=0)
    (array([[[0.5, 0.5, 0.5]]]), array([-1.]))
    """
    kernel = as_floats("kernel", kernel)
    channels = kernel.shape[0] if kernel.ndim else 0

    def vector(name: str, value: ArrayLike | None, default: float) -> Array:
        if value is None:
            return np.full(channels, default)
        array = as_floats(name, value)
        if array.shape != (channels,):
            raise ValueError(
                f"{name} must have shape ({channels},), one entry for each output channel of the "
                f"kernel; received {array.shape}."
            )
        return array.astype(np.float64)

    factor = vector("scale", scale, 1.0) / np.sqrt(vector("variance", variance, 1.0) + epsilon)
    shift = vector("bias", bias, 0.0) - vector("mean", mean, 0.0)
    fused = kernel.astype(np.float64) * factor.reshape(-1, *(1,) * (kernel.ndim - 1))
    fused_bias = shift * factor + vector("offset", offset, 0.0)
    return fused.astype(kernel.dtype), fused_bias.astype(kernel.dtype)
