"""MobileNets: as BSConv's tables have them, `[cifar_]mobilenetv1_wX[dY]` and so on, and GluonCV's.

Those of GluonCV, `mobilenetW`, `mobilenetv2_W`, `mobilenetv3_large` and `…_small`, differ in their
first and last layers, and in MobileNetV3's squeezed widths. Source: MobileNets, arXiv 1704.04861,
table 1; MobileNetV2, arXiv 1801.04381, table 2; Searching for MobileNetV3, arXiv 1905.02244, tables
1 and 2; BSConv, arXiv 2003.13549, section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from doconv_core.kinds.base import Recipe
from doconv_core.networks.blocks import (
    DEPTHWISE,
    Named,
    conv_bn,
    convolution_head,
    dense_head,
    squeeze_excite,
    stages,
)
from doconv_core.networks.nodes import (
    ORDINARY,
    Activation,
    BatchNorm,
    Conv,
    Dropout,
    Flatten,
    GlobalPool,
    Node,
    Residual,
    Sequence,
    sequence,
)

GLUON_WIDTHS = ("1.0", "0.75", "0.5", "0.25")
# On CIFAR's images, as the stem halves no size, so does the first stage that would.
CIFAR_STRIDES = (1, 1, 2, 2, 2)

V1_STEM = 32
V1_WIDTHS = ((64,), (128, 128), (256, 256), (512,) * 6, (1024, 1024))  # of the units of each stage
V1_STRIDES = (1, 2, 2, 2, 2)  # of each stage's first unit


class Stage(NamedTuple):
    """Units with depthwise convolutions of one kernel size and one activation.

    stride: of the first unit. units: expanded and output width of each, and whether it squeezes
    and excites.
    """

    kernel: int
    activation: str
    stride: int
    units: tuple[tuple[int, int, bool], ...]


class Table(NamedTuple):
    """A network of inverted residuals. stem, last: channels of the first and the last convolution.

    activation: of these two. least: the width that leaves a channel to every layer, also where
    squeeze and excite keeps a quarter. excited: whether there is one before the head.
    """

    stem: int
    stages: tuple[Stage, ...]
    last: int
    activation: str
    least: Fraction
    cifar_strides: tuple[int, ...] = CIFAR_STRIDES
    excited: bool = False


V2 = Table(32, (
    Stage(3, "relu6", 1, ((32, 16, False),)),
    Stage(3, "relu6", 2, ((96, 24, False), (144, 24, False))),
    Stage(3, "relu6", 2, ((144, 32, False), (192, 32, False), (192, 32, False))),
    Stage(3, "relu6", 2, ((192, 64, False), (384, 64, False), (384, 64, False), (384, 64, False),
                          (384, 96, False), (576, 96, False), (576, 96, False))),
    Stage(3, "relu6", 2, ((576, 160, False), (960, 160, False), (960, 160, False),
                          (960, 320, False))),
), 1280, "relu6", Fraction(1, 16))  # fmt: skip
V3_SMALL = Table(16, (
    Stage(3, "relu", 2, ((16, 16, True),)),
    Stage(3, "relu", 2, ((72, 24, False), (88, 24, False))),
    Stage(5, "hard_swish", 2, ((96, 40, True), (240, 40, True), (240, 40, True),
                               (120, 48, True), (144, 48, True))),
    Stage(5, "hard_swish", 2, ((288, 96, True), (576, 96, True), (576, 96, True))),
), 576, "hard_swish", Fraction(1, 4), (1, 2, 2, 2), excited=True)  # fmt: skip
V3_LARGE = Table(16, (
    Stage(3, "relu", 1, ((16, 16, False),)),
    Stage(3, "relu", 2, ((64, 24, False), (72, 24, False))),
    Stage(5, "relu", 2, ((72, 40, True), (120, 40, True), (120, 40, True))),
    Stage(3, "hard_swish", 2, ((240, 80, False), (200, 80, False), (184, 80, False),
                               (184, 80, False), (480, 112, True), (672, 112, True))),
    Stage(5, "hard_swish", 2, ((672, 160, True), (960, 160, True), (960, 160, True))),
), 960, "hard_swish", Fraction(1, 16))  # fmt: skip

TABLES = {"v2": V2, "v3_small": V3_SMALL, "v3_large": V3_LARGE}
# The width that leaves a channel to every layer.
LEAST = {"v1": Fraction(1, V1_STEM)} | {version: table.least for version, table in TABLES.items()}


def v1(width: Fraction, classes: int, kind: Recipe, *, cifar: bool) -> Sequence:
    """Return MobileNetV1 with `width` times the channels, of depthwise separable or BSConv units.

    kind: of what makes up a unit; ordinary for depthwise separable convolutions.
    """
    return sequence(
        ("input_bn", BatchNorm()),
        *_v1_features(width, kind, cifar=cifar),
        *convolution_head(classes),
    )


def gluon_v1(width: Fraction, classes: int) -> Sequence:
    """Return `mobilenetW`."""
    return sequence(*_v1_features(width), *dense_head(classes))


def _v1_features(width: Fraction, kind: Recipe = ORDINARY, *, cifar: bool = False) -> list[Named]:
    """Return the stem and the stages."""

    def unit(before: int, stride: int, channels: int) -> Node:
        if kind.name != "conv":
            return conv_bn(channels, 3, stride=stride, kind=kind)
        return sequence(
            ("depthwise", conv_bn(before, 3, stride=stride, groups=DEPTHWISE)),
            ("pointwise", conv_bn(channels)),
        )

    stem = int(width * V1_STEM)
    rows = [[(int(width * channels),) for channels in row] for row in V1_WIDTHS]
    return [
        ("stem", conv_bn(stem, 3, stride=1 if cifar else 2)),
        *stages(unit, rows, CIFAR_STRIDES if cifar else V1_STRIDES, stem),
    ]


def inverted(table: Table, width: Fraction, classes: int, kind: Recipe, *, cifar: bool) -> Sequence:
    """Return MobileNetV2 or V3 with `width` times the channels; the last gets no narrower.

    kind: for BSConv-S, which these networks are already, the linear convolutions are to be kept
    orthonormal in training.
    """
    last = _last(table, width)
    return sequence(
        ("input_bn", BatchNorm()),
        *_features(table, width, cifar=cifar, orthonormal=kind.name == "bsconvs"),
        ("squeeze_excite", squeeze_excite(last, last // 4)) if table.excited else None,
        *convolution_head(classes),
    )


def gluon_v2(width: Fraction, classes: int) -> Sequence:
    """Return `mobilenetv2_W`, whose first unit expands nothing and whose classifier has no bias."""
    features = _features(V2, width, expand_first=False)
    return sequence(*features, *convolution_head(classes, bias=False))


def gluon_v3(table: Table, classes: int) -> Sequence:
    """Return `mobilenetv3_small` or `mobilenetv3_large`, whose first unit expands nothing.

    Squeezed widths are the next multiples of 8; between the mean and the classifier is a layer
    of 1280 channels.
    """

    def squeezed(expanded: int) -> int:
        return -(-(expanded // 4) // 8) * 8

    return sequence(
        *_features(table, Fraction(1), expand_first=False, squeezed=squeezed),
        ("pool", GlobalPool()),
        ("hidden", sequence(("conv", Conv(1280)), ("hard_swish", Activation("hard_swish")))),
        ("dropout", Dropout(0.2)),
        ("classifier", Conv(classes, bias=True)),
        ("flatten", Flatten()),
    )


def _last(table: Table, width: Fraction) -> int:
    return int(max(width, Fraction(1)) * table.last)


def _features(
    table: Table,
    width: Fraction,
    *,
    cifar: bool = False,
    orthonormal: bool = False,
    expand_first: bool = True,
    squeezed: Callable[[int], int] = lambda expanded: expanded // 4,
) -> list[Named]:
    """Return the stem, the stages of inverted residuals and the last convolution.

    A unit expands, convolves depthwise, squeezes and excites, and projects linearly; it has a
    shortcut where neither width nor size change. expand_first: whether the first unit has an
    expansion, which leaves the width as it is. squeezed: the width within squeeze and excite, of
    the expanded width.
    """

    def unit(
        before: int, stride: int, stage: Stage, excited: bool, expanded: int, channels: int
    ) -> Node:
        act = stage.activation
        body = sequence(
            ("expand", conv_bn(expanded, 1, act)) if expand_first or expanded > before else None,
            ("depthwise", conv_bn(expanded, stage.kernel, act, stride=stride, groups=DEPTHWISE)),
            ("squeeze_excite", squeeze_excite(expanded, squeezed(expanded))) if excited else None,
            ("project", conv_bn(channels, 1, None, orthonormal=orthonormal)),
        )
        return Residual(body) if stride == 1 and before == channels else body

    stem = int(width * table.stem)
    strides = table.cifar_strides if cifar else [stage.stride for stage in table.stages]
    rows = [
        [(stage, excited, int(width * e), int(width * c)) for e, c, excited in stage.units]
        for stage in table.stages
    ]
    return [
        ("stem", conv_bn(stem, 3, table.activation, stride=1 if cifar else 2)),
        *stages(unit, rows, strides, stem),
        ("final", conv_bn(_last(table, width), 1, table.activation)),
    ]
