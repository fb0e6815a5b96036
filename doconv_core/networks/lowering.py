"""A network with every blueprint separable convolution taken apart into ordinary ones."""

from __future__ import annotations

from dataclasses import replace
from math import prod

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

ORDINARY_KINDS = ("conv", "doconv")


def lowered(network: Network, input_shape: Shape | None = None) -> Network:
    """Return a network of the same function whose convolutions are ordinary and DO-Conv alone.

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
    """Return what a convolution is made of: itself, or the sequence of a BSConv's parts.

    path: the convolution's, for messages. before: the shape of its input, channels first.
    """
    kind = conv.kind
    if kind.name in ORDINARY_KINDS:
        return conv
    if prod(conv.kernel_size) == 1:
        return replace(conv, kind=ORDINARY)
    check_separable(path, conv)
    norm = BatchNorm() if kind.with_bn else None
    depthwise = replace(conv, groups=0, kind=ORDINARY)
    if kind.name == "bsconvu":
        return sequence(
            ("pointwise", Conv(conv.channels)), ("batch_norm", norm), ("depthwise", depthwise)
        )
    mid = kind.mid_channels(before[0])
    return sequence(
        ("pointwise1", Conv(mid)),
        ("batch_norm1", norm),
        ("pointwise2", Conv(conv.channels)),
        ("batch_norm2", norm),
        ("depthwise", depthwise),
    )


def check_separable(path: str, conv: Conv) -> None:
    """Raise ValueError where a convolution of several taps has groups and cannot be a BSConv."""
    if conv.groups != 1:
        raise ValueError(
            f"{path!r} cannot be a BSConv, which has a depthwise part already, with groups: "
            f"received groups={conv.groups}; expected 1."
        )
