"""ResNets whose units begin with batch norm and ReLU: `[cifar_]preresnetN`, `cifar_wrnN_K`.

Source: Identity mappings, arXiv 1603.05027; Wide residual networks, arXiv 1605.07146; BSConv,
arXiv 2003.13549, section 5.
"""

from __future__ import annotations

from doconv_core.kinds.base import Recipe
from doconv_core.networks import resnet
from doconv_core.networks.blocks import RELU, Named, convolution_head, large_stem, stages
from doconv_core.networks.nodes import (
    BatchNorm,
    Conv,
    Node,
    Residual,
    Sequence,
    sequence,
)

WIDE_UNITS = {16: (2, 2, 2), 28: (4, 4, 4), 40: (6, 6, 6)}  # by depth, of each stage


def preresnet(depth: int, classes: int, kind: Recipe, *, cifar: bool) -> Sequence:
    """Return the network of this depth, with 3x3 convolutions of this kind."""
    if cifar:
        return _small(resnet.CIFAR_UNITS[depth], 1, classes, kind)
    return sequence(
        ("input_bn", BatchNorm()),
        ("stem", large_stem(resnet.WIDTHS[0])),
        *_stages(resnet.UNITS[depth], resnet.WIDTHS, resnet.WIDTHS[0], kind),
        *convolution_head(classes),
    )


def wide(depth: int, factor: int, classes: int, kind: Recipe) -> Sequence:
    """Return the wide ResNet of this depth, its stages `factor` times as wide, its stem not."""
    return _small(WIDE_UNITS[depth], factor, classes, kind)


def _small(counts: tuple[int, ...], factor: int, classes: int, kind: Recipe) -> Sequence:
    widths = tuple(factor * width for width in resnet.CIFAR_WIDTHS)
    before = resnet.CIFAR_WIDTHS[0]
    return sequence(
        ("input_bn", BatchNorm()),
        ("stem", sequence(("conv", Conv(before, (3, 3), kind=kind)))),
        *_stages(counts, widths, before, kind),
        *convolution_head(classes),
    )


def _stages(
    counts: tuple[int, ...], widths: tuple[int, ...], before: int, kind: Recipe
) -> list[Named]:
    def unit(before: int, width: int, stride: int) -> Node:
        return pre_activated(before, width, stride, basic(width, stride, kind))

    return [*stages(unit, counts, widths, before), ("final", bn_relu())]


def basic(width: int, stride: int, kind: Recipe) -> Sequence:
    """Return the body of a basic unit, after its first batch norm and ReLU."""
    return sequence(
        ("conv1", Conv(width, (3, 3), stride, kind=kind)),
        ("bn2", BatchNorm()),
        ("relu2", RELU),
        ("conv2", Conv(width, (3, 3), kind=kind)),
    )


def pre_activated(before: int, width: int, stride: int, body: Sequence) -> Node:
    """Return a unit: batch norm, ReLU and `body`, with its shortcut.

    The shortcut is the unit's own input. Where width or size change, it is a projection of what
    the first batch norm and ReLU make of it; the sum is then named "residual".
    """
    first: tuple[Named, ...] = (("bn1", BatchNorm()), ("relu1", RELU))
    if before == width and stride == 1:
        return Residual(sequence(*first, *body.children))
    shortcut = sequence(("conv", Conv(width, stride=stride)))
    return sequence(*first, ("residual", Residual(body, shortcut)))


def bn_relu() -> Sequence:
    """Return the batch norm and ReLU that follow the last unit."""
    return sequence(("bn", BatchNorm()), ("relu", RELU))
