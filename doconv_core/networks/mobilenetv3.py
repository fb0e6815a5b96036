"""MobileNetV3, as BSConv's tables have it: `[cifar_]mobilenetv3_small_wX[dY]`, `…_large_…`.

Source: Searching for MobileNetV3, arXiv 1905.02244, tables 1 and 2; BSConv, arXiv 2003.13549.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from doconv_core.kinds.base import Recipe
from doconv_core.networks.blocks import (
    Named,
    conv_bn,
    convolution_head,
    numbered_stages,
    squeeze_excite,
)
from doconv_core.networks.mobilenetv2 import inverted_residual
from doconv_core.networks.nodes import BatchNorm, Node, Sequence, sequence

STEM = 16


class Stage(NamedTuple):
    """Units with depthwise convolutions of one kernel size and one activation.

    stride: of the first unit. units: expanded and output width of each, and whether it squeezes
    and excites.
    """

    kernel: int
    activation: str
    stride: int
    units: tuple[tuple[int, int, bool], ...]


SMALL = (
    Stage(3, "relu", 2, ((16, 16, True),)),
    Stage(3, "relu", 2, ((72, 24, False), (88, 24, False))),
    Stage(5, "hard_swish", 2, ((96, 40, True), (240, 40, True), (240, 40, True),
                               (120, 48, True), (144, 48, True))),
    Stage(5, "hard_swish", 2, ((288, 96, True), (576, 96, True), (576, 96, True))),
)  # fmt: skip
LARGE = (
    Stage(3, "relu", 1, ((16, 16, False),)),
    Stage(3, "relu", 2, ((64, 24, False), (72, 24, False))),
    Stage(5, "relu", 2, ((72, 40, True), (120, 40, True), (120, 40, True))),
    Stage(3, "hard_swish", 2, ((240, 80, False), (200, 80, False), (184, 80, False),
                               (184, 80, False), (480, 112, True), (672, 112, True))),
    Stage(5, "hard_swish", 2, ((672, 160, True), (960, 160, True), (960, 160, True))),
)  # fmt: skip
# On CIFAR's images, as the stem halves no size, so does the first stage that would.
CIFAR_STRIDES = {"small": (1, 2, 2, 2), "large": (1, 1, 2, 2, 2)}
# The width that leaves a channel to every layer, also where squeeze and excite keeps a quarter.
LEAST = {"small": Fraction(1, 4), "large": Fraction(1, 16)}
LAST = {"small": 576, "large": 960}


def mobilenetv3(size: str, width: Fraction, classes: int, kind: Recipe, *, cifar: bool) -> Sequence:
    """Return the small or large network with `width` times the channels; the last gets no narrower.

    kind: for BSConv-S, which this network is already, the linear convolutions are to be kept
    orthonormal in training.
    """
    last = int(max(width, Fraction(1)) * LAST[size])
    return sequence(
        ("input_bn", BatchNorm()),
        *features(size, width, cifar=cifar, orthonormal=kind.name == "bsconvs"),
        ("squeeze_excite", squeeze_excite(last, last // 4)) if size == "small" else None,
        *convolution_head(classes),
    )


def features(
    size: str,
    width: Fraction,
    *,
    cifar: bool = False,
    orthonormal: bool = False,
    expand_first: bool = True,
    squeezed: Callable[[int], int] = lambda expanded: expanded // 4,
) -> list[Named]:
    """Return the stem, the stages and the last convolution of the small or the large network.

    expand_first: whether the first unit has an expansion, which leaves the width as it is.
    squeezed: the width within squeeze and excite, of the expanded width.
    """
    before = int(width * STEM)
    stem = conv_bn(before, 3, "hard_swish", stride=1 if cifar else 2)
    units: list[list[Node]] = []
    for number, stage in enumerate(SMALL if size == "small" else LARGE):
        first = CIFAR_STRIDES[size][number] if cifar else stage.stride
        units.append([])
        for place, (expanded, channels, excited) in enumerate(stage.units):
            sizes = before, int(width * expanded), int(width * channels)
            unit = inverted_residual(
                *sizes,
                first if place == 0 else 1,
                kernel=stage.kernel,
                activation=stage.activation,
                squeezed=squeezed(sizes[1]) if excited else None,
                expand=expand_first or number > 0,
                orthonormal=orthonormal,
            )
            units[-1].append(unit)
            before = sizes[-1]
    final = conv_bn(int(max(width, Fraction(1)) * LAST[size]), 1, "hard_swish")
    return [("stem", stem), *numbered_stages(units), ("final", final)]
