"""Convolutions of branches with batch norms in networks: which become such, and what they compute.

In a description such a convolution has its rule as its kind, which tells of the batch norm in it
too; what was that norm's place is empty. Taken apart it is a block of ordinary layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from doconv_core.kinds import normed
from doconv_core.kinds.normed import (
    PASSING,
    SUM_NORM,
    TRAINED,
    ZERO,
    BranchedKind,
    BranchedSpec,
    Mean,
    NormedRecipe,
    Pairs,
    obstacle,
)
from doconv_core.maths.convolve import convolve, convolve_gradient, pad, pad_gradient
from doconv_core.maths.geometry import Geometry, symmetric
from doconv_core.maths.spec import ConvSpec
from doconv_core.networks.nodes import (
    ORDINARY,
    Arrays,
    BatchNorm,
    Block,
    Concat,
    Conv,
    Leaf,
    Node,
    Pass,
    Sequence,
    replaced,
)
from doconv_core.state.file import Array, entry
from doconv_core.state.layers import LayerForm, Shape


def with_branches(body: Sequence, kind: BranchedKind) -> Sequence:
    """Return nodes with layers of a rule in the places of convolutions and their batch norms.

    Of ordinary convolutions that the rule does not leave, and whose output a batch norm alone gets.
    Raises ValueError where there are none.
    """
    after = {n: b for n, (a, b) in enumerate(pairwise(_tape(body))) if _becomes(a, b, kind)}
    if not after:
        raise ValueError(
            f"no layer becomes one of kind {kind.name!r}: none is a convolution of sizes that suit "
            "it, with a batch norm right behind."
        )
    at = (n for n, node in enumerate(_tape(body)) if node is not None)

    def change(leaf: Node) -> Node:  # which meets them in the order of the tape
        number = next(at)
        if number in after:
            norm = after[number]
            assert isinstance(leaf, Conv)  # as `_becomes` says
            assert isinstance(norm, BatchNorm)
            own = NormedRecipe(kind.name, epsilon=norm.epsilon, momentum=norm.momentum)
            return replace(leaf, kind=own)
        return Sequence() if number - 1 in after else leaf

    made: Sequence = replaced(body, change, Leaf)  # type: ignore[type-abstract]
    return made


def _tape(node: Node) -> Iterator[Node | None]:
    """Yield the leaves in order, and None wherever one does not alone get the last one's output."""
    if isinstance(node, Leaf):
        yield node
        return
    if type(node) is Sequence:
        for _, child in node.children:
            yield from _tape(child)
        return
    yield None
    parallel = isinstance(node, (Concat, Sequence))  # a layer of its own, such as `DGConv`
    rows = [each for _, each in node.children] if parallel else [
        getattr(node, each.name) for each in fields(node)  # type: ignore[arg-type]
    ]  # fmt: skip
    for row in rows:
        yield from _tape(row)
        yield None


def _becomes(conv: Node | None, norm: Node | None, kind: BranchedKind) -> bool:
    if not (isinstance(conv, Conv) and isinstance(norm, BatchNorm) and norm.affine):
        return False
    if conv.kind != ORDINARY or conv.orthonormal:
        return False
    geometry = Geometry((conv.stride,) * 2, (1, 1), symmetric(conv.pads))
    return obstacle(ConvSpec(1, 1, conv.kernel_size), geometry, kind.name) is None


def branches(conv: Conv, before: Shape) -> Branches:
    """Return what a convolution of such a kind is made of; ValueError where it gives no layer."""
    geometry = Geometry((conv.stride,) * 2, (1, 1), symmetric(conv.pads))
    own: Any = conv.kind
    spec = BranchedSpec(conv.spec(before), geometry, own.name, **dict(own.options))
    return Branches(spec, BatchNorm(own.epsilon, own.momentum), conv.bias)


