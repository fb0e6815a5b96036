"""MobileNetV1, as BSConv's tables have it: `[cifar_]mobilenetv1_wX[dY]`.

Source: MobileNets, arXiv 1704.04861, table 1; BSConv, arXiv 2003.13549, section 4.1.
"""

from __future__ import annotations

from fractions import Fraction

from doconv_core.kinds.base import Recipe
from doconv_core.networks.blocks import (
    DEPTHWISE,
    Named,
    conv_bn,
    convolution_head,
    numbered_stages,
)
from doconv_core.networks.nodes import ORDINARY, BatchNorm, Node, Sequence, sequence

STEM = 32
WIDTHS = ((64,), (128, 128), (256, 256), (512,) * 6, (1024, 1024))  # of the units of each stage
STRIDES = (1, 2, 2, 2, 2)  # of each stage's first unit
CIFAR_STRIDES = (1, 1, 2, 2, 2)
LEAST = Fraction(1, STEM)  # the width that leaves a channel to every layer


def mobilenetv1(width: Fraction, classes: int, kind: Recipe, *, cifar: bool) -> Sequence:
    """Return the network with `width` times the channels, of depthwise separable or BSConv units.

    kind: of what makes up a unit; ordinary for depthwise separable convolutions.
    """
    return sequence(
        ("input_bn", BatchNorm()),
        *features(width, kind, cifar=cifar),
        *convolution_head(classes),
    )


def features(width: Fraction, kind: Recipe = ORDINARY, *, cifar: bool = False) -> list[Named]:
    """Return the stem and the stages."""
    before = int(width * STEM)
    stem = conv_bn(before, 3, stride=1 if cifar else 2)
    units: list[list[Node]] = []
    for widths, first in zip(WIDTHS, CIFAR_STRIDES if cifar else STRIDES, strict=True):
        units.append([])
        for place, full in enumerate(widths):
            channels = int(width * full)
            stride = first if place == 0 else 1
            if kind.name == "conv":
                units[-1].append(separable(before, channels, stride))
            else:
                units[-1].append(conv_bn(channels, 3, stride=stride, kind=kind))
            before = channels
    return [("stem", stem), *numbered_stages(units)]


def separable(before: int, channels: int, stride: int) -> Sequence:
    """Return a unit of a depthwise and a pointwise convolution, each with batch norm and ReLU."""
    return sequence(
        ("depthwise", conv_bn(before, 3, stride=stride, groups=DEPTHWISE)),
        ("pointwise", conv_bn(channels)),
    )
