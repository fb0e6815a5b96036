"""What a BSConv costs, in each of the forms that it may be folded to."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from doconv_core.kinds.bsconv import BSConvSpec
from doconv_core.kinds.do_conv_cost import Cost
from doconv_core.maths.spec import as_integer


class BSConvCost(NamedTuple):
    """What a BSConv layer costs in each form that it can be folded to.

    keep: as it is trained. merge: one pointwise and the depthwise convolution, with no batch norm
    between. dense: one ordinary convolution.
    """

    keep: Cost
    merge: Cost
    dense: Cost


def bsconv_cost(
    spec: BSConvSpec, positions: int, *, input_positions: int | None = None, bias: bool = True
) -> BSConvCost:
    """Return what the layer costs in each form.

    positions: output positions, at which the depthwise or dense convolution is computed.
    input_positions: those at which the pointwise ones are; as many where not given, which a stride
    makes more. Biases and batch norms count as parameters, not as multiply-accumulates.
    Raises TypeError or ValueError for what is not a positive integer.
    """
    out = as_integer("positions", positions)
    into = out if input_positions is None else as_integer("input_positions", input_positions)
    depthwise, biases = prod(spec.depthwise_shape), spec.out_channels if bias else 0
    pointwise = sum(map(prod, spec.pointwise_shapes))
    norms = 2 * sum(shape[0] for shape in spec.pointwise_shapes) if spec.with_bn else 0
    merged, dense = spec.in_channels * spec.out_channels, prod(spec.dense.kernel_shape)
    shift = spec.out_channels if spec.with_bn else 0  # a batch norm leaves the pointwise a bias
    return BSConvCost(
        keep=Cost(pointwise + norms + depthwise + biases, pointwise * into + depthwise * out),
        merge=Cost(merged + shift + depthwise + biases, merged * into + depthwise * out),
        dense=Cost(dense + max(biases, shift), dense * out),
    )
