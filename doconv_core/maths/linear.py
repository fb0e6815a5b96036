"""Linear pieces of a network, and when two of them, in a row or side by side, are one convolution.

A piece takes one value, `(B, I, *spatial)`. Two kinds are enough: a scale of the channels, as a
batch norm in evaluation mode is one, and a convolution, as an average pooling is one. What is not
exact is refused, at the borders too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Any, TypeAlias

import numpy as np

from doconv_core.maths.batchnorm import fuse_batchnorm
from doconv_core.maths.geometry import Geometry
from doconv_core.maths.numeric import Array

# Why two pieces are not one convolution.
SHIFTED = "zeros are padded around a result that a bias or batch norm has shifted"
TWICE = "both kernels have several taps, and the second one is padded: the result is padded twice"
SUBSAMPLED = "the second one pads with more than zeros what the first one has subsampled"
STRIDES = "their strides differ"
SIZES = "their outputs have different sizes"
CHANNELS = "they have different numbers of channels"
MODES = "they pad with different values"
COSTLIER = "one convolution would compute more than what it would replace"

# Of so many entries, a kernel that costs more than two in a row is not even tried.
LARGE = 2**22


class NotOne(Exception):
    """Why two linear pieces are no one convolution."""


@dataclass(frozen=True, eq=False)
class Scale:
    """Each channel times a factor, and an offset added: `(C,)`, or `()` for all channels alike.

    offset: None where there is none, which is more than zeros: what the piece is, has no bias.
    """

    factor: Array
    offset: Array | None = None
    macs: int = 0

    @property
    def shifts(self) -> bool:
        """Whether zeros become something else."""
        return self.offset is not None and bool(self.offset.any())

    @property
    def passes(self) -> bool:
        """Whether it is the identity."""
        return self.offset is None and self.factor.ndim == 0 and float(self.factor) == 1


@dataclass(frozen=True, eq=False)
class Taps:
    """A convolution. kernel: `(O, I/g, *kernel_size)`. bias: `(O,)` or None. groups: g.

    geometry: its stride, dilation, and padding, in pairs. alike: whether it does to each of any
    number of channels what the kernel, `(1, 1, *kernel_size)`, says, as an average pooling does.
    """

    kernel: Array
    bias: Array | None
    geometry: Geometry
    groups: int = 1
    alike: bool = False

    @property
    def size(self) -> tuple[int, ...]:
        """The kernel size."""
        return self.kernel.shape[2:]

    @property
    def channels(self) -> tuple[int, int]:
        """`I` and `O`."""
        return self.kernel.shape[1] * self.groups, self.kernel.shape[0]

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one output position; a pooling has none."""
        return 0 if self.alike else self.kernel.size

    @property
    def shifts(self) -> bool:
        """Whether zeros become something else."""
        return self.bias is not None and bool(self.bias.any())

    @property
    def pads(self) -> tuple[tuple[int, int], ...]:
        """How much is padded at both ends of each dimension; less than zero where some is cropped.

        Cropped at the end alone, as far as no window would reach.
        """
        pairs: Any = self.geometry.padding  # of which none is in words
        return pairs  # type: ignore[no-any-return]

    @property
    def is_padded(self) -> bool:
        """Whether anything is padded."""
        return any(pad > 0 for pair in self.pads for pad in pair)

    @property
    def extent(self) -> tuple[int, ...]:
        """How many positions the kernel covers."""
        pairs = zip(self.size, self.geometry.dilation, strict=True)
        return tuple(d * (k - 1) + 1 for k, d in pairs)


Piece: TypeAlias = Scale | Taps
UNIT = Scale(np.ones(()))


def normalizing(channels: int, **norm: Any) -> Scale:
    """Return a batch norm of inference, by `fuse_batchnorm`'s names, as the scale that it is.

    Raises ValueError where a shape is not `(channels,)`.

    >>> normalizing(1, mean=np.array([2.0]), variance=np.array([4.0]), epsilon=0).offset
    array([-1.])
    """
    return Scale(*fuse_batchnorm(np.ones(channels), None, **norm))


