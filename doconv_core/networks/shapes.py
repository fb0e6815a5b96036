"""Where each node of a network is, and the shapes that go in and come out of it."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

from doconv_core.maths.spec import as_tuple, is_sequence
from doconv_core.networks.nodes import (
    SHORTCUT,
    Concat,
    Conv,
    Flatten,
    GlobalPool,
    Linear,
    Network,
    Node,
    Pool,
    Residual,
    Scale,
    Sequence,
)
from doconv_core.state.file import entry

Shape = tuple[int, ...]


class Placed(NamedTuple):
    """A node at its place. path: names from the network's own down, joined by dots.

    before, after: the shapes of one image before and after it, `(C, H, W)` or `(features,)`.
    """

    path: str
    node: Any  # a `Node`: who asks for its type knows what it has
    before: Shape
    after: Shape


def infer(network: Network, input_shape: Shape | None = None) -> dict[str, Placed]:
    """Return every node of the network by its path, in order, each before its children.

    The network's body has the empty path. input_shape: `(C, H, W)`; None for the network's own.
    Raises ValueError, by path, where the input is too small, or a shape does not fit.
    """
    placed: dict[str, Any] = {}
    _place("", network.body, tuple(input_shape or network.input_shape), placed)
    return placed


def for_input(network: Network, input_shape: Shape | None = None) -> Network:
    """Return the network for images of another size, `(C, H, W)`; None for its own.

    Raises TypeError or ValueError for what is no such size, has another number of channels than the
    network's, or is too small.
    """
    if input_shape is None:
        return network
    if not is_sequence(input_shape):
        raise TypeError(f"input_shape must be (C, H, W); received input_shape={input_shape!r}.")
    channels, height, width = as_tuple("input_shape", input_shape, 3)
    if channels != network.input_shape[0]:
        raise ValueError(
            f"input_shape must have the {network.input_shape[0]} channels of the network; received "
            f"input_shape={(channels, height, width)}. in_channels gives it others."
        )
    sized = replace(network, input_shape=(channels, height, width))
    infer(sized)
    return sized


def children(node: Node) -> tuple[tuple[str, Node], ...]:
    """Return a node's children, by the names that they have in paths.

    A residual's are its body's, and where it has one, "shortcut"; those of a scale and of a
    concatenation are their sequences' own.
    """
    if isinstance(node, Sequence):
        return node.children
    if isinstance(node, Residual):
        shortcut = ((SHORTCUT, node.shortcut),) if node.shortcut.children else ()
        return (*node.body.children, *shortcut)
    if isinstance(node, Scale):
        return node.body.children
    if isinstance(node, Concat):
        return node.branches.children
    return ()


def _place(path: str, node: Node, shape: Shape, placed: dict[str, Any]) -> Shape:
    if path in placed:
        raise ValueError(f"the name {path!r} must be of one node alone; received two of it.")
    placed[path] = None  # so that a node comes before its children
    if isinstance(node, Sequence):
        after = _through(path, node, shape, placed)
    elif isinstance(node, Residual):
        after = _through(path, node.body, shape, placed)
        other = shape
        if node.shortcut.children:
            other = _place(entry(path, SHORTCUT), node.shortcut, shape, placed)
        if after != other:
            raise ValueError(
                f"{path!r} cannot add its body's {after} to its shortcut's {other}: the shapes "
                "must be equal."
            )
    elif isinstance(node, Scale):
        after = shape
        factors = _through(path, node.body, shape, placed)
        if factors != (shape[0], 1, 1):
            raise ValueError(
                f"{path!r} needs one factor for each of {shape[0]} channels; received {factors}."
            )
    elif isinstance(node, Concat):
        branches = node.branches.children
        shapes = [_place(entry(path, name), child, shape, placed) for name, child in branches]
        if len({each[1:] for each in shapes}) != 1:
            raise ValueError(
                f"{path!r} cannot join {', '.join(map(str, shapes)) or 'no branches'}: the sizes "
                "after the channels must be equal."
            )
        after = (sum(each[0] for each in shapes), *shapes[0][1:])
    else:
        after = _after(path, node, shape)
    placed[path] = Placed(path, node, shape, after)
    return after


def _through(path: str, sequence: Sequence, shape: Shape, placed: dict[str, Any]) -> Shape:
    for name, child in sequence.children:
        shape = _place(entry(path, name), child, shape, placed)
    return shape


def _after(path: str, node: Node, shape: Shape) -> Shape:
    if isinstance(node, (Conv, Pool, GlobalPool)) and len(shape) != 3:
        raise ValueError(f"{path!r} needs an image (C, H, W); received the shape {shape}.")
    if isinstance(node, Conv):
        sizes = zip(shape[1:], node.kernel_size, padding(node), strict=True)
        return (node.channels, *(_positions(path, n, k, node.stride, p) for n, k, p in sizes))
    if isinstance(node, Pool):
        size, stride, around = node.size, node.stride, node.padding
        return (shape[0], *(_positions(path, n, size, stride, around) for n in shape[1:]))
    if isinstance(node, GlobalPool):
        return (shape[0], 1, 1)
    if isinstance(node, Flatten):
        return (prod(shape),)
    if isinstance(node, Linear):
        if len(shape) != 1:
            raise ValueError(f"{path!r} needs a vector; received the shape {shape}.")
        return (node.features,)
    return shape


def padding(conv: Conv) -> tuple[int, int]:
    """Return the padding of both dimensions, on either side."""
    if conv.padding is None:
        return (conv.kernel_size[0] // 2, conv.kernel_size[1] // 2)
    return (conv.padding, conv.padding)


def _positions(path: str, size: int, kernel: int, stride: int, around: int) -> int:
    if size + 2 * around < kernel:
        raise ValueError(
            f"{path!r} needs at least {kernel - 2 * around} rows and columns; received {size}. The "
            "network's input is too small."
        )
    return (size + 2 * around - kernel) // stride + 1
