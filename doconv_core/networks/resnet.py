"""ResNets of basic units, as BSConv's tables have them: `[cifar_]resnetN`.

Source: Deep residual learning, arXiv 1512.03385; BSConv, arXiv 2003.13549, section 5.
"""

from __future__ import annotations

from doconv_core.kinds.base import Recipe
from doconv_core.networks.blocks import RELU, conv_bn, convolution_head, large_stem, stages
from doconv_core.networks.nodes import BatchNorm, Conv, Residual, Sequence, sequence

# Depth: units of each stage. A unit has two convolutions, and the stem and the classifier one each.
UNITS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    26: (3, 3, 3, 3),
    34: (3, 4, 6, 3),
    68: (3, 4, 23, 3),
    102: (3, 8, 36, 3),
}
WIDTHS = (64, 128, 256, 512)
CIFAR_UNITS = {
    20: (3, 3, 3),
    56: (9, 9, 9),
    110: (18, 18, 18),
    302: (50, 50, 50),
    602: (100, 100, 100),
}
CIFAR_WIDTHS = (16, 32, 64)


def resnet(depth: int, classes: int, kind: Recipe, *, cifar: bool) -> Sequence:
    """Return the network of this depth, with 3x3 convolutions of this kind."""

    def unit(before: int, width: int, stride: int) -> Residual:
        return Residual(basic(width, stride, kind), projection(before, width, stride))

    counts, widths = (CIFAR_UNITS[depth], CIFAR_WIDTHS) if cifar else (UNITS[depth], WIDTHS)
    return sequence(
        ("input_bn", BatchNorm()),
        ("stem", conv_bn(widths[0], 3, kind=kind) if cifar else large_stem(widths[0])),
        *stages(unit, counts, widths, widths[0], activation=RELU),
        *convolution_head(classes),
    )


def basic(width: int, stride: int, kind: Recipe) -> Sequence:
    """Return the body of a basic unit."""
    return sequence(
        ("conv1", Conv(width, (3, 3), stride, kind=kind)),
        ("bn1", BatchNorm()),
        ("relu1", RELU),
        ("conv2", Conv(width, (3, 3), kind=kind)),
        ("bn2", BatchNorm()),
    )


def projection(before: int, width: int, stride: int) -> Sequence:
    """Return the shortcut of a unit: empty unless width or size change."""
    if before == width and stride == 1:
        return Sequence()
    return conv_bn(width, activation=None, stride=stride)
