"""What a network is made of: a few kinds of nodes, as data, that a function of a family composes.

A node holds what a reader of the paper's table would see. Input channels and sizes are not in it:
they follow from what comes before, and `shapes.infer` tells them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from doconv_core.kinds.base import Recipe, recipe

ACTIVATIONS = ("relu", "relu6", "hard_swish", "hard_sigmoid", "tanh")
POOLS = ("max", "average")
SHORTCUT = "shortcut"  # the name of a residual's other branch among its children


def _one_of(known: tuple[str, ...], name: str) -> None:
    if name not in known:
        raise ValueError(f"name must be one of {', '.join(known)}; received {name!r}.")


ORDINARY = recipe()


@dataclass(frozen=True)
class Conv:
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


@dataclass(frozen=True)
class BatchNorm:
    """A batch norm. momentum: the new batch's weight. affine: whether it has scale and shift."""

    epsilon: float = 1e-5
    momentum: float = 0.1
    affine: bool = True


@dataclass(frozen=True)
class Activation:
    """An activation function, one of `ACTIVATIONS`."""

    name: str

    def __post_init__(self) -> None:
        """Check the name."""
        _one_of(ACTIVATIONS, self.name)


@dataclass(frozen=True)
class Pool:
    """A pooling layer. name: "max" or "average". Its windows do not count what is padded."""

    name: str
    size: int
    stride: int
    padding: int = 0

    def __post_init__(self) -> None:
        """Check the name, and that every window meets the image."""
        _one_of(POOLS, self.name)
        if not 0 <= 2 * self.padding <= self.size:
            raise ValueError(
                "padding must be at most half of a pool's size; received "
                f"padding={self.padding}, size={self.size}."
            )


@dataclass(frozen=True)
class GlobalPool:
    """The mean over all positions, `(B, C, 1, 1)`."""


@dataclass(frozen=True)
class Flatten:
    """All but the batch axis in one, in the order channels, height, width."""


@dataclass(frozen=True)
class Dropout:
    """In training, each entry is zero with probability `rate`, and the others are scaled up."""

    rate: float


@dataclass(frozen=True)
class Linear:
    """A linear (dense) layer."""

    features: int
    bias: bool = True


@dataclass(frozen=True)
class Sequence:
    """Nodes one after the other, each with the name that it has in paths and states."""

    children: tuple[tuple[str, Node], ...] = ()

    def __post_init__(self) -> None:
        """Check the names, of which paths are made."""
        for name, _ in self.children:
            if not isinstance(name, str) or not name or not set(name).isdisjoint("./"):
                raise ValueError(
                    f"a child's name must be a text without dots and slashes; received {name!r}."
                )


@dataclass(frozen=True)
class Residual:
    """The sum of what `body` and `shortcut` make of the input; an empty shortcut is the input."""

    body: Sequence
    shortcut: Sequence = field(default_factory=Sequence)

    def __post_init__(self) -> None:
        """Check that no child of the body has the shortcut's name."""
        if SHORTCUT in dict(self.body.children):
            raise ValueError(f"a residual's body cannot have a child named {SHORTCUT!r}.")


@dataclass(frozen=True)
class Scale:
    """The input times what `body` makes of it, one factor for each channel: squeeze and excite."""

    body: Sequence


@dataclass(frozen=True)
class Concat:
    """What each branch makes of the input, joined along the channels."""

    branches: Sequence


Node: TypeAlias = (
    Conv | BatchNorm | Activation | Pool | GlobalPool | Flatten | Dropout | Linear
    | Sequence | Residual | Scale | Concat
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A network. input_shape: `(C, H, W)`, for which it was designed; others may do as well.

    >>> describe("cifar_resnet20").input_shape
    (3, 32, 32)
    """

    name: str
    body: Sequence
    input_shape: tuple[int, int, int]


def sequence(*named: tuple[str, Node | None] | None) -> Sequence:
    """Return the nodes in sequence, without those that are None."""
    kept = [pair for pair in named if pair is not None]
    return Sequence(tuple((name, node) for name, node in kept if node is not None))


def numbered(nodes: Iterable[Node]) -> Sequence:
    """Return the nodes in sequence, named "1", "2", …"""
    return Sequence(tuple((str(n), node) for n, node in enumerate(nodes, 1)))


def replaced(node: Node, change: Callable[[Conv], Node]) -> Node:
    """Return the node with every convolution in it exchanged for what `change` returns of it."""
    if isinstance(node, Conv):
        return change(node)
    if isinstance(node, Sequence):
        return _within(node, change)
    if isinstance(node, Residual):
        return Residual(_within(node.body, change), _within(node.shortcut, change))
    if isinstance(node, Scale):
        return Scale(_within(node.body, change))
    if isinstance(node, Concat):
        return Concat(_within(node.branches, change))
    return node


def _within(children: Sequence, change: Callable[[Conv], Node]) -> Sequence:
    return Sequence(tuple((name, replaced(child, change)) for name, child in children.children))
