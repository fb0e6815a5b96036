"""Convolutions of parallel branches with batch norms in them: which there are, and their folding.

A rule says which branches stand in a convolution's place and that of the batch norm behind it; what
they make is added up. In evaluation a batch norm is a factor and a shift for each channel, so that
all of it is one convolution with a bias. In training each normalizes by the batch: nothing folds.

Every branch looks at the same centre: a kernel that is smaller than the layer's begins as many
positions later as it lacks taps in front. Where a batch norm stands before a kernel of several
taps, what is around its output is what it makes of zero, `beta - mean * scale`, and not zero: only
so is the whole a convolution of the padded input.
Axis letters as everywhere in this project.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from doconv_core.kinds.base import ONE_TAP, Array, Cost, Kind, Recipe, register
from doconv_core.maths.batchnorm import NOT_FINITE, NotFoldable
from doconv_core.maths.geometry import Geometry
from doconv_core.maths.linear import UNIT, Scale, Taps, centred, normalizing, plus, then
from doconv_core.maths.linear import Piece as Linear
from doconv_core.maths.separable import Folded, Normalization
from doconv_core.maths.spec import ConvSpec, as_integer, check_choice

BRANCHES, SMALL = 4, 5  # the defaults of every backend
Pairs: TypeAlias = "tuple[tuple[int, int], ...]"

# Words of which the rules are made: kernels of the layer's size; of one tap, to the layer's outputs
# or within its inputs; and of another size. A batch norm; an average over the layer's kernel size.
KERNEL, POINT, INNER, SMALLER, NORM, MEAN = "kernel", "point", "inner", "smaller", "norm", "mean"
# Branches of which there are several: like the first; along each axis; as `SMALL_KERNELS` says.
EACH, AXES, DILATED = "each", "axes", "dilated"
DENSE_BRANCH, POINTWISE = ("dense", KERNEL, NORM), ("pointwise", POINT, NORM)
IDENTITY = "identity"

# Each branch is its name and what stands in it, in order. That of the trained kernel comes first.
RULES: dict[str, tuple[tuple[str, ...], ...]] = {
    "repvgg": (DENSE_BRANCH, POINTWISE, (IDENTITY, NORM)),
    "mobileone": ((EACH,), POINTWISE, (IDENTITY, NORM)),
    "acnet": (DENSE_BRANCH, (AXES,)),
    "dbb": (
        DENSE_BRANCH,
        POINTWISE,
        ("sequence", INNER, NORM, KERNEL, NORM),
        ("average", POINT, NORM, MEAN, NORM),
    ),
    "qarepvgg": (DENSE_BRANCH, ("pointwise", POINT), (IDENTITY,)),
    "replknet": (DENSE_BRANCH, ("small", SMALLER, NORM)),
    "unireplknet": (DENSE_BRANCH, (DILATED,)),
}
SUMMED = ("qarepvgg",)  # rules with a batch norm behind the sum
SUM_NORM = "norm"
OPTIONS: dict[str, tuple[str, ...]] = {"mobileone": ("branches",), "replknet": ("small",)}
SOURCES = {
    "repvgg": "RepVGG, arXiv 2101.03697",
    "mobileone": "MobileOne, arXiv 2206.04040",
    "acnet": "ACNet, arXiv 1908.03930",
    "dbb": "Diverse Branch Block, arXiv 2103.13425",
    "qarepvgg": "QARepVGG, arXiv 2212.01593",
    "replknet": "RepLKNet, arXiv 2203.06717",
    "unireplknet": "UniRepLKNet, arXiv 2311.15599",
}
# UniRepLKNet's small kernels beside a large one: size and dilation of each.
SMALL_KERNELS = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}

# Why a convolution is left.
EVEN = "its kernel has an even size, and no centre at which smaller ones could stand"
BY_INPUT = "its padding depends on the input's size, and so does where smaller kernels would stand"
ONE_AXIS = "it has one dimension, along which a kernel is no smaller one"
OTHER_PADDING = "it pads with other values than zeros, which not every branch would meet alike"
DILATED_MEAN = "it is dilated, which an average of windows is in no framework"

# What a part begins as, where a trained convolution and its batch norm are taken over.
TRAINED, NEW, ZERO, PASSING = "trained", "new", "zero", "passing"


class Conv(NamedTuple):
    """A convolution in a branch.

    padding: its own zeros, before and after in each dimension. around: what its input gets before
    that, as many positions that are the zero of the batch norm before it; or, where the number is
    negative, so many fewer.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Pairs
    around: Pairs

    @property
    def spec(self) -> ConvSpec:
        """Its sizes."""
        return ConvSpec(self.in_channels, self.out_channels, self.kernel_size, self.groups)