def centred(taps: Taps) -> Taps:
    """Return a convolution whose centre meets each position of its input: so much is padded.

    Of an even number of positions, that is the first of the two in the middle.

    >>> centred(Taps(np.ones((1, 1, 4)), None, Geometry((1,), (1,), ((0, 0),)))).pads
    ((1, 2),)
    """
    pads = tuple(((e - 1) // 2, e // 2) for e in taps.extent)
    return replace(taps, geometry=replace(taps.geometry, padding=pads))


def then(first: Piece, second: Piece, *, any_cost: bool = False) -> Piece:
    """Return one piece that computes `second(first(x))`.

    any_cost: whether also a large one that would compute more than both. Raises NotOne where there
    is none that does, at the borders too.

    >>> one = Geometry((1,), (1,), ((0, 0),))
    >>> pointwise = Taps(np.array([[[2.0]]]), None, one)
    >>> then(pointwise, Taps(np.array([[[1.0, 3.0]]]), None, one)).kernel
    array([[[2., 6.]]])
    """
    first, second = _of_channels(first, second, 1, 0)
    if isinstance(second, Scale):
        return _scaled(first, second)
    if isinstance(first, Scale):
        return _scaled_before(first, second)
    return _in_a_row(first, second, any_cost)


def plus(one: Piece, other: Piece) -> Piece:
    """Return one piece that computes `one(x) + other(x)`.

    Raises NotOne where there is none that does, at the borders too.

    >>> conv = Taps(np.array([[[1.0, 5.0, 1.0]]]), None, Geometry((1,), (1,), ((1, 1),)))
    >>> plus(conv, UNIT).kernel
    array([[[1., 6., 1.]]])
    """
    if isinstance(one, Scale) and isinstance(other, Scale):
        return Scale(one.factor + other.factor, _sum(one.offset, other.offset))
    a, b = (_as_taps(x, y) for x, y in ((one, other), (other, one)))
    a, b = _of_channels(a, b, 0, 0)
    if a.channels != b.channels:
        raise NotOne(CHANNELS)
    if a.geometry.stride != b.geometry.stride:
        raise NotOne(STRIDES)
    mode, pads = _mode(a, b), list(zip(a.pads, b.pads, strict=True))
    padding: Any = tuple((max(p[0], q[0]), max(p[1], q[1])) for p, q in pads)
    sizes = [[e - sum(p) for e, p in zip(x.extent, x.pads, strict=True)] for x in (a, b)]
    if sizes[0] != sizes[1]:
        raise NotOne(SIZES)
    # The taps of both lie on a grid of this step around the same position of the input.
    step = tuple(
        gcd(*(d for d, k in steps if k > 1), *(x - y for x, y in zip(*pair, strict=True))) or 1
        for steps, pair in zip(_steps(a, b), pads, strict=True)
    )
    groups = gcd(a.groups, b.groups)
    size = tuple((s + sum(p) - 1) // d + 1 for s, p, d in zip(sizes[0], padding, step, strict=True))
    kernel = np.zeros((a.channels[1], a.channels[0] // groups, *size))
    for each in (a, b):
        where: Any = tuple(
            slice((p - q) // d, (p - q) // d + (k - 1) * (e // d) + 1, max(e // d, 1))
            for (p, _), (q, _), d, e, k in zip(
                padding, each.pads, step, each.geometry.dilation, each.size,
                strict=True,
            )
        )  # fmt: skip
        kernel[(..., *where)] += _regrouped(each, groups)
    geometry = Geometry(a.geometry.stride, step, padding, mode)
    return Taps(kernel, _sum(a.bias, b.bias), geometry, groups, a.alike)


def _sum(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def _steps(a: Taps, b: Taps) -> list[tuple[tuple[int, int], ...]]:
    """Return in each dimension both dilations, each with its number of taps."""
    each = [zip(x.geometry.dilation, x.size, strict=True) for x in (a, b)]
    return list(zip(*each, strict=True))


def _mode(a: Taps, b: Taps) -> str:
    """Return with what both pad; where one of them does not, what the other one does."""
    modes = [t.geometry.padding_mode for t in (a, b) if t.is_padded]
    if len(set(modes)) > 1:
        raise NotOne(MODES)
    return modes[0] if modes else "zeros"


def _of_channels(a: Any, b: Any, end_a: int, end_b: int) -> tuple[Any, Any]:
    """Return the pieces, with as many channels as the other has where one is of any number.

    end_a, end_b: at which of `channels` they meet. Raises NotOne where that cannot be.
    """
    ends = []
    for piece, end in ((a, end_a), (b, end_b)):
        if isinstance(piece, Scale):
            ends.append(piece.factor.size if piece.factor.ndim else None)
        else:
            ends.append(None if piece.alike else piece.channels[end])
    if None not in ends and ends[0] != ends[1]:
        raise NotOne(CHANNELS)
    known = next((end for end in ends if end is not None), None)
    if isinstance(a, Taps) and isinstance(b, Taps) and len(a.size) != len(b.size):
        raise NotOne(CHANNELS)
    return tuple(_spread(piece, known) for piece in (a, b))  # type: ignore[return-value]


def _spread(piece: Piece, channels: int | None) -> Piece:
    """Return a pooling as the convolution that it is of this many channels."""
    if channels is None or isinstance(piece, Scale) or not piece.alike:
        return piece
    kernel = np.repeat(piece.kernel, channels, 0)
    bias = None if piece.bias is None else np.repeat(piece.bias, channels)
    return Taps(kernel, bias, piece.geometry, channels)


def _as_taps(piece: Piece, like: Piece) -> Taps:
    """Return a scale as a convolution of one tap, as one that stands beside another."""
    if isinstance(piece, Taps):
        return piece
    assert isinstance(like, Taps)  # as only one of two can be a scale here
    inputs, outputs = like.channels
    rank = len(like.size)
    channels = inputs if piece.factor.ndim == 0 else piece.factor.size
    if not like.alike and (inputs != outputs or channels != inputs):
        raise NotOne(CHANNELS)
    ones = np.ones(channels)
    kernel = (ones * piece.factor).reshape(-1, 1, *(1,) * rank)
    bias = None if piece.offset is None else ones * piece.offset
    geometry = Geometry((1,) * rank, (1,) * rank, ((0, 0),) * rank)
    return Taps(kernel, bias, geometry, channels, like.alike and piece.factor.ndim == 0)


def _regrouped(taps: Taps, groups: int) -> Array:
    """Return the kernel for fewer groups, with zeros where an output read no such input."""
    kernel, parts = taps.kernel, taps.groups // groups
    outputs, inputs = kernel.shape[0] // taps.groups, kernel.shape[1]
    wide = np.zeros((groups, parts, outputs, parts, inputs, *taps.size))
    each = np.arange(parts)
    blocks = kernel.reshape(groups, parts, outputs, inputs, *taps.size)
    wide[:, each, :, each] = np.moveaxis(blocks, 1, 0)
    return wide.reshape(kernel.shape[0], parts * inputs, *taps.size)


def _scaled(first: Piece, second: Scale) -> Piece:
    """Return a piece whose result is scaled."""
    factor = second.factor
    if isinstance(first, Scale):
        offset = None if first.offset is None else first.offset * factor
        return Scale(first.factor * factor, _sum(offset, second.offset))
    assert isinstance(first, Taps)  # as there is no third kind
    bias = None if first.bias is None else first.bias * factor
    channels = first.kernel.shape[0]
    if second.offset is not None:
        bias = np.broadcast_to(_sum(bias, second.offset), channels)
    rows = np.broadcast_to(factor, channels).reshape(-1, *(1,) * (first.kernel.ndim - 1))
    return replace(first, kernel=first.kernel * rows, bias=bias)


def _scaled_before(first: Scale, second: Taps) -> Taps:
    """Return a convolution whose input is scaled."""
    zeros = second.geometry.padding_mode == "zeros" and second.is_padded
    if zeros and first.shifts:
        raise NotOne(SHIFTED)
    inputs, outputs = second.channels
    shape = (second.groups, outputs // second.groups, second.kernel.shape[1], *second.size)
    parts = second.kernel.reshape(shape)

    def by_input(values: Array) -> Array:
        each = np.broadcast_to(values, inputs).reshape(second.groups, 1, -1)
        return each.reshape(*each.shape, *(1,) * len(second.size))

    bias = second.bias
    if first.offset is not None:
        shift = (parts * by_input(first.offset)).reshape(outputs, -1).sum(1)
        bias = _sum(bias, shift)
    kernel = (parts * by_input(first.factor)).reshape(second.kernel.shape)
    return replace(second, kernel=kernel, bias=bias)


def _in_a_row(a: Taps, b: Taps, any_cost: bool) -> Taps:
    """Return the convolution that one after the other is."""
    for k, pad, own, stride in zip(a.size, b.pads, a.pads, a.geometry.stride, strict=True):
        if max(pad) > 0:
            if k > 1 or own[0] or not -stride < own[1] <= 0:
                raise NotOne(TWICE)
            if b.geometry.padding_mode != "zeros" and stride > 1:
                raise NotOne(SUBSAMPLED)
    if b.is_padded and b.geometry.padding_mode == "zeros" and a.shifts:
        raise NotOne(SHIFTED)
    mode = _mode(a, b)
    # In positions of the input, the second one's taps are as far apart as the first one strides.
    far = [s * d for s, d in zip(a.geometry.stride, b.geometry.dilation, strict=True)]
    dims = list(zip(a.size, a.geometry.dilation, b.size, far, strict=True))
    step = [gcd(*([d] if k > 1 else []), *([e] if n > 1 else [])) or 1 for k, d, n, e in dims]
    size = [
        (d * (k - 1) + e * (n - 1)) // s + 1 for (k, d, n, e), s in zip(dims, step, strict=True)
    ]
    groups = gcd(a.groups, b.groups)
    inputs, outputs = a.channels[0], b.channels[1]
    macs = outputs * inputs // groups * prod(size)
    if not any_cost and macs > max(LARGE, macs_in_a_row(a.macs, b) + b.macs):
        raise NotOne(COSTLIER)
    # Where each channel has a kernel of its own, that is all that its outputs are multiplied with.
    depthwise = b.channels == (b.groups, b.groups)
    mixed = np.multiply if depthwise else np.matmul
    left = b.kernel if depthwise else _regrouped(b, groups)
    left = left.reshape(groups, outputs // groups, -1, *b.size)
    right = _regrouped(a, groups).reshape(groups, b.channels[0] // groups, -1)
    kernel = np.zeros((groups, outputs // groups, inputs // groups, *size))
    tap: Any
    for tap in np.ndindex(*b.size):
        where: Any = tuple(
            slice(t * e // s, t * e // s + (k - 1) * (d // s) + 1, max(d // s, 1))
            for t, (k, d, _, e), s in zip(tap, dims, step, strict=True)
        )
        part = mixed(np.ascontiguousarray(left[(..., *tap)]), right)
        kernel[(..., *where)] += part.reshape(*kernel.shape[:3], *a.size)
    bias = b.bias
    if a.bias is not None:
        summed = left.reshape(*left.shape[:3], -1).sum(3)
        bias = _sum(bias, mixed(summed, a.bias.reshape(groups, -1, 1)).reshape(-1))
    padding = tuple(
        (p[0] + s * q[0], p[1] + s * q[1])
        for p, q, s in zip(a.pads, b.pads, a.geometry.stride, strict=True)
    )
    strides = tuple(s * t for s, t in zip(a.geometry.stride, b.geometry.stride, strict=True))
    geometry = Geometry(strides, tuple(step), padding, mode)
    return Taps(kernel.reshape(outputs, inputs // groups, *size), bias, geometry, groups, a.alike)


def macs_in_a_row(first: float, second: Piece) -> float:
    """Return what `first` multiply-accumulates before a piece are, for one position behind it."""
    return first * (prod(second.geometry.stride) if isinstance(second, Taps) else 1)
