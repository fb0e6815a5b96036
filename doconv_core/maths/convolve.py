"""A reference convolution for 1 to 3 spatial dimensions, and its gradients, in plain NumPy.

As in every deep-learning framework, "convolution" is cross-correlation: the kernel is not flipped.
Channels come second: `x` is `(B, I, *spatial)`, the kernel `(O, I/g, *kernel_size)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike

from doconv_core.maths.numeric import Array, as_floats, widened
from doconv_core.maths.spec import MAX_RANK, as_integer, as_tuple, check_choice, is_sequence

Padding = tuple[tuple[int, int], ...]

PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def convolve(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Array:
    """Return the ordinary convolution of `x` with `kernel`.

    x: `(B, I, *spatial)`. kernel: `(O, I/g, *kernel_size)`. bias: `(O,)` or None.
    stride, dilation: an integer, or one for each spatial dimension.
    padding: an integer, or for each spatial dimension an integer or a pair (before, after).
    padding_mode: "zeros", "reflect", "replicate" or "circular".
    Returns `(B, O, *out)`, in x's dtype; half types are computed in float32 and rounded once.
    Raises ValueError or TypeError for shapes and arguments that do not fit together.

    >>> convolve(np.array([[[1.0, 2.0, 3.0]]]), np.array([[[1.0, 10.0]]]), padding=[(1, 0)])
    array([[[10., 21., 32.]]])
    """
    x, kernel = as_floats("x", x), as_floats("kernel", kernel)
    g = _geometry(x, kernel, stride, padding, dilation, groups, padding_mode)
    patches, flat_kernel = _patches(widened(x), g), _flat(widened(kernel), g)
    out = flat_kernel @ patches  # (B, g, O/g, positions)
    out = out.reshape(len(x), len(kernel), *g.out_size)
    if bias is not None:
        bias = as_floats("bias", bias)
        if bias.shape != (len(kernel),):
            raise ValueError(f"bias must have shape {(len(kernel),)}; received {bias.shape}.")
        out = out + widened(bias).reshape(-1, *(1,) * g.rank)
    return out.astype(x.dtype)


class ConvolutionGradients(NamedTuple):
    """Gradients of a loss with respect to a convolution's input, kernel and bias.

    >>> x, kernel = np.array([[[1.0, 2.0, 3.0]]]), np.array([[[1.0, 10.0]]])
    >>> gradients = convolve_gradient(x, kernel, np.ones((1, 1, 2)))
    >>> gradients.kernel, gradients.bias
    (array([[[3., 5.]]]), array([2.]))
    """

    x: Array
    kernel: Array
    bias: Array


def convolve_gradient(
    x: ArrayLike,
    kernel: ArrayLike,
    output_gradient: ArrayLike,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> ConvolutionGradients:
    """Return the gradients of a loss with respect to `convolve`'s x, kernel and bias.

    output_gradient: `(B, O, *out)`, the loss's gradient with respect to `convolve`'s result; the
    other arguments are those given to `convolve`. Returns arrays of the arguments' shapes, in x's
    dtype. Raises ValueError where output_gradient's shape is not that of the result.

    >>> x, kernel = np.array([[[1.0, 2.0, 3.0]]]), np.array([[[1.0, 10.0]]])
    >>> convolve_gradient(x, kernel, np.ones((1, 1, 2))).x
    array([[[ 1., 11., 10.]]])
    """
    x, kernel = as_floats("x", x), as_floats("kernel", kernel)
    dy = as_floats("output_gradient", output_gradient)
    g = _geometry(x, kernel, stride, padding, dilation, groups, padding_mode)
    expected = (len(x), len(kernel), *g.out_size)
    if dy.shape != expected:
        raise ValueError(f"output_gradient must have shape {expected}; received {dy.shape}.")
    dy = widened(dy).reshape(len(x), g.groups, len(kernel) // g.groups, prod(g.out_size))
    dkernel = (dy @ _patches(widened(x), g).swapaxes(2, 3)).sum(axis=0)
    dpatches = _flat(widened(kernel), g).swapaxes(1, 2) @ dy
    return ConvolutionGradients(
        _unpatch(dpatches, x.shape, g).astype(x.dtype),
        dkernel.reshape(kernel.shape).astype(x.dtype),
        dy.sum(axis=(0, 3)).reshape(-1).astype(x.dtype),
    )


def pad(x: ArrayLike, padding: Any, padding_mode: str = "zeros") -> Array:
    """Return `x`, `(B, C, *spatial)`, padded in its spatial dimensions as `convolve` pads it.

    >>> pad(np.array([[[1, 2, 3]]]), 2, "reflect")
    array([[[3, 2, 1, 2, 3, 2, 1]]])
    """
    x = np.asarray(x)
    if x.ndim < 3:
        raise ValueError(f"x must have axes (B, C, *spatial); received shape {x.shape}.")
    pairs = as_padding(padding, x.ndim - 2)
    _check_padding(x.shape[2:], pairs, padding_mode)
    mode: Any = PADDING_MODES[padding_mode]
    return np.pad(x, ((0, 0), (0, 0), *pairs), mode=mode)


def pad_gradient(
    padded_gradient: ArrayLike, size: Sequence[int], padding: Any, padding_mode: str = "zeros"
) -> Array:
    """Return the gradient with respect to `pad`'s argument, from that of its result.

    size: the spatial sizes before padding. Every padded position hands its gradient back to the
    position it was copied from; zeros hand back nothing.

    >>> pad_gradient(np.array([[[1, 1, 1, 1, 1, 1, 1]]]), (3,), 2, "reflect")
    array([[[2, 3, 2]]])
    """
    gradient = np.asarray(padded_gradient)
    pairs = as_padding(padding, len(size))
    _check_padding(tuple(size), pairs, padding_mode)
    expected = tuple(n + sum(pair) for n, pair in zip(size, pairs, strict=True))
    if gradient.shape[2:] != expected:
        raise ValueError(
            f"padded_gradient must have the spatial sizes {expected}; received {gradient.shape}."
        )
    for axis, (n, pair) in enumerate(zip(size, pairs, strict=True), 2):
        if padding_mode == "zeros":
            gradient = gradient.take(range(pair[0], pair[0] + n), axis=axis)
        else:
            mode: Any = PADDING_MODES[padding_mode]
            came_from = np.pad(np.arange(n), pair, mode=mode)
            summed = np.zeros((n, *np.delete(gradient.shape, axis)), gradient.dtype)
            np.add.at(summed, came_from, np.moveaxis(gradient, axis, 0))
            gradient = np.moveaxis(summed, 0, axis)
    return gradient


def as_padding(padding: Any, rank: int) -> Padding:
    """Return `padding` as `rank` pairs (before, after) of non-negative integers."""
    if isinstance(padding, str) or (is_sequence(padding) and len(padding) != rank):
        raise ValueError(
            f"padding must be one integer, or {rank} integers or pairs; received {padding!r}."
        )
    if not is_sequence(padding):
        padding = (padding,) * rank
    pairs = []
    for d, entry in enumerate(padding):
        name = f"padding[{d}]"
        if is_sequence(entry) and len(entry) != 2:
            raise ValueError(f"{name} must be an integer or a pair (before, after); got {entry!r}.")
        before, after = as_tuple(name, entry, 2, least=0)
        pairs.append((before, after))
    return tuple(pairs)


class _Geometry(NamedTuple):
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Padding
    padding_mode: str
    groups: int
    out_size: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.kernel_size)


def _geometry(
    x: Array, kernel: Array, stride: Any, padding: Any, dilation: Any, groups: Any, mode: str
) -> _Geometry:
    rank = kernel.ndim - 2
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(
            f"kernel must have 3 to 5 axes, (O, I/g, *kernel_size); received shape {kernel.shape}."
        )
    if x.ndim != kernel.ndim:
        raise ValueError(
            f"x must have {kernel.ndim} axes, (B, I, *spatial), as kernel of shape {kernel.shape} "
            f"asks for; received shape {x.shape}."
        )
    if not kernel.size:
        raise ValueError(f"kernel must have no axis of length 0; received shape {kernel.shape}.")
    groups = as_integer("groups", groups)
    if len(kernel) % groups or x.shape[1] != kernel.shape[1] * groups:
        raise ValueError(
            f"x must have {kernel.shape[1] * groups} channels and kernel a number of output "
            f"channels divisible by groups; received x of shape {x.shape}, kernel of shape "
            f"{kernel.shape}, groups={groups}."
        )
    stride, dilation = as_tuple("stride", stride, rank), as_tuple("dilation", dilation, rank)
    pairs = as_padding(padding, rank)
    _check_padding(x.shape[2:], pairs, mode)
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, kernel.shape[2:], strict=True)]
    padded = [n + sum(pair) for n, pair in zip(x.shape[2:], pairs, strict=True)]
    if any(n < e for n, e in zip(padded, extents, strict=True)):
        raise ValueError(
            f"the padded input, {tuple(padded)}, is smaller than the dilated kernel, "
            f"{tuple(extents)}."
        )
    out = tuple((n - e) // s + 1 for n, e, s in zip(padded, extents, stride, strict=True))
    return _Geometry(kernel.shape[2:], stride, dilation, pairs, mode, groups, out)


def _check_padding(size: tuple[int, ...], pairs: Padding, mode: str) -> None:
    check_choice("padding_mode", mode, PADDING_MODES)
    largest = {"reflect": -1, "circular": 0}
    for n, pair in zip(size, pairs, strict=True):
        if mode in largest and max(pair) > max(n + largest[mode], 0):
            raise ValueError(
                f"{mode} padding must be at most {max(n + largest[mode], 0)} for an input of size "
                f"{n}; received {pair}."
            )


def _patches(x: Array, g: _Geometry) -> Array:
    """Return every kernel-sized patch of `x`, `(B, g, I/g·M, positions)`, ready for one product."""
    padded = pad(x, g.padding, g.padding_mode)
    batch, channels = x.shape[:2]
    rows = channels // g.groups * prod(g.kernel_size)
    shape = (batch, g.groups, rows, prod(g.out_size))
    return windows(padded, g.kernel_size, g.stride, g.dilation).reshape(shape)


def windows(x: Array, size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Array:
    """Return every window of `x`, `(B, C, *spatial)`, as `(B, C, *size, *out)`, a view."""
    rank = len(size)
    extents = tuple(d * (k - 1) + 1 for d, k in zip(dilation, size, strict=True))
    axes: Any = tuple(range(2, x.ndim))  # the stubs know a single axis only
    found: Array = sliding_window_view(x, extents, axis=axes)
    steps = (slice(None, None, step) for step in (*stride, *dilation))
    found = found[(slice(None), slice(None), *steps)]  # (B, C, *out, *size)
    return found.transpose(0, 1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank))


def windows_gradient(
    gradient: Array, shape: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Array:
    """Return the gradient with respect to the argument of `windows`, of this shape, tap by tap."""
    rank = len(stride)
    size, out = gradient.shape[2 : 2 + rank], gradient.shape[2 + rank :]
    found = np.zeros(shape, gradient.dtype)
    tap: Any
    for tap in np.ndindex(*size):
        where: Any = (
            slice(t * d, t * d + s * (n - 1) + 1, s)
            for t, d, s, n in zip(tap, dilation, stride, out, strict=True)
        )
        found[(..., *where)] += gradient[(slice(None), slice(None), *tap)]
    return found


def _unpatch(dpatches: Array, shape: tuple[int, ...], g: _Geometry) -> Array:
    """Add the gradient of every patch back to the input it was taken from."""
    batch, channels, *size = shape
    padded = (n + sum(pair) for n, pair in zip(size, g.padding, strict=True))
    taps = dpatches.reshape(batch, channels, *g.kernel_size, *g.out_size)
    gradient = windows_gradient(taps, (batch, channels, *padded), g.stride, g.dilation)
    return pad_gradient(gradient, size, g.padding, g.padding_mode)


def _flat(kernel: Array, g: _Geometry) -> Array:
    return kernel.reshape(g.groups, len(kernel) // g.groups, -1)
