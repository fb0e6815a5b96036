"""GluonCV's MobileNets for ImageNet: `mobilenetW`, `mobilenetv2_W`, `mobilenetv3_large`, `…_small`.

They are those of BSConv's tables but for their first and last layers and MobileNetV3's squeezed
widths. Source: arXiv 1704.04861, 1801.04381 and 1905.02244.
"""

from __future__ import annotations

from fractions import Fraction

from doconv_core.networks import mobilenetv1, mobilenetv2, mobilenetv3
from doconv_core.networks.blocks import convolution_head, dense_head
from doconv_core.networks.nodes import (
    Activation,
    Conv,
    Dropout,
    Flatten,
    GlobalPool,
    Sequence,
    sequence,
)

WIDTHS = ("1.0", "0.75", "0.5", "0.25")


def v1(width: Fraction, classes: int) -> Sequence:
    """Return `mobilenetW`."""
    return sequence(*mobilenetv1.features(width), *dense_head(classes))


def v2(width: Fraction, classes: int) -> Sequence:
    """Return `mobilenetv2_W`, whose first unit expands nothing and whose classifier has no bias."""
    features = mobilenetv2.features(width, expand_first=False)
    return sequence(*features, *convolution_head(classes, bias=False))


def v3(size: str, classes: int) -> Sequence:
    """Return `mobilenetv3_small` or `mobilenetv3_large`, whose first unit expands nothing.

    Squeezed widths are the next multiples of 8; between the mean and the classifier is a layer
    of 1280 channels.
    """

    def squeezed(expanded: int) -> int:
        return -(-(expanded // 4) // 8) * 8

    features = mobilenetv3.features(size, Fraction(1), expand_first=False, squeezed=squeezed)
    return sequence(
        *features,
        ("pool", GlobalPool()),
        ("hidden", sequence(("conv", Conv(1280)), ("hard_swish", Activation("hard_swish")))),
        ("dropout", Dropout(0.2)),
        ("classifier", Conv(classes, bias=True)),
        ("flatten", Flatten()),
    )
