"""GluonCV's ResNets for ImageNet: `resnetN_v1`, `_v1b`, `_v2`, ResNeXt; and a plain network.

They differ in where a bottleneck has its stride, and in which convolutions have a bias.
Source: Deep residual learning, arXiv 1512.03385; Identity mappings, arXiv 1603.05027; Aggregated
residual transformations, arXiv 1611.05431; DO-Conv, arXiv 2006.12030, table 1.
"""

from __future__ import annotations

from collections.abc import Callable

from doconv_core.networks import preresnet, resnet
from doconv_core.networks.blocks import RELU, Named, dense_head, large_stem, stages
from doconv_core.networks.nodes import (
    ORDINARY,
    BatchNorm,
    Conv,
    Node,
    Residual,
    Sequence,
    sequence,
)

# Depth: units of each stage. Units are basic ones up to a depth of 34, then bottlenecks.
UNITS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
BASIC_WIDTHS = (64, 128, 256, 512)
BOTTLENECK_WIDTHS = (256, 512, 1024, 2048)
STEM = 64


def resnet_v1(depth: int, classes: int) -> Sequence:
    """Return `resnetN_v1`, whose bottlenecks have their stride and biases in 1x1 convolutions."""

    def bottleneck(width: int, stride: int) -> Sequence:
        first, last = Conv(width // 4, stride=stride, bias=True), Conv(width, bias=True)
        return three(first, Conv(width // 4, (3, 3)), last)

    return _post_activated(depth, classes, bottleneck)


def resnet_v1b(depth: int, classes: int) -> Sequence:
    """Return `resnetN_v1b`, whose bottlenecks have their stride in the 3x3 convolution."""

    def bottleneck(width: int, stride: int) -> Sequence:
        return three(Conv(width // 4), Conv(width // 4, (3, 3), stride), Conv(width))

    return _post_activated(depth, classes, bottleneck)


def resnext(depth: int, cardinality: int, width: int, classes: int) -> Sequence:
    """Return `resnextN_CxWd`: C groups, each of W channels in the first stage."""

    def bottleneck(channels: int, stride: int) -> Sequence:
        inner = cardinality * width * channels // BOTTLENECK_WIDTHS[0]
        grouped = Conv(inner, (3, 3), stride, groups=cardinality)
        return three(Conv(inner), grouped, Conv(channels))

    return _post_activated(depth, classes, bottleneck)


def three(first: Conv, middle: Conv, last: Conv) -> Sequence:
    """Return the body of a bottleneck: three convolutions, with batch norms and ReLU."""
    return sequence(
        ("conv1", first), ("bn1", BatchNorm()), ("relu1", RELU),
        ("conv2", middle), ("bn2", BatchNorm()), ("relu2", RELU),
        ("conv3", last), ("bn3", BatchNorm()),
    )  # fmt: skip


def _post_activated(
    depth: int, classes: int, bottleneck: Callable[[int, int], Sequence]
) -> Sequence:
    def unit(before: int, width: int, stride: int) -> Residual:
        body = resnet.basic(width, stride, ORDINARY) if depth < 50 else bottleneck(width, stride)
        return Residual(body, resnet.projection(before, width, stride))

    return sequence(
        ("stem", large_stem(STEM)),
        *stages(unit, UNITS[depth], _widths(depth), STEM, activation=RELU),
        *dense_head(classes),
    )


def resnet_v2(depth: int, classes: int) -> Sequence:
    """Return `resnetN_v2`, whose units begin with batch norm and ReLU."""

    def unit(before: int, width: int, stride: int) -> Node:
        if depth < 50:
            body = preresnet.basic(width, stride, ORDINARY)
        else:
            body = _bottleneck_v2(width, stride)
        return preresnet.pre_activated(before, width, stride, body)

    return sequence(
        ("input_bn", BatchNorm(affine=False)),
        ("stem", large_stem(STEM)),
        *stages(unit, UNITS[depth], _widths(depth), STEM),
        ("final", preresnet.bn_relu()),
        *dense_head(classes),
    )


def _bottleneck_v2(width: int, stride: int) -> Sequence:
    """Return the body of a bottleneck, after its first batch norm and ReLU."""
    return sequence(
        ("conv1", Conv(width // 4)), ("bn2", BatchNorm()), ("relu2", RELU),
        ("conv2", Conv(width // 4, (3, 3), stride)), ("bn3", BatchNorm()), ("relu3", RELU),
        ("conv3", Conv(width)),
    )  # fmt: skip


def _widths(depth: int) -> tuple[int, ...]:
    return BASIC_WIDTHS if depth < 50 else BOTTLENECK_WIDTHS


def plain(classes: int) -> Sequence:
    """Return `plain18`: `resnet18_v1` without shortcuts."""

    def unit(before: int, width: int, stride: int) -> Sequence:
        last: Named = ("relu2", RELU)
        return sequence(*resnet.basic(width, stride, ORDINARY).children, last)

    return sequence(
        ("stem", large_stem(STEM)),
        *stages(unit, UNITS[18], BASIC_WIDTHS, STEM),
        *dense_head(classes),
    )
