"""Networks of dynamic group convolutions, and the same with ordinary ones.

`[cifar_]dydensenetN`, whose dense layers have a dynamic 1x1 convolution, and `[cifar_]densenetN`
without; `[cifar_]dyresnet18`, of dynamic convolutions alone but for the stem. Sizes are options.
Source: Dynamic Group Convolution, arXiv 2007.04242, section 4; CondenseNet, arXiv 1711.09224.
"""

from __future__ import annotations

from collections.abc import Sequence as Sizes
from typing import Any

from doconv_core.kinds.base import Recipe
from doconv_core.kinds.dgc import GATE_FACTOR, HEADS, SQUEEZE_RATE
from doconv_core.maths.spec import as_integer, is_sequence
from doconv_core.networks.blocks import RELU, Named, conv_bn, dense_head, large_stem, stages
from doconv_core.networks.nodes import (
    Activation,
    BatchNorm,
    Concat,
    Conv,
    Node,
    Pool,
    Residual,
    Sequence,
    dynamic,
    sequence,
)

# By the number of their layers: dense layers of each stage, and the channels that each adds.
DENSENETS = {74: ((4, 6, 8, 10, 8), (8, 16, 32, 64, 128))}
CIFAR_DENSENETS = {86: ((14, 14, 14), (8, 16, 32))}
RESNET = ((2, 2, 2, 2), (64, 128, 256, 512))
SELECTOR = ("heads", "squeeze_rate", "gate_factor")
DENSENET_OPTIONS = ("stages", "growth", "bottleneck", "group_3x3")


def densenet(
    depth: int,
    classes: int,
    kind: Recipe,
    *,
    cifar: bool,
    dynamic_groups: bool,
    stages: Any = None,
    growth: Any = None,
    bottleneck: int = 4,
    group_3x3: int = 4,
    heads: int = HEADS,
    squeeze_rate: int = SQUEEZE_RATE,
    gate_factor: float = GATE_FACTOR,
) -> Sequence:
    """Return the network: stages of dense layers, each of which halves the image but the last.

    stages: the dense layers of each; growth: the channels that each of them adds; None for the
    depth's own. bottleneck: how many times that its 1x1 convolution has. group_3x3: groups of its
    3x3 convolution. The others are the dynamic convolutions' own.
    """
    own = (CIFAR_DENSENETS if cifar else DENSENETS)[depth]
    counts = _integers("stages", own[0] if stages is None else stages)
    widths = _integers("growth", own[1] if growth is None else growth)
    if len(counts) != len(widths):
        raise ValueError(
            f"stages and growth must have as many numbers; received stages={counts}, "
            f"growth={widths}."
        )
    bottleneck = as_integer("bottleneck", bottleneck)
    selector: Any = {"heads": heads, "squeeze_rate": squeeze_rate, "gate_factor": gate_factor}

    def layer(channels: int) -> Node:
        inner = bottleneck * channels
        first = dynamic(inner, **selector) if dynamic_groups else _pre_activated(Conv(inner))
        second = _pre_activated(Conv(channels, (3, 3), groups=group_3x3))
        new = sequence(("conv_1", first), ("conv_2", second))
        return Concat(sequence(("x", Sequence()), ("new", new)))

    parts: list[Named] = [("init_conv", Conv(2 * widths[0], (3, 3), 1 if cifar else 2))]
    for n, (count, channels) in enumerate(zip(counts, widths, strict=True), 1):
        block = ((f"denselayer_{at}", layer(channels)) for at in range(1, count + 1))
        parts += [(f"denseblock_{n}", sequence(*block))]
        parts += [(f"transition_{n}", Pool("average", 2, 2))] if n < len(counts) else []
    return sequence(*parts, ("bn_last", BatchNorm()), ("relu_last", RELU), *dense_head(classes))


def resnet(
    depth: int,
    classes: int,
    kind: Recipe,
    *,
    cifar: bool,
    heads: int = HEADS,
    squeeze_rate: int = SQUEEZE_RATE,
    gate_factor: float = 0.45,
) -> Sequence:
    """Return the network, whose convolutions are dynamic ones but for the stem. kind: not used."""
    selector: Any = {"heads": heads, "squeeze_rate": squeeze_rate, "gate_factor": gate_factor}

    def unit(before: int, stride: int, width: int) -> Residual:
        body: list[Named] = []
        for n, step in enumerate((stride, 1), 1):
            conv = dynamic(width, (3, 3), stride=step, **selector)
            body += [(f"conv{n}", conv), (f"bn{n}", BatchNorm()), (f"relu{n}", RELU)]
        shortcut = Sequence()
        if before != width or stride != 1:
            conv = dynamic(width, stride=stride, **selector)
            shortcut = sequence(("conv", conv), ("bn", BatchNorm()))
        return Residual(sequence(*body[:-1]), shortcut)  # the last ReLU is the sum's

    counts, widths = RESNET
    rows = [[(width,)] * count for count, width in zip(counts, widths, strict=True)]
    return sequence(
        ("stem", conv_bn(widths[0], 3) if cifar else large_stem()),
        *stages(unit, rows, (1, 2, 2, 2), widths[0], activation=RELU),
        *dense_head(classes),
    )


def _pre_activated(conv: Conv) -> Sequence:
    return sequence(("norm", BatchNorm()), ("relu", Activation("relu")), ("conv", conv))


def _integers(name: str, values: Any) -> tuple[int, ...]:
    """Return a sequence of integers of at least 1, of at least one of them."""
    if not is_sequence(values) or not len(values):
        raise TypeError(
            f"{name} must be integers, one for each stage, such as (14, 14, 14); received "
            f"{name}={values!r}."
        )
    numbers: Sizes[Any] = values
    return tuple(as_integer(f"{name}[{n}]", value) for n, value in enumerate(numbers))