class Norm(NamedTuple):
    """A batch norm in a branch, or behind the sum.

    inner: whether what it makes of zero, by its statistics before the batch, is to stand around
    what it makes of the input.
    """

    name: str
    channels: int
    inner: bool = False


class Mean(NamedTuple):
    """An average over windows, without zeros of its own. around: as of `Conv`."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    around: Pairs


Piece: TypeAlias = "Conv | Norm | Mean"


class Kernel(NamedTuple):
    """What a convolution computes with. weight: `(O, I/g, *kernel_size)`. bias: `(O,)`, or None."""

    weight: ArrayLike
    bias: ArrayLike | None = None


@dataclass(frozen=True)
class BranchedSpec:
    """The sizes of a layer of branches with batch norms, and all parts that it has.

    conv: the sizes of the convolution that it folds to; geometry: where that meets its input. rule:
    one of `RULES`. branches: how many kernels of the layer's size MobileOne has. small: the size of
    RepLKNet's small kernel.
    Raises TypeError or ValueError for what gives no layer.

    >>> geometry = Geometry((1,), (1,), ((1, 1),))
    >>> list(BranchedSpec(ConvSpec(4, 4, (3,)), geometry, "repvgg").parts)
    ['dense_conv', 'dense_norm', 'pointwise_conv', 'pointwise_norm', 'identity_norm']
    """

    conv: ConvSpec
    geometry: Geometry
    rule: str
    branches: int = BRANCHES
    small: int = SMALL

    def __post_init__(self) -> None:
        """Validate every field."""
        check_choice("rule", self.rule, RULES)
        check_options({"branches": self.branches, "small": self.small})
        reason = obstacle(self.conv, self.geometry, self.rule, self.small)
        if reason is not None:
            raise ValueError(f"there is no layer of rule {self.rule!r} of this size: {reason}.")

    @cached_property
    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        """What stands in each branch, by the branch's name."""
        return {name: tuple(self._made(name, *row)) for name, *row in self._rows()}

    @cached_property
    def parts(self) -> dict[str, Conv | Norm]:
        """The convolutions and batch norms, by name, in order."""
        every = [each for pieces in self.pieces.values() for each in pieces]
        if self.rule in SUMMED:
            every.append(Norm(SUM_NORM, self.conv.out_channels))
        return {each.name: each for each in every if not isinstance(each, Mean)}

    @cached_property
    def roles(self) -> dict[str, str]:
        """What each part begins as where a trained convolution and batch norm are taken over.

        "trained": as they are. "new": as the framework makes it. "zero": with a gamma, or kernel,
        of zero, so that what its branch adds is, too. "passing": a batch norm of the trained one's
        statistics that returns what has them as it is.
        """
        first, *others = self.pieces.values()
        conv, norm = (each.name for each in first if not isinstance(each, Mean))
        found = dict.fromkeys(self.parts, NEW) | {conv: TRAINED, norm: TRAINED}
        ends = (pieces[-1] for pieces in others if pieces)
        found |= {end.name: ZERO for end in ends if not isinstance(end, Mean)}
        return found | ({norm: PASSING, SUM_NORM: TRAINED} if self.rule in SUMMED else {})

    @property
    def trained_norm(self) -> str:
        """The name of the batch norm that is the trained one."""
        roles = self.roles.items()
        return next(n for n, role in roles if role == TRAINED and isinstance(self.parts[n], Norm))

    @property
    def keeps_kernel(self) -> bool:
        """Whether a trained kernel is the first branch's as it is."""
        return all(self.pieces.values())

    def start(self, kernel: Array) -> Array:
        """Return the first branch's kernel where the whole is to compute what this kernel does.

        kernel: `(O, I/g, *kernel_size)`. That is the kernel itself, but where a branch passes its
        input on without a batch norm: less that branch.
        """
        if self.keeps_kernel:
            return kernel
        whole = Taps(kernel.astype(np.float64), None, self.geometry, self.conv.groups)
        rest = plus(whole, Scale(-UNIT.factor))
        assert isinstance(rest, Taps)  # as one of both is
        return rest.kernel.astype(kernel.dtype)

    def fold(self, values: Mapping[str, Kernel | Normalization]) -> Folded:
        """Return the kernel, `(O, I/g, *kernel_size)`, and bias of the one convolution, in float64.

        values: of each part by its name. Raises NotFoldable where the result is not finite.
        """
        with np.errstate(all="ignore"):  # what is not finite is refused below
            kernel, bias = self.added_up(values)
        if not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
            raise NotFoldable(NOT_FINITE)
        return Folded(kernel, bias)

    def added_up(self, values: Mapping[str, Kernel | Normalization]) -> tuple[Array, Array]:
        """Return what `fold` does, finite or not."""
        whole = reduce(plus, (self._branch(row, values) for row in self.pieces.values()))
        if self.rule in SUMMED:
            whole = then(whole, self._linear(Norm(SUM_NORM, self.conv.out_channels), values))
        assert isinstance(whole, Taps)  # as the first branch is
        assert whole.bias is not None  # as a batch norm is in it
        return whole.kernel, whole.bias

    def _branch(
        self, pieces: tuple[Piece, ...], values: Mapping[str, Kernel | Normalization]
    ) -> Linear:
        """Return a branch as one piece, around the same centre as the others."""
        row = (self._linear(each, values) for each in pieces)
        start: Linear = UNIT
        whole = reduce(partial(then, any_cost=True), row, start)
        return centred(whole) if isinstance(whole, Taps) else whole

    def _linear(self, piece: Piece, values: Mapping[str, Kernel | Normalization]) -> Linear:
        """Return what a piece computes, without any padding."""
        none, ones = ((0, 0),) * self.conv.rank, (1,) * self.conv.rank
        if isinstance(piece, Norm):
            return normalizing(piece.channels, **values[piece.name]._asdict())
        if isinstance(piece, Mean):
            kernel = np.full((1, 1, *piece.kernel_size), 1 / prod(piece.kernel_size))
            return Taps(kernel, None, Geometry(piece.stride, ones, none), alike=True)
        given: Any = values[piece.name]
        kernel = np.asarray(given.weight, np.float64).reshape(piece.spec.kernel_shape)
        bias = None if given.bias is None else np.asarray(given.bias, np.float64)
        return Taps(kernel, bias, Geometry(piece.stride, piece.dilation, none), piece.groups)

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        """Yield the branches: name, words, and of a smaller kernel its size and dilation."""
        sizes, rank = self.conv.kernel_size, self.conv.rank
        for name, *words in RULES[self.rule]:
            if name == EACH:
                for number in range(self.branches):
                    yield f"dense{number}", (KERNEL, NORM)
            elif name == AXES:
                for axis in range(rank):
                    own = tuple(k if d == axis else 1 for d, k in enumerate(sizes))
                    yield f"axis{axis}", (SMALLER, NORM), own
            elif name == DILATED:
                for number, (size, step) in enumerate(SMALL_KERNELS[sizes[0]]):
                    yield f"small{number}", (SMALLER, NORM), (size,) * rank, step
            elif self._has(name):
                yield name, tuple(words), (self.small,) * rank

    def _has(self, name: str) -> bool:
        """Return whether a branch stands in a layer of these sizes.

        One that passes its input on, where the output has the same sizes, each position in its
        place; a pointwise one, where the kernel is not pointwise itself.
        """
        if name != IDENTITY:
            return name != "pointwise" or self.conv.taps > 1
        ones, none = (1,) * self.conv.rank, ((0, 0),) * self.conv.rank
        same = self.conv.in_channels == self.conv.out_channels
        return same and self.geometry.stride == ones and self._pads(ones) == none

    def _pads(self, size: tuple[int, ...], step: int = 1) -> Pairs:
        """Return the padding with which a smaller kernel has the layer's centre."""
        return smaller_padding(self.conv.kernel_size, self.geometry, size, step)

    def _made(
        self, name: str, words: tuple[str, ...], size: tuple[int, ...] = (), step: int = 1
    ) -> Iterator[Piece]:
        """Yield what stands in a branch. size, step: of a smaller kernel, and its dilation."""
        conv, geometry, ones = self.conv, self.geometry, (1,) * self.conv.rank
        none, channels = ((0, 0),) * conv.rank, conv.in_channels
        count = {word: 0 for word in ("conv", "norm")}

        def part(word: str) -> str:
            count[word] += 1
            return f"{name}_{word}{count[word] if count[word] > 1 else ''}"

        for number, word in enumerate(words):
            inner = not {KERNEL, MEAN}.isdisjoint(words[number + 1 :])  # at each position alone
            if word == NORM:
                yield Norm(part("norm"), channels, inner)
                continue
            if word == MEAN:
                yield Mean(conv.kernel_size, geometry.stride, self._pads(conv.kernel_size))
                continue
            own = {KERNEL: conv.kernel_size, SMALLER: size}.get(word, ones)
            dilation = ones if own == ones else tuple(d * step for d in geometry.dilation)
            pads = none if inner else self._pads(own, step)
            padding = none if number else tuple((max(0, b), max(0, a)) for b, a in pads)
            around = tuple((b - p, a - q) for (b, a), (p, q) in zip(pads, padding, strict=True))
            after = channels if word == INNER else conv.out_channels
            stride = ones if inner else geometry.stride
            yield Conv(
                part("conv"), channels, after, own, conv.groups, stride, dilation, padding, around
            )
            channels = after