@dataclass(frozen=True)
class BranchConv(Leaf):
    """A convolution in a branch. made: as its rule has it. cut: whether it sees less of the input,
    by what stands around it as a negative number.
    """

    made: normed.Conv
    bias: bool = False
    cut: bool = False

    def after(self, before: Shape) -> Shape:
        """Return the channels and the positions that the kernel takes."""
        pairs = zip(self.made.padding, self.made.around, strict=True)
        more = [sum(pad) + self.cut * sum(around) for pad, around in pairs]
        return (self.made.out_channels, *_positions(self.made, before[1:], more))

    def form(self, before: Shape) -> LayerForm:
        """Return an ordinary convolution."""
        made = self.made
        geometry = Geometry(made.stride, made.dilation, made.padding)
        return LayerForm(made.spec, bias=self.bias, geometry=geometry)

    def step(self, x: Array, arrays: Arrays, gradients: Arrays, training: bool) -> Pass:
        """Convolve with the kernel."""
        made = self.made
        cut = [(-b, -a) for b, a in made.around] if self.cut else [(0, 0)] * len(made.around)
        sizes = [n - sum(pair) for n, pair in zip(x.shape[2:], cut, strict=True)]
        inner = pad_gradient(x, sizes, cut)
        kernel = arrays["weight"].reshape(made.spec.kernel_shape)
        how: Any = {"stride": made.stride, "padding": made.padding, "dilation": made.dilation,
                    "groups": made.groups}  # fmt: skip

        def back(dy: Array) -> Array:
            dx, dkernel, dbias = convolve_gradient(inner, kernel, dy, **how)
            gradients["weight"] = dkernel.reshape(arrays["weight"].shape)
            if self.bias:
                gradients["bias"] = dbias
            return pad(dx, cut)

        return Pass(convolve(inner, kernel, arrays.get("bias"), **how), back)


@dataclass(frozen=True)
class InnerNorm(BatchNorm):
    """A batch norm with positions around its output that are what it makes of zero, in inference.

    around: before and after, in each dimension.
    """

    around: Pairs = ()

    def after(self, before: Shape) -> Shape:
        """Return the shape with these positions."""
        return (before[0], *(n + sum(p) for n, p in zip(before[1:], self.around, strict=True)))

    def step(self, x: Array, arrays: Arrays, gradients: Arrays, training: bool) -> Pass:
        """Normalize, and pad."""
        output, back = super().step(x, arrays, gradients, training)
        variance, mean = arrays["running_var"], arrays["running_mean"]
        slope = -mean / np.sqrt(variance + x.dtype.type(self.epsilon))
        zero = (arrays["beta"] + arrays["gamma"] * slope)[:, None, None]

        def through(dy: Array) -> Array:
            inside = pad_gradient(dy, x.shape[2:], self.around)
            dx, outside = back(inside), dy.sum((0, 2, 3)) - inside.sum((0, 2, 3))
            gradients["gamma"] = gradients["gamma"] + outside * slope
            gradients["beta"] = gradients["beta"] + outside
            return dx

        return Pass(pad(output - zero, self.around) + zero, through)


@dataclass(frozen=True)
class Average(Leaf):
    """An average over windows."""

    made: Mean

    def after(self, before: Shape) -> Shape:
        """Return the channels and the windows' positions."""
        return (before[0], *_positions(self.made, before[1:], [0] * len(before[1:])))

    def step(self, x: Array, arrays: Arrays, gradients: Arrays, training: bool) -> Pass:
        """Convolve with a kernel of equal taps."""
        size, channels = self.made.kernel_size, x.shape[1]
        kernel = np.full((channels, 1, *size), 1 / prod(size), x.dtype)
        how: Any = {"stride": self.made.stride, "groups": channels}

        def back(dy: Array) -> Array:
            dx: Array = convolve_gradient(x, kernel, dy, **how)[0]
            return dx

        return Pass(convolve(x, kernel, **how), back)


