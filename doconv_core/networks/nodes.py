"""What a network is made of: a few kinds of nodes, as data, that a function of a family composes.

A node holds what a reader of the paper's table would see. Input channels and sizes are not in it:
they follow from what comes before, and `shapes.infer` tells them. Of these its kind says the rest:
the shape it gives, what it computes in NumPy, and the gradient, what it is in a state and its cost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from math import prod
from re import sub
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np

from doconv_core.kinds.base import Recipe, composed_by, recipe
from doconv_core.kinds.dgc import (
    GATE_FACTOR,
    HEADS,
    SQUEEZE_RATE,
    DGConvSpec,
    HeadsPass,
    dynamic_heads,
)
from doconv_core.maths.convolve import (
    convolve,
    convolve_gradient,
    pad_gradient,
    windows,
    windows_gradient,
)
from doconv_core.maths.geometry import Geometry, symmetric
from doconv_core.maths.spec import ConvSpec, check_choice
from doconv_core.state.file import Array
from doconv_core.state.layers import BatchNormSpec, LayerForm, LinearSpec, Shape

Arrays: TypeAlias = dict[str, Array]

ACTIVATIONS = ("relu", "relu6", "hard_swish", "hard_sigmoid", "tanh")
POOLS = ("max", "average")
FAN_IN, FAN_OUT = "fan_in", "fan_out"
SHORTCUT = "shortcut"  # the name of a residual's other branch among its children
ORDINARY = recipe()


class Unfit(Exception):
    """Why a node cannot be where it is; what follows its path in a message."""


class Pass(NamedTuple):
    """What a node makes of an input, and `back`: from the output's gradient to the input's."""

    output: Array
    back: Callable[[Array], Array]


class Leaf(ABC):
    """A node without children. Shapes are of one image: `(C, H, W)`, or `(features,)`."""

    children: ClassVar[Children] = ()

    def after(self, before: Shape) -> Shape:
        """Return the shape of the output, from that of the input; `Unfit` where there is none."""
        return before

    def form(self, before: Shape) -> LayerForm | None:
        """Return what the node is in a state; None where it has no arrays."""
        return None

    @abstractmethod
    def step(self, x: Array, arrays: Arrays, gradients: Arrays, training: bool) -> Pass:
        """Return what the node makes of `x`.

        arrays: its own, by name. gradients: where the pass back puts those of what is trained.
        """

    @property
    def word(self) -> str:
        """The name of its kind in a table of costs."""
        return sub("(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def per_input(self) -> int:
        """The operations for each input, by BSConv's rule, of a layer without a weight."""
        return 0


class Block(ABC):
    """A node of others, which have the arrays and their gradients.

    below: takes a child's name, the child, and a shape, or an input; returns what it makes of that.
    """

    @property
    @abstractmethod
    def children(self) -> Children:
        """The nodes in it, by the names that they have in paths."""

    @abstractmethod
    def after(self, before: Shape, below: Callable[[str, Node, Shape], Shape]) -> Shape:
        """Return the shape of the output, from that of the input; `Unfit` where there is none."""

    @abstractmethod
    def step(self, x: Array, below: Callable[[str, Node, Array], Pass]) -> Pass:
        """Return what the node makes of `x`."""


Node: TypeAlias = Leaf | Block
Children: TypeAlias = tuple[tuple[str, Node], ...]


def _check_image(shape: Shape) -> None:
    if len(shape) != 3:
        raise Unfit(f"needs an image (C, H, W); received the shape {shape}.")


def _positions(size: int, kernel: int, stride: int, around: int) -> int:
    """Return how often a window fits into a side of an image."""
    if size + 2 * around < kernel:
        raise Unfit(
            f"needs at least {kernel - 2 * around} rows and columns; received {size}. The "
            "network's input is too small."
        )
    return (size + 2 * around - kernel) // stride + 1


