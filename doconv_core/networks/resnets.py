"""ResNets: as BSConv's tables have them, GluonCV's for ImageNet, and a plain network.

`[cifar_]resnetN`, of basic units; `[cifar_]preresnetN` and `cifar_wrnN_K`, whose units begin with
batch norm and ReLU; GluonCV's `resnetN_v1`, `_v1b`, `_v2` and ResNeXt, which differ in where a
bottleneck has its stride, and in which convolutions have a bias.
Source: Deep residual learning, arXiv 1512.03385; Identity mappings, arXiv 1603.05027; Wide residual
networks, arXiv 1605.07146; Aggregated residual transformations, arXiv 1611.05431; BSConv, arXiv
2003.13549, section 5; DO-Conv, arXiv 2006.12030, table 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from doconv_core.kinds.base import Recipe
from doconv_core.networks.blocks import (
    RELU,
    Named,
    conv_bn,
    convolution_head,
    dense_head,
    large_stem,
    stages,
)
from doconv_core.networks.nodes import (
    ORDINARY,
    Activation,
    BatchNorm,
    Conv,
    Node,
    Residual,
    Sequence,
    sequence,
)

# The convolutions of a unit, of its channels and its stride.
Convs: TypeAlias = "Callable[[int, int], tuple[Conv, ...]]"

# Depth: units of each stage. A unit has two convolutions, and the stem and the classifier one each.
UNITS = {
    10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 26: (3, 3, 3, 3),
    34: (3, 4, 6, 3), 68: (3, 4, 23, 3), 102: (3, 8, 36, 3),
}  # fmt: skip
WIDTHS = (64, 128, 256, 512)
CIFAR_UNITS = {6 * n + 2: (n, n, n) for n in (3, 9, 18, 50, 100)}
CIFAR_WIDTHS = (16, 32, 64)
WIDE_UNITS = {6 * n + 4: (n, n, n) for n in (2, 4, 6)}
# Of GluonCV's, units are basic ones up to a depth of 34, then bottlenecks.
GLUON_UNITS = {
    18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3),
}  # fmt: skip
BOTTLENECK_WIDTHS = (256, 512, 1024, 2048)


def resnet(depth: int, classes: int, kind: Recipe, *, cifar: bool) -> Sequence:
    """Return the network of this depth, with 3x3 convolutions of this kind."""
    counts, widths = (CIFAR_UNITS[depth], CIFAR_WIDTHS) if cifar else (UNITS[depth], WIDTHS)
    return sequence(
        ("input_bn", BatchNorm()),
        ("stem", conv_bn(widths[0], 3, kind=kind) if cifar else large_stem()),
        *_post_activated(counts, widths, widths[0], _basic(kind)),
        *convolution_head(classes),
    )


def preresnet(depth: int, classes: int, kind: Recipe, *, cifar: bool) -> Sequence:
    """Return the network of this depth, with 3x3 convolutions of this kind."""
    if cifar:
        return _small(CIFAR_UNITS[depth], 1, classes, kind)
    return sequence(
        ("input_bn", BatchNorm()),
        ("stem", large_stem()),
        *_pre_activated(UNITS[depth], WIDTHS, WIDTHS[0], _basic(kind)),
        *convolution_head(classes),
    )


def wide(depth: int, factor: int, classes: int, kind: Recipe) -> Sequence:
    """Return the wide ResNet of this depth, its stages `factor` times as wide, its stem not."""
    return _small(WIDE_UNITS[depth], factor, classes, kind)


def _small(counts: tuple[int, ...], factor: int, classes: int, kind: Recipe) -> Sequence:
    stem = CIFAR_WIDTHS[0]
    widths = [factor * width for width in CIFAR_WIDTHS]
    return sequence(
        ("input_bn", BatchNorm()),
        ("stem", sequence(("conv", Conv(stem, (3, 3), kind=kind)))),
        *_pre_activated(counts, widths, stem, _basic(kind)),
        *convolution_head(classes),
    )


def resnet_v1(depth: int, classes: int) -> Sequence:
    """Return `resnetN_v1`, whose bottlenecks have their stride and biases in 1x1 convolutions."""

    def bottleneck(width: int, stride: int) -> tuple[Conv, ...]:
        first, last = Conv(width // 4, stride=stride, bias=True), Conv(width, bias=True)
        return first, Conv(width // 4, (3, 3)), last

    return _gluon(depth, classes, bottleneck)


def resnet_v1b(depth: int, classes: int) -> Sequence:
    """Return `resnetN_v1b`, whose bottlenecks have their stride in the 3x3 convolution."""
    return _gluon(depth, classes, _bottleneck)


def resnext(depth: int, cardinality: int, width: int, classes: int) -> Sequence:
    """Return `resnextN_CxWd`: C groups, each of W channels in the first stage."""

    def bottleneck(channels: int, stride: int) -> tuple[Conv, ...]:
        inner = cardinality * width * channels // BOTTLENECK_WIDTHS[0]
        grouped = Conv(inner, (3, 3), stride, groups=cardinality)
        return Conv(inner), grouped, Conv(channels)

    return _gluon(depth, classes, bottleneck)


def _gluon(depth: int, classes: int, bottleneck: Convs) -> Sequence:
    widths, convs = (WIDTHS, _basic()) if depth < 50 else (BOTTLENECK_WIDTHS, bottleneck)
    return sequence(
        ("stem", large_stem()),
        *_post_activated(GLUON_UNITS[depth], widths, WIDTHS[0], convs),
        *dense_head(classes),
    )


def resnet_v2(depth: int, classes: int) -> Sequence:
    """Return `resnetN_v2`, whose units begin with batch norm and ReLU."""
    widths, convs = (WIDTHS, _basic()) if depth < 50 else (BOTTLENECK_WIDTHS, _bottleneck)
    return sequence(
        ("input_bn", BatchNorm(affine=False)),
        ("stem", large_stem()),
        *_pre_activated(GLUON_UNITS[depth], widths, WIDTHS[0], convs),
        *dense_head(classes),
    )


GLUON_VERSIONS = {"v1": resnet_v1, "v1b": resnet_v1b, "v2": resnet_v2}


def plain(classes: int) -> Sequence:
    """Return `plain18`: `resnet18_v1` without shortcuts."""

    def unit(before: int, stride: int, width: int) -> Sequence:
        return sequence(*_body("conv bn relu", _basic()(width, stride)))

    return sequence(
        ("stem", large_stem()),
        *_stages(unit, GLUON_UNITS[18], WIDTHS, WIDTHS[0]),
        *dense_head(classes),
    )


def _basic(kind: Recipe = ORDINARY) -> Convs:
    """Return what makes the convolutions of a basic unit."""

    def convs(width: int, stride: int) -> tuple[Conv, ...]:
        return Conv(width, (3, 3), stride, kind=kind), Conv(width, (3, 3), kind=kind)

    return convs


def _bottleneck(width: int, stride: int) -> tuple[Conv, ...]:
    return Conv(width // 4), Conv(width // 4, (3, 3), stride), Conv(width)


def _body(order: str, convs: tuple[Conv, ...]) -> list[Named]:
    """Return the convolutions with batch norms and ReLUs, numbered; `order` is of the three."""
    return [
        (f"{name}{n}", {"conv": conv, "bn": BatchNorm(), "relu": RELU}[name])
        for n, conv in enumerate(convs, 1)
        for name in order.split()
    ]


def _post_activated(
    counts: Iterable[int], widths: Iterable[int], before: int, convs: Convs
) -> list[Named]:
    """Return the stages of units that end with the ReLU of a sum."""

    def unit(before: int, stride: int, width: int) -> Residual:
        shortcut = Sequence()
        if before != width or stride != 1:
            shortcut = conv_bn(width, activation=None, stride=stride)
        *body, _ = _body("conv bn relu", convs(width, stride))  # the last ReLU is the sum's
        return Residual(sequence(*body), shortcut)

    return _stages(unit, counts, widths, before, RELU)


def _pre_activated(
    counts: Iterable[int], widths: Iterable[int], before: int, convs: Convs
) -> list[Named]:
    """Return the stages of units that begin with batch norm and ReLU, and those behind the last.

    The shortcut of a unit is its own input. Where width or size change, it is a projection of what
    the first batch norm and ReLU make of it; the sum is then named "residual".
    """

    def unit(before: int, stride: int, width: int) -> Node:
        norm, relu, *body = _body("bn relu conv", convs(width, stride))
        if before == width and stride == 1:
            return Residual(sequence(norm, relu, *body))
        shortcut = sequence(("conv", Conv(width, stride=stride)))
        return sequence(norm, relu, ("residual", Residual(sequence(*body), shortcut)))

    final = sequence(("bn", BatchNorm()), ("relu", RELU))
    return [*_stages(unit, counts, widths, before), ("final", final)]


def _stages(
    unit: Callable[[int, int, int], Node],
    counts: Iterable[int],
    widths: Iterable[int],
    before: int,
    activation: Activation | None = None,
) -> list[Named]:
    """Return the stages, of so many units of one width; all but the first halve the size."""
    rows = [[(width,)] * count for count, width in zip(counts, widths, strict=True)]
    return stages(unit, rows, (1, *(2 for _ in rows[1:])), before, activation=activation)