def _positions(made: Any, sizes: Shape, more: list[int]) -> Iterator[int]:
    """Yield how often a kernel fits into each side, with so many positions more."""
    dilation = getattr(made, "dilation", (1,) * len(sizes))
    for n, k, s, d, extra in zip(sizes, made.kernel_size, made.stride, dilation, more, strict=True):
        yield (n + extra - d * (k - 1) - 1) // s + 1


@dataclass(frozen=True)
class Branches(Block):
    """The sum of what each branch of a layer makes of the input.

    norm: what each batch norm is. bias: whether the first convolution has one.
    """

    spec: BranchedSpec
    norm: BatchNorm = field(default_factory=BatchNorm)
    bias: bool = False

    @cached_property
    def rows(self) -> list[list[tuple[str, Any]]]:
        """The nodes of each branch, in order, by name; an average has none."""
        return [[*self._row(pieces)] for pieces in self.spec.pieces.values()]

    def _row(self, pieces: tuple[normed.Piece, ...]) -> Iterator[tuple[str, Any]]:
        first = next(iter(self.spec.parts))
        for n, piece in enumerate(pieces):
            if isinstance(piece, Mean):
                yield "", Average(piece)
            elif isinstance(piece, normed.Conv):
                yield piece.name, BranchConv(piece, self.bias and piece.name == first, n == 0)
            elif piece.inner:
                behind: Any = pieces[n + 1]
                own = self.norm.epsilon, self.norm.momentum
                yield piece.name, InnerNorm(*own, around=behind.around)
            else:
                yield piece.name, self.norm

    @property
    def children(self) -> tuple[tuple[str, Node], ...]:
        """The parts, by name, in order."""
        named = [each for row in self.rows for each in row if each[0]]
        return (*named, *[(SUM_NORM, self.norm)] * (SUM_NORM in self.spec.parts))

    def after(self, before: Shape, below: Any) -> Shape:
        """Return the shape of the sum."""
        found = before
        for row in self.rows:
            found = before
            for name, node in row:
                found = below(name, node, found) if name else node.after(found)
        return below(SUM_NORM, self.norm, found) if SUM_NORM in self.spec.parts else found

    def step(self, x: Array, below: Any) -> Pass:
        """Add up what the branches make of `x`."""
        ends: list[list[Any]] = []
        total, last = np.zeros((), x.dtype), None
        for row in self.rows:
            y, backs = x, []
            for name, node in row:
                y, back = below(name, node, y) if name else node.step(y, {}, {}, False)
                backs.append(back)
            total, ends = total + y, [*ends, backs]
        if SUM_NORM in self.spec.parts:
            total, last = below(SUM_NORM, self.norm, total)

        def through(dy: Array) -> Array:
            dx, dy = np.zeros_like(x), dy if last is None else last(dy)
            for backs in ends:
                own = dy
                for back in reversed(backs):
                    own = back(own)
                dx = dx + own
            return dx

        return Pass(total, through)

    @property
    def new_weights(self) -> tuple[str, ...]:
        """The kernels that begin as new ones, by their names within the layer."""
        roles, parts = self.spec.roles, self.spec.parts
        new = (name for name in parts if roles[name] == normed.NEW)
        return tuple(entry(n, "weight") for n in new if isinstance(parts[n], normed.Conv))

    def start(self, kernel: Array) -> Mapping[str, Array | float]:
        """Return what does not start as it does alone, so that the whole computes what this does.

        kernel: of the convolution, `(O, I/g, *kernel_size)`, whose batch norm is as it starts. By
        the entries' names within the layer; a number is of all of its values.
        """
        found: dict[str, Array | float] = {}
        for name, role in self.spec.roles.items():
            conv = isinstance(self.spec.parts[name], normed.Conv)
            if role == ZERO:
                found[entry(name, "weight" if conv else "gamma")] = 0.0
            elif role == PASSING:
                found[entry(name, "gamma")] = math.sqrt(1 + self.norm.epsilon)
            elif role == TRAINED and conv:
                found[entry(name, "weight")] = self.spec.start(kernel)
        return found