def smaller_padding(
    kernel_size: tuple[int, ...], geometry: Geometry, size: tuple[int, ...], step: int = 1
) -> Pairs:
    """Return the padding with which a kernel of odd sizes has the centre of a larger one.

    geometry: of the larger one. step: by how much more the smaller one is dilated. Negative numbers
    are positions of the input that it does not see.

    >>> smaller_padding((3,), Geometry((1,), (1,), ((1, 1),)), (1,))
    ((0, 0),)
    """
    found = []
    for k, s, d, pad in zip(kernel_size, size, geometry.dilation, geometry.padding, strict=True):
        assert not isinstance(pad, str)  # as `obstacle` says
        cut = ((k - 1) - (s - 1) * step) * d // 2
        found.append((pad[0] - cut, pad[1] - cut))
    return tuple(found)


def obstacle(conv: ConvSpec, geometry: Geometry, rule: str, small: int = SMALL) -> str | None:
    """Return why a convolution is left by a rule; None where it is not."""
    size, ones = conv.kernel_size, (1,) * conv.rank
    if conv.taps == 1 and rule != "mobileone":
        return ONE_TAP
    if any(k % 2 == 0 for k in size):
        return EVEN
    if any(isinstance(pad, str) for pad in geometry.padding):
        return BY_INPUT
    cut = any(min(pair) < 0 for pair in smaller_padding(size, geometry, ones))
    if geometry.padding_mode != "zeros" and (rule == "dbb" or cut):
        return OTHER_PADDING
    if rule == "acnet" and conv.rank == 1:
        return ONE_AXIS
    if rule == "dbb" and any(d > 1 < k for k, d in zip(size, geometry.dilation, strict=True)):
        return DILATED_MEAN
    if rule == "replknet" and (min(size) < small or max(size) == small):
        return f"its kernel_size {size} is not larger than the small one, small={small}"
    if rule == "unireplknet" and (len({*size}) > 1 or size[0] not in SMALL_KERNELS):
        names = ", ".join(map(str, SMALL_KERNELS))
        return f"its kernel_size {size} is none of those with small kernels: {names}"
    return None


