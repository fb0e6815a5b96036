"""Branches that add up to one convolution: kernels of several sizes, and the input itself.

A sum of convolutions of one input is a convolution with the sum of their kernels, the smaller ones
with zeros around them; the input itself is one whose kernel gives each channel back. A batch norm
at the end of a branch is a part of it in inference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from doconv_core.maths.batchnorm import fuse_batchnorm
from doconv_core.maths.numeric import Array


def margins(inner: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, ...]:
    """Return how many taps are on either side of a kernel in the middle of one of `size`.

    Raises ValueError where `inner` has no place there, or none in the middle.

    >>> margins((1, 3), (5, 3))
    (2, 0)
    """
    more = [new - old for new, old in zip(size, inner, strict=True)]
    if any(n < 0 or n % 2 for n in more):
        raise ValueError(f"a kernel of {inner} taps has no place in the middle of one of {size}")
    return tuple(n // 2 for n in more)


def padded(kernel: Array, size: tuple[int, ...]) -> Array:
    """Return a kernel, `(O, I/g, *kernel_size)`, with zeros around it, `(O, I/g, *size)`.

    Raises ValueError where `margins` does.

    >>> padded(np.ones((1, 1, 1)), (3,))
    array([[[0., 1., 0.]]])
    """
    return np.pad(kernel, ((0, 0), (0, 0), *((n, n) for n in margins(kernel.shape[2:], size))))


def unit_centre(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the tap in the middle of a kernel that can give each channel of its input back.

    shape: `(O, I/g, *kernel_size)`, of which `O` is `I`. Raises ValueError where there is no such.

    >>> unit_centre((8, 1, 3, 3))
    (1, 1)
    """
    outputs, channels, *size = shape
    if not channels or outputs % channels or not all(n % 2 for n in size):
        raise ValueError(f"no kernel of shape {shape} gives each channel of its input back")
    return tuple(n // 2 for n in size)


def unit_kernel(shape: tuple[int, ...]) -> Array:
    """Return the kernel that gives each channel of the input back, in float64; as `unit_centre`.

    >>> unit_kernel((2, 1, 3))
    array([[[0., 1., 0.]],
    <BLANKLINE>
           [[0., 1., 0.]]])
    """
    centre = unit_centre(shape)
    kernel = np.zeros(shape)
    output = np.arange(shape[0])
    kernel[(output, output % shape[1], *centre)] = 1
    return kernel


class Term(NamedTuple):
    """A branch in inference. kernel: `(O, I/g, *kernel_size)`, None for the input itself.

    bias: `(O,)`, or None. norm: the batch norm at its end, by `fuse_batchnorm`'s names, or None.
    sign: 1, or -1 where it is taken away.

    >>> Term(np.ones((1, 1, 3)), None, None).sign
    1
    """

    kernel: Array | None
    bias: Array | None
    norm: Mapping[str, Array] | None
    sign: int = 1


def add_branches(
    terms: Iterable[Term], shape: tuple[int, ...], *, epsilon: float
) -> tuple[Array, Array]:
    """Return the kernel, of this shape, and the bias, `(O,)`, of the sum of branches, in float64.

    epsilon: what the norms add to a variance. Raises ValueError where a shape does not fit.
    Source: RepVGG, arXiv 2101.03697, section 3.3.

    >>> one = {"mean": np.zeros(1), "variance": np.full(1, 0.25)}
    >>> terms = Term(np.ones((1, 1, 3)), np.ones(1), None), Term(None, None, one)
    >>> add_branches(terms, (1, 1, 3), epsilon=0)
    (array([[[1., 3., 1.]]]), array([1.]))
    """
    kernel, bias = np.zeros(shape), np.zeros(shape[0])
    for term in terms:
        inner = unit_kernel(shape) if term.kernel is None else padded(term.kernel, shape[2:])
        inner = inner.astype(np.float64)
        shift: Array = np.zeros(shape[0]) if term.bias is None else term.bias
        if term.norm is not None:
            inner, shift = fuse_batchnorm(inner, shift, epsilon=epsilon, **term.norm)
        kernel += term.sign * inner
        bias += term.sign * shift
    return kernel, bias
