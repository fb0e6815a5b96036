"""Where a convolution's taps meet its input: what must agree for equal weights to mean the same.

Frameworks say it differently: PyTorch and Gluon pad every dimension by the same on both ends, Keras
asks for "same" and puts an odd position last. Here every padding is the pair that it amounts to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from doconv_core.maths.convolve import PADDING_MODES
from doconv_core.maths.spec import as_integer, as_tuple, check_choice, is_sequence

# Positions before and after; or in words, where they depend on more than the layer knows.
Pad: TypeAlias = "tuple[int, int] | str"

# Zeros before and after in each dimension; empty for none.
Extra: TypeAlias = "tuple[tuple[int, int], ...]"

SAME = "same"  # with a stride: it depends on the size of the input


@dataclass(frozen=True)
class Geometry:
    """How a convolution's kernel moves over its input, for each spatial dimension.

    stride, dilation: integers of at least 1. padding: a pair each, positions added before and after
    the input; or words, such as "same", which equal nothing but themselves. Of a transposed
    convolution, the pair is positions taken from the full output, `(n - 1) * stride + extent`;
    a negative number adds some. padding_mode: with what the input is padded, one of PyTorch's
    words. Raises TypeError or ValueError for anything else.

    >>> here, there = Geometry((1,), (1,), ((1, 1),)), Geometry((2,), (1,), ((1, 1),))
    >>> here.differences(there)
    {'stride': ((1,), (2,))}
    """

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[Pad, ...]
    padding_mode: str = "zeros"

    def __post_init__(self) -> None:
        """Validate every field, and store plain ints and tuples."""
        if not is_sequence(self.padding):
            raise TypeError(f"padding must be a sequence of pairs; received {self.padding!r}.")
        rank = len(self.padding)
        put = object.__setattr__
        put(self, "stride", as_tuple("stride", self.stride, rank))
        put(self, "dilation", as_tuple("dilation", self.dilation, rank))
        put(self, "padding", tuple(_as_pad(d, pad) for d, pad in enumerate(self.padding)))
        check_choice("padding_mode", self.padding_mode, PADDING_MODES)
        if not any(isinstance(pad, str) or any(pad) for pad in self.padding):
            put(self, "padding_mode", "zeros")

    def for_kernel(self, kernel_size: tuple[int, ...]) -> Geometry:
        """Return the geometry without what a kernel of this size does not feel.

        That is the dilation where it has one tap. Raises ValueError for another number of
        dimensions.
        """
        if len(kernel_size) != len(self.padding):
            raise ValueError(
                f"geometry must be of the kernel's {len(kernel_size)} dimensions; received "
                f"{len(self.padding)}."
            )
        dilation = (1 if k == 1 else d for k, d in zip(kernel_size, self.dilation, strict=True))
        return Geometry(self.stride, tuple(dilation), self.padding, self.padding_mode)

    def differences(self, other: Geometry) -> dict[str, tuple[Any, Any]]:
        """Return what differs, by name: its value here and in `other`."""
        names = ("stride", "dilation", "padding", "padding_mode")
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _as_pad(dimension: int, pad: Any) -> Pad:
    if isinstance(pad, str):
        return pad
    if not is_sequence(pad) or len(pad) != 2:
        raise TypeError(
            f"padding[{dimension}] must be a pair (before, after), or words; received {pad!r}."
        )
    before, after = (as_integer(f"padding[{dimension}]", p, least=-(2**31)) for p in pad)
    return before, after


def symmetric(padding: Sequence[int]) -> tuple[Pad, ...]:
    """Return the pairs of a padding that is the same at both ends of each dimension."""
    return tuple((p, p) for p in padding)


def same(
    kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[Pad, ...]:
    """Return the pairs of "same" padding, which keeps `ceil(n / stride)` positions.

    With stride 1 an odd position comes last. With more it depends on the input's size, so that
    there are only words for it; one tap needs no padding either way.
    """
    pads: list[Pad] = []
    for k, s, d in zip(kernel_size, stride, dilation, strict=True):
        total = (k - 1) * d
        pads.append(SAME if s > 1 and k > 1 else (total // 2, total - total // 2))
    return tuple(pads)


def settled(
    pads: Sequence[Pad],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    sizes: Sequence[int | None],
) -> tuple[Pad, ...]:
    """Return the padding for an input of these sizes, by which the last window ends at the end.

    sizes: of each dimension; None for any, where the padding stays as it is. A number after the
    input is negative where that has positions that no window reaches; so that convolutions of one
    input, of equal strides, have outputs of one size only where `extent - before - after` is equal.

    >>> settled(("same",), (3,), (2,), (1,), (8,)), settled(((0, 0),), (1,), (2,), (1,), (8,))
    (((0, 1),), ((0, -1),))
    """
    found: list[Pad] = []
    for pad, k, s, d, n in zip(pads, kernel_size, stride, dilation, sizes, strict=True):
        extent = (k - 1) * d + 1
        if n is None or (isinstance(pad, str) and pad != SAME):
            found.append(pad)
            continue
        if isinstance(pad, str):
            total = max((-(-n // s) - 1) * s + extent - n, 0)
            pad = total // 2, total - total // 2
        found.append((pad[0], pad[1] - (n + sum(pad) - extent) % s))
    return tuple(found)


def causal(kernel_size: Sequence[int], dilation: Sequence[int]) -> tuple[Pad, ...]:
    """Return the pairs of "causal" padding, by which no output sees what comes after it."""
    return tuple(((k - 1) * d, 0) for k, d in zip(kernel_size, dilation, strict=True))


def padded(pads: Sequence[Pad], uses: Iterable[Extra], mode: str = "zeros") -> tuple[Pad, ...]:
    """Return the padding of a layer whose input a layer before it pads with zeros.

    pads: the layer's own. uses: for each place that the layer has, the zeros before and after in
    each dimension, or nothing. mode: with what the layer itself pads. Of different uses, or where
    zeros meet another mode, there are only words.
    """

    def both(pad: Pad, more: tuple[int, int]) -> Pad:
        if not any(more):
            return pad
        if isinstance(pad, str) or (mode != "zeros" and any(pad)):
            return f"{pad} after zeros {more}"
        return pad[0] + more[0], pad[1] + more[1]

    own = tuple(pads)
    sums = {tuple(map(both, own, extra)) if extra else own for extra in uses} or {own}
    found = sorted(sums, key=str)
    if len(found) == 1:
        return found[0]
    return tuple(" or ".join(map(str, each)) for each in zip(*found, strict=True))


def cropped(
    padding: str, size: int, stride: int, dilation: int, output_padding: int | None
) -> tuple[int, int]:
    """Return what a transposed convolution of Keras' takes from each end of its full output.

    In one dimension. padding: "valid" or "same". output_padding: None for as much as it takes.
    """
    extent = (size - 1) * dilation + 1
    if padding == "valid":
        return 0, -(max(stride - extent, 0) if output_padding is None else output_padding)
    # Without it, n positions become n * stride.
    total = extent - (stride if output_padding is None else extent % 2 + output_padding)
    before = max(total, 0) // 2
    return before, total - before