def check_options(options: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for options that suit no layer."""
    for name, value in options.items():
        if as_integer(name, value) % 2 == 0 and name == "small":
            raise ValueError(f"small must be odd, so that it has a centre; received small={value}.")


def training_cost(spec: BranchedSpec, positions: int) -> Cost:
    """Return what the parts of a layer cost, those of batch norms among the parameters.

    positions: output positions of all images.
    """
    parameters = macs = 0
    for part in spec.parts.values():
        if isinstance(part, Norm):
            parameters += 2 * part.channels
            continue
        weights = prod(part.spec.kernel_shape)
        parameters += weights
        finer = prod(spec.geometry.stride) // prod(part.stride)  # before the stride
        macs += weights * positions * finer
    return Cost(parameters, macs)


@dataclass(frozen=True)
class NormedRecipe(Recipe):
    """How a network's convolution of branches is made, in the place of a batch norm, too.

    options: of its rule, by name. epsilon, momentum: of every batch norm, the latter as the new
    batch's weight.
    """

    options: tuple[tuple[str, Any], ...] = ()
    epsilon: float = 1e-5
    momentum: float = 0.1


class BranchedKind(Kind):
    """A rule of branches with batch norms, in the place of a convolution and its batch norm."""

    def __init__(self, name: str) -> None:
        self.name, self.options, self.variants = name, OPTIONS.get(name, ()), {name: {}}

    def recipe(self, word: str, *args: Any, **options: Any) -> Recipe:
        """Return how a network's convolution of this kind is made; TypeError for other options."""
        self.check_taken(options)
        return NormedRecipe(word, tuple(sorted(options.items())), *args)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError for options that suit no layer."""
        check_options(options)


KINDS = tuple(register(BranchedKind(name)) for name in RULES)
