"""A network with every layer of a separable kind taken apart: the layers of its states."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from doconv_core.kinds.base import PartConv, PartNorm, SeparableKind, of_word
from doconv_core.kinds.normed import BranchedKind
from doconv_core.maths.spec import ConvSpec
from doconv_core.networks.nodes import (
    ORDINARY,
    BatchNorm,
    Conv,
    Network,
    Node,
    replaced,
    sequence,
)
from doconv_core.networks.normed import branches
from doconv_core.networks.shapes import infer
from doconv_core.state.layers import LayerForm, Shape


def lowered(network: Network, input_shape: Shape | None = None) -> Network:
    """Return a network of the same function whose convolutions are ordinary or composed ones alone.

    A BSConv becomes the sequence of its parts, with their own names below its path; one of branches
    with batch norms the block of them. A kernel of one tap has nothing to separate and stays an
    ordinary convolution. input_shape: `(C, H, W)`; None for the network's own. Raises ValueError
    for a BSConv with groups, and for sizes that a rule of branches has no layer of.
    """
    placed = infer(network, input_shape).values()
    at = ((each.path, each.before) for each in placed if isinstance(each.node, Conv))

    def change(conv: Conv) -> Node:  # which meets them in the order of `infer`
        path, before = next(at)
        return parts(path, conv, before)

    channels, rows, columns = input_shape or network.input_shape
    body = replaced(network.body, change)
    return replace(network, body=body, input_shape=(channels, rows, columns))


def layers(network: Network, input_shape: Shape | None = None) -> dict[str, LayerForm]:
    """Return the form of every layer of the network that has arrays, by path, in order.

    It is what a state of the network holds, in whatever framework: a BSConv's parts are layers of
    their own. input_shape: `(C, H, W)`; None for the network's own. Raises ValueError, by path,
    for a network of which there are no such layers.
    """
    forms = ((path, each.form) for path, each in infer(lowered(network, input_shape)).items())
    return {path: form for path, form in forms if form is not None}


def parts(path: str, conv: Conv, before: Shape) -> Node:
    """Return what a convolution is made of: itself, or its kind's parts.

    path: the convolution's, for messages. before: the shape of its input, channels first.
    """
    kind = of_word(conv.kind.name)
    if isinstance(kind, BranchedKind):
        try:
            return branches(conv, before)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from None
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
        if part.depthwise:
            return replace(conv, groups=0, kind=ORDINARY)
        return Conv(part.channels, orthonormal=part.orthonormal)

    return sequence(*((part.name, node(part)) for part in found))
