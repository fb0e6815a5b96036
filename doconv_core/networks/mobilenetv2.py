"""MobileNetV2, as BSConv's tables have it: `[cifar_]mobilenetv2_wX[dY]`.

Source: MobileNetV2, arXiv 1801.04381, table 2; BSConv, arXiv 2003.13549, section 4.2.
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
    squeeze_excite,
)
from doconv_core.networks.nodes import BatchNorm, Node, Residual, Sequence, sequence

STEM = 32
LAST = 1280
# Of each stage, the expanded and the output widths of its units.
STAGES = (
    ((32, 16),),
    ((96, 24), (144, 24)),
    ((144, 32), (192, 32), (192, 32)),
    ((192, 64), (384, 64), (384, 64), (384, 64), (384, 96), (576, 96), (576, 96)),
    ((576, 160), (960, 160), (960, 160), (960, 320)),
)
STRIDES = (1, 2, 2, 2, 2)  # of each stage's first unit
CIFAR_STRIDES = (1, 1, 2, 2, 2)
LEAST = Fraction(1, 16)  # the width that leaves a channel to every layer


def mobilenetv2(width: Fraction, classes: int, kind: Recipe, *, cifar: bool) -> Sequence:
    """Return the network with `width` times the channels; the last convolution gets no narrower.

    kind: for BSConv-S, which this network is already, the linear convolutions are to be kept
    orthonormal in training.
    """
    return sequence(
        ("input_bn", BatchNorm()),
        *features(width, cifar=cifar, orthonormal=kind.name == "bsconvs"),
        *convolution_head(classes),
    )


def features(
    width: Fraction, *, cifar: bool = False, orthonormal: bool = False, expand_first: bool = True
) -> list[Named]:
    """Return the stem, the stages and the last convolution.

    expand_first: whether the first unit has an expansion, which leaves the width as it is.
    """
    before = int(width * STEM)
    stem = conv_bn(before, 3, "relu6", stride=1 if cifar else 2)
    units: list[list[Node]] = []
    for widths, first in zip(STAGES, CIFAR_STRIDES if cifar else STRIDES, strict=True):
        units.append([])
        for place, (expanded, channels) in enumerate(widths):
            sizes = before, int(width * expanded), int(width * channels)
            unit = inverted_residual(
                *sizes,
                first if place == 0 else 1,
                expand=expand_first or len(units) > 1,
                orthonormal=orthonormal,
            )
            units[-1].append(unit)
            before = sizes[-1]
    final = conv_bn(int(max(width, Fraction(1)) * LAST), 1, "relu6")
    return [("stem", stem), *numbered_stages(units), ("final", final)]


def inverted_residual(
    before: int,
    expanded: int,
    channels: int,
    stride: int,
    *,
    kernel: int = 3,
    activation: str = "relu6",
    squeezed: int | None = None,
    expand: bool = True,
    orthonormal: bool = False,
) -> Node:
    """Return a unit: expand, convolve depthwise, squeeze and excite, and project linearly.

    It has a shortcut where neither width nor size change. squeezed: the width that squeeze and
    excite has between its convolutions; None for none. expand: whether there is an expansion.
    """
    depthwise = conv_bn(expanded, kernel, activation, stride=stride, groups=DEPTHWISE)
    body = sequence(
        ("expand", conv_bn(expanded, 1, activation)) if expand else None,
        ("depthwise", depthwise),
        None if squeezed is None else ("squeeze_excite", squeeze_excite(expanded, squeezed)),
        ("project", conv_bn(channels, 1, None, orthonormal=orthonormal)),
    )
    return Residual(body) if stride == 1 and before == channels else body
