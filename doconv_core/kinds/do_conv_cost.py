"""What a layer costs, in parameters and multiply-accumulates, in each of its forms."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from doconv_core.maths.spec import ConvSpec, as_integer


class Cost(NamedTuple):
    """parameters: weights and biases held. macs: multiply-accumulates of one forward pass."""

    parameters: int
    macs: int


class LayerCost(NamedTuple):
    """The cost of one layer in each of its forms.

    ordinary: the convolution it replaces. kernel_composed: in training, composing the kernel once
    for the whole batch. feature_composed: in training, a depthwise then a pointwise convolution of
    the data. folded: the ordinary convolution it becomes, so the same as `ordinary`.
    """

    ordinary: Cost
    kernel_composed: Cost
    feature_composed: Cost
    folded: Cost


def layer_cost(spec: ConvSpec, positions: int, *, batch: int = 1, bias: bool = True) -> LayerCost:
    """Return what the layer costs as an ordinary, a composed and a folded convolution.

    positions: output positions of one image, `H·W` in two dimensions. batch: images, `B`.
    Biases count as parameters, not as multiply-accumulates. A kernel of one tap has no D, and all
    forms cost the same. Raises TypeError or ValueError for what is not a positive integer.
    Source: DO-Conv, arXiv 2006.12030, section on training and inference cost.
    """
    images = as_integer("positions", positions) * as_integer("batch", batch)
    biases = spec.out_channels if bias else 0
    kernel = prod(spec.kernel_shape)
    ordinary = Cost(kernel + biases, kernel * images)
    if spec.depthwise_shape is None:
        return LayerCost(ordinary, ordinary, ordinary, ordinary)
    weight, depthwise = prod(spec.weight_shape), prod(spec.depthwise_shape)
    trained = weight + depthwise + biases
    composition = depthwise * spec.out_channels_per_group
    return LayerCost(
        ordinary=ordinary,
        kernel_composed=Cost(trained, ordinary.macs + composition),
        feature_composed=Cost(trained, (depthwise + weight) * images),
        folded=ordinary,
    )