@dataclass(frozen=True)
class Conv(Leaf):
    """A convolution. padding: on every side; None for half the kernel, rounded down.

    groups: 0 for a depthwise convolution, as many as there are input channels. orthonormal: of a
    convolution of one tap, whether training is to keep its weight's rows orthonormal, as it does
    those of BSConv-S's first pointwise convolution. kind: how it is made, of several taps.
    """

    channels: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: int | None = None
    groups: int = 1
    bias: bool = False
    kind: Recipe = ORDINARY
    orthonormal: bool = False

    @property
    def pads(self) -> tuple[int, int]:
        """The padding of both dimensions, on either side."""
        rows, columns = self.kernel_size
        around = self.padding
        return (rows // 2, columns // 2) if around is None else (around, around)

    def spec(self, before: Shape) -> ConvSpec:
        """Return the sizes of the convolution as an ordinary one."""
        return ConvSpec(before[0], self.channels, self.kernel_size, self.groups or before[0])

    def after(self, before: Shape) -> Shape:
        """Return the channels and the positions that the kernel takes."""
        _check_image(before)
        sizes = zip(before[1:], self.kernel_size, self.pads, strict=True)
        return (self.channels, *(_positions(n, k, self.stride, p) for n, k, p in sizes))

    def form(self, before: Shape) -> LayerForm:
        """Return an ordinary convolution, or one whose kernel is composed."""
        spec = self.spec(before)
        geometry = Geometry((self.stride,) * 2, (1, 1), symmetric(self.pads))
        kind = composed_by(self.kind, spec)
        if kind is None:
            return LayerForm(spec, bias=self.bias, geometry=geometry)
        return LayerForm(kind.spec_by(self.kind, spec), kind.name, self.bias, geometry=geometry)

    def step(self, x: Array, arrays: Arrays, gradients: Arrays, training: bool) -> Pass:
        """Convolve with the kernel, which a composed layer composes of its weights."""
        conv = self.spec(x.shape[1:])
        kind = composed_by(self.kind, conv)
        weights = {name: array for name, array in arrays.items() if name != "bias"}
        if kind is None:
            kernel = weights["weight"].reshape(conv.kernel_shape)
        else:
            kernel = kind.compose(weights, kind.spec_by(self.kind, conv))
        how: Any = {"stride": self.stride, "padding": self.pads, "groups": conv.groups}

        def back(dy: Array) -> Array:
            dx, dkernel, dbias = convolve_gradient(x, kernel, dy, **how)
            if kind is None:
                gradients["weight"] = dkernel.reshape(weights["weight"].shape)
            else:
                gradients.update(kind.gradient(weights, dkernel, kind.spec_by(self.kind, conv)))
            if "bias" in arrays:
                gradients["bias"] = dbias
            return dx

        return Pass(convolve(x, kernel, arrays.get("bias"), **how), back)

    @property
    def word(self) -> str:
        """How it is made."""
        return self.kind.name


@dataclass(frozen=True)
class DynamicHeads(Leaf):
    """The heads of a dynamic group convolution; the rest as in `Conv` and `DGConvSpec`.

    lasso: the weight of their saliencies in the loss whose gradients are asked for.
    """

    channels: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: int | None = None
    heads: int = HEADS
    squeeze_rate: int = SQUEEZE_RATE
    gate_factor: float = GATE_FACTOR
    lasso: float = 0

    @property
    def conv(self) -> Conv:
        """An ordinary convolution of the same sizes."""
        return Conv(self.channels, self.kernel_size, self.stride, self.padding)

    def spec(self, before: Shape) -> DGConvSpec:
        """Return the sizes of the layer."""
        own = self.heads, self.squeeze_rate, self.gate_factor
        return DGConvSpec(before[0], self.channels, self.kernel_size, *own)

    def after(self, before: Shape) -> Shape:
        """Return the channels and the positions that the kernel takes."""
        return self.conv.after(before)

    def form(self, before: Shape) -> LayerForm:
        """Return the heads, with the geometry of their convolutions."""
        return LayerForm(self.spec(before), geometry=self.conv.form(before).geometry)

    def step(self, x: Array, arrays: Arrays, gradients: Arrays, training: bool) -> Pass:
        """Let each head choose its channels and convolve them."""
        found = self.passed(x, arrays)

        def back(dy: Array) -> Array:
            dx, own = found.back(dy, self.lasso)
            gradients.update(own)
            return dx

        return Pass(found.output, back)

    def passed(self, x: Array, arrays: Arrays) -> HeadsPass:
        """Return what the heads make of `x`, and how salient channels are."""
        how: Any = {"stride": self.stride, "padding": self.conv.pads}
        return dynamic_heads(x, arrays, self.spec(x.shape[1:]), **how)


@dataclass(frozen=True)
class BatchNorm(Leaf):
    """A batch norm. momentum: the new batch's weight. affine: whether it has scale and shift."""

    per_input = 2
    epsilon: float = 1e-5
    momentum: float = 0.1
    affine: bool = True

    def form(self, before: Shape) -> LayerForm:
        """Return a batch norm of as many channels."""
        spec = BatchNormSpec(before[0], self.epsilon, self.momentum)
        return LayerForm(spec, bias=self.affine, scale=self.affine)

    def step(self, x: Array, arrays: Arrays, gradients: Arrays, training: bool) -> Pass:
        """Take in training the batch's own mean and biased variance, else the running ones."""
        axes = (0, *range(2, x.ndim))

        def along_channels(vector: Array) -> Array:
            return vector.reshape(-1, *(1,) * (x.ndim - 2))

        gamma = along_channels(arrays.get("gamma", np.ones(x.shape[1], x.dtype)))
        if training:
            mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        else:
            mean, variance = (along_channels(arrays[f"running_{s}"]) for s in ("mean", "var"))
        factor: Array = 1 / np.sqrt(variance + x.dtype.type(self.epsilon))
        normal = (x - mean) * factor
        output = normal * gamma
        if self.affine:
            output = output + along_channels(arrays["beta"])

        def back(dy: Array) -> Array:
            dx = dy * gamma
            if training:  # the statistics depend on x too
                along = (dx * normal).mean(axes, keepdims=True)
                dx = dx - dx.mean(axes, keepdims=True) - normal * along
            if self.affine:
                gradients.update(gamma=(dy * normal).sum(axes), beta=dy.sum(axes))
            return dx * factor

        return Pass(output, back)

    def running(self, x: Array, arrays: Arrays) -> Arrays:
        """Return the running statistics after a batch, as PyTorch has them: unbiased variance."""
        axes, count = (0, *range(2, x.ndim)), x.size // x.shape[1]
        unbiased = count / max(count - 1, 1)
        new = {"running_mean": x.mean(axes), "running_var": x.var(axes) * unbiased}
        return {
            name: (1 - self.momentum) * arrays[name] + self.momentum * each
            for name, each in new.items()
        }


@dataclass(frozen=True)
class Activation(Leaf):
    """An activation function, one of `ACTIVATIONS`."""

    name: str

    def __post_init__(self) -> None:
        """Check the name."""
        check_choice("name", self.name, ACTIVATIONS)

    def step(self, x: Array, arrays: Arrays, gradients: Arrays, training: bool) -> Pass:
        """tanh; ReLU; ReLU6 = min(ReLU, 6); hard sigmoid = ReLU6(x + 3) / 6; hard swish: x · it."""
        name, zero, six = self.name, x.dtype.type(0), x.dtype.type(6)
        if name == "relu":
            return Pass(np.maximum(x, zero), lambda dy: dy * (x > 0))
        if name == "relu6":
            return Pass(np.clip(x, zero, six), lambda dy: dy * ((x > 0) & (x < 6)))
        if name == "tanh":
            output = np.tanh(x)
            return Pass(output, lambda dy: dy * (1 - output**2))
        sigmoid = np.clip(x + six / 2, zero, six) / six
        slope = ((x > -3) & (x < 3)) / six
        if name == "hard_sigmoid":
            return Pass(sigmoid, lambda dy: dy * slope)
        return Pass(x * sigmoid, lambda dy: dy * (sigmoid + x * slope))

    @property
    def word(self) -> str:
        """The function's name."""
        return self.name

    @property
    def per_input(self) -> int:
        """One of a ReLU."""
        return 1 if self.name == "relu" else 0


@dataclass(frozen=True)
class Pool(Leaf):
    """A pooling layer. name: "max" or "average". Its windows do not count what is padded."""

    per_input = 1
    name: str
    size: int
    stride: int
    padding: int = 0

    def __post_init__(self) -> None:
        """Check the name, and that every window meets the image."""
        check_choice("name", self.name, POOLS)
        if not 0 <= 2 * self.padding <= self.size:
            raise ValueError(
                "padding must be at most half of a pool's size; received "
                f"padding={self.padding}, size={self.size}."
            )

    def after(self, before: Shape) -> Shape:
        """Return the channels and the positions of the windows."""
        _check_image(before)
        sides = (_positions(n, self.size, self.stride, self.padding) for n in before[1:])
        return (before[0], *sides)

    def step(self, x: Array, arrays: Arrays, gradients: Arrays, training: bool) -> Pass:
        """Take of each window the largest entry, the first of equals; or the image's mean."""
        seen = self._windows(x, -np.inf)  # (B, C, *out, taps)
        if self.name == "max":
            taps = np.arange(seen.shape[-1])
            shares = (taps == seen.argmax(-1, keepdims=True)).astype(x.dtype)
        else:
            inside = self._windows(np.ones((1, 1, *x.shape[2:]), x.dtype), 0)
            shares = np.broadcast_to(inside / inside.sum(-1, keepdims=True), seen.shape)

        def back(dy: Array) -> Array:
            taps = np.moveaxis(dy[..., None] * shares, -1, 2)
            taps = taps.reshape(*dy.shape[:2], *self.kernel_size, *dy.shape[2:])
            padded = (*x.shape[:2], *(n + 2 * self.padding for n in x.shape[2:]))
            dx = windows_gradient(taps, padded, (self.stride,) * 2, (1, 1))
            return pad_gradient(dx, x.shape[2:], self.padding)

        return Pass((shares * np.where(shares > 0, seen, 0)).sum(-1), back)

    def _windows(self, x: Array, outside: float) -> Array:
        around = (self.padding, self.padding)
        padded = np.pad(x, ((0, 0), (0, 0), around, around), constant_values=outside)
        found = windows(padded, self.kernel_size, (self.stride,) * 2, (1, 1))
        flat = found.reshape(*x.shape[:2], -1, *found.shape[4:])
        return np.ascontiguousarray(np.moveaxis(flat, 2, -1))  # as the order is that of sums

    @property
    def kernel_size(self) -> tuple[int, int]:
        """The size of a window."""
        return (self.size, self.size)

    @property
    def word(self) -> str:
        """The kind of pooling."""
        return f"{self.name}_pool"


@dataclass(frozen=True)
class GlobalPool(Leaf):
    """The mean over all positions, `(B, C, 1, 1)`."""

    per_input = 1

    def after(self, before: Shape) -> Shape:
        """Return the channels, of one position."""
        _check_image(before)
        return (before[0], 1, 1)

    def step(self, x: Array, arrays: Arrays, gradients: Arrays, training: bool) -> Pass:
        """Take the mean."""
        share = x.dtype.type(1 / (x.shape[2] * x.shape[3]))
        output = x.mean((2, 3), keepdims=True)
        return Pass(output, lambda dy: np.broadcast_to(dy * share, x.shape))


@dataclass(frozen=True)
class Flatten(Leaf):
    """All but the batch axis in one, in the order channels, height, width."""

    def after(self, before: Shape) -> Shape:
        """Return how many entries there are."""
        return (prod(before),)

    def step(self, x: Array, arrays: Arrays, gradients: Arrays, training: bool) -> Pass:
        """Reshape the input."""
        return Pass(x.reshape(len(x), -1), lambda dy: dy.reshape(x.shape))


@dataclass(frozen=True)
class Dropout(Leaf):
    """In training, each entry is zero with probability `rate`, and the others are scaled up."""

    rate: float

    def step(self, x: Array, arrays: Arrays, gradients: Arrays, training: bool) -> Pass:
        """Do nothing, in inference; in training it is random: no evaluation can agree on it."""
        if training and self.rate:
            raise ValueError(
                "dropout is random in training, so that no output is the right one; evaluate with "
                f"training=False, or a network with rate 0; received rate={self.rate}."
            )
        return Pass(x, lambda dy: dy)


@dataclass(frozen=True)
class Linear(Leaf):
    """A linear (dense) layer."""

    features: int
    bias: bool = True

    def after(self, before: Shape) -> Shape:
        """Return the features."""
        if len(before) != 1:
            raise Unfit(f"needs a vector; received the shape {before}.")
        return (self.features,)

    def form(self, before: Shape) -> LayerForm:
        """Return a linear layer."""
        return LayerForm(LinearSpec(before[0], self.features), bias=self.bias)

    def step(self, x: Array, arrays: Arrays, gradients: Arrays, training: bool) -> Pass:
        """Multiply with the weight, `(out, in)`, and add the bias."""
        weight, bias = arrays["weight"], arrays.get("bias")

        def back(dy: Array) -> Array:
            gradients["weight"] = dy.T @ x
            if bias is not None:
                gradients["bias"] = dy.sum(0)
            return dy @ weight

        output = x @ weight.T
        return Pass(output if bias is None else output + bias, back)


@dataclass(frozen=True)
class Sequence(Block):
    """Nodes one after the other, each with the name that it has in paths and states."""

    children: Children = ()

    def __post_init__(self) -> None:
        """Check the names, of which paths are made."""
        for name, _ in self.children:
            if not isinstance(name, str) or not name or not set(name).isdisjoint("./"):
                raise ValueError(
                    f"a child's name must be a text without dots and slashes; received {name!r}."
                )

    def after(self, before: Shape, below: Callable[[str, Node, Shape], Shape]) -> Shape:
        """Return the shape after the last of them."""
        for name, child in self.children:
            before = below(name, child, before)
        return before

    def step(self, x: Array, below: Callable[[str, Node, Array], Pass]) -> Pass:
        """Give each what the one before it makes."""
        backs = []
        for name, child in self.children:
            x, back = below(name, child, x)
            backs.append(back)

        def through(dy: Array) -> Array:
            for back in reversed(backs):
                dy = back(dy)
            return dy

        return Pass(x, through)


class DGConv(Sequence):
    """A dynamic group convolution: a batch norm, ReLU, and the heads."""


@dataclass(frozen=True)
class Residual(Block):
    """The sum of what `body` and `shortcut` make of the input; an empty shortcut is the input."""

    body: Sequence
    shortcut: Sequence = field(default_factory=Sequence)

    def __post_init__(self) -> None:
        """Check that no child of the body has the shortcut's name."""
        if SHORTCUT in dict(self.body.children):
            raise ValueError(f"a residual's body cannot have a child named {SHORTCUT!r}.")

    @property
    def children(self) -> Children:
        """Those of the body, and where there is one, the shortcut."""
        return (*self.body.children, *[(SHORTCUT, self.shortcut)] * bool(self.shortcut.children))

    def after(self, before: Shape, below: Callable[[str, Node, Shape], Shape]) -> Shape:
        """Return the shape of both."""
        after, other = self.body.after(before, below), before
        if self.shortcut.children:
            other = below(SHORTCUT, self.shortcut, before)
        if after != other:
            raise Unfit(
                f"cannot add its body's {after} to its shortcut's {other}: the shapes must be "
                "equal."
            )
        return after

    def step(self, x: Array, below: Callable[[str, Node, Array], Pass]) -> Pass:
        """Add both."""
        body, body_back = self.body.step(x, below)
        short, short_back = below(SHORTCUT, self.shortcut, x)
        return Pass(body + short, lambda dy: body_back(dy) + short_back(dy))


@dataclass(frozen=True)
class Scale(Block):
    """The input times what `body` makes of it, one factor for each channel: squeeze and excite."""

    body: Sequence

    @property
    def children(self) -> Children:
        """Those of the body."""
        return self.body.children

    def after(self, before: Shape, below: Callable[[str, Node, Shape], Shape]) -> Shape:
        """Return the input's shape."""
        factors = self.body.after(before, below)
        if factors != (before[0], 1, 1):
            raise Unfit(f"needs one factor for each of {before[0]} channels; received {factors}.")
        return before

    def step(self, x: Array, below: Callable[[str, Node, Array], Pass]) -> Pass:
        """Multiply by the factors."""
        factors, factors_back = self.body.step(x, below)

        def back(dy: Array) -> Array:
            return factors_back((dy * x).sum((2, 3), keepdims=True)) + dy * factors

        return Pass(x * factors, back)


@dataclass(frozen=True)
class Concat(Block):
    """What each branch makes of the input, joined along the channels."""

    branches: Sequence

    @property
    def children(self) -> Children:
        """The branches."""
        return self.branches.children

    def after(self, before: Shape, below: Callable[[str, Node, Shape], Shape]) -> Shape:
        """Return the channels of all branches, of one size."""
        shapes = [below(name, child, before) for name, child in self.children]
        if len({each[1:] for each in shapes}) != 1:
            raise Unfit(
                f"cannot join {', '.join(map(str, shapes)) or 'no branches'}: the sizes after the "
                "channels must be equal."
            )
        return (sum(each[0] for each in shapes), *shapes[0][1:])

    def step(self, x: Array, below: Callable[[str, Node, Array], Pass]) -> Pass:
        """Join the outputs."""
        outputs, backs = zip(*(below(name, child, x) for name, child in self.children), strict=True)
        ends = np.cumsum([output.shape[1] for output in outputs])[:-1]

        def back(dy: Array) -> Array:
            parts = zip(backs, np.split(dy, ends, axis=1), strict=True)
            dx: Array = sum(of(part) for of, part in parts)
            return dx

        return Pass(np.concatenate(outputs, axis=1), back)


@dataclass(frozen=True)
class Network:
    """A network. input_shape: `(C, H, W)`, for which it was designed; others may do as well.

    start: how its weights start, `FAN_IN` or `FAN_OUT`; see `initialize`.

    >>> describe("cifar_resnet20").input_shape
    (3, 32, 32)
    """

    name: str
    body: Sequence
    input_shape: tuple[int, int, int]
    start: str = FAN_IN


def sequence(*named: tuple[str, Node] | None) -> Sequence:
    """Return the nodes in sequence, without those that are None."""
    return Sequence(tuple(pair for pair in named if pair is not None))


def dynamic(channels: int, kernel_size: tuple[int, int] = (1, 1), **options: Any) -> DGConv:
    """Return a dynamic group convolution. options: the others of `DynamicHeads`."""
    heads = DynamicHeads(channels, kernel_size, **options)
    return DGConv((("norm", BatchNorm()), ("relu", Activation("relu")), ("heads", heads)))


def numbered(nodes: Iterable[Node]) -> Sequence:
    """Return the nodes in sequence, named "1", "2", …"""
    return Sequence(tuple((str(n), node) for n, node in enumerate(nodes, 1)))


def replaced(node: Any, change: Callable[[Any], Node], of: type[Leaf] = Conv) -> Any:
    """Return the node with every leaf `of` a type exchanged for what `change` returns of it."""
    if isinstance(node, of):
        return change(node)
    if isinstance(node, Sequence):
        children = ((name, replaced(child, change, of)) for name, child in node.children)
        return type(node)(tuple(children))
    if isinstance(node, Leaf):
        return node
    return type(node)(*(replaced(getattr(node, each.name), change, of) for each in fields(node)))
