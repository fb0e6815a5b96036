"""A network with every layer of a separable kind taken apart into ordinary ones."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from doconv_core.kinds.base import PartConv, PartNorm, SeparableKind, of_word
from doconv_core.maths.spec import ConvSpec
from doconv_core.networks.nodes import (
    ORDINARY,
    BatchNorm,
    Conv,
    Network,
    Node,
    Sequence,
    replaced,
    sequence,
)
from doconv_core.networks.shapes import Shape, infer


def lowered(network: Network, input_shape: Shape | None = None) -> Network:
    """Return a network of the same function whose convolutions are ordinary or composed ones alone.

    A BSConv becomes the sequence of its parts, with their own names below its path. A kernel of one
    tap has nothing to separate and stays an ordinary convolution. input_shape: `(C, H, W)`; None
    for the network's own. Raises ValueError for a BSConv with groups.
    """
    placed = infer(network, input_shape).values()
    at = ((each.path, each.before) for each in placed if isinstance(each.node, Conv))

    def change(conv: Conv) -> Node:  # which meets them in the order of `infer`
        path, before = next(at)
        return parts(path, conv, before)

    body = replaced(network.body, change)
    assert isinstance(body, Sequence)
    size = network.input_shape if input_shape is None else input_shape
    return replace(network, body=body, input_shape=(size[0], size[1], size[2]))


def parts(path: str, conv: Conv, before: Shape) -> Node:
    """Return what a convolution is made of: itself, or the sequence of its kind's parts.

    path: the convolution's, for messages. before: the shape of its input, channels first.
    """
    kind = of_word(conv.kind.name)
    if not isinstance(kind, SeparableKind):
        return conv
    if prod(conv.kernel_size) == 1:
        return replace(conv, kind=ORDINARY)
    try:
        dense = ConvSpec(before[0], conv.channels, conv.kernel_size)
        found = kind.parts(conv.kind, dense, conv.groups)
    except ValueError as error:
        raise ValueError(f"{path!r} {error}") from None

    def node(part: PartConv | PartNorm) -> Node:
        if isinstance(part, PartNorm):
            return BatchNorm()
        return replace(conv, groups=0, kind=ORDINARY) if part.depthwise else Conv(part.channels)

    return sequence(*((part.name, node(part)) for part in found))


def conv_spec(conv: Conv, before: Shape) -> ConvSpec:
    """Return the sizes of a convolution as an ordinary one. before: its input's shape."""
    return ConvSpec(before[0], conv.channels, conv.kernel_size, conv.groups or before[0])
