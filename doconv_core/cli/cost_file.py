"""What a checkpoint's layers cost, where the places are given at which they work."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from doconv_core.cli.options import (
    Place,
    matching,
    require_kernel_sizes,
)
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.layers import CONVOLUTION, LINEAR, Layer
from doconv_core.kinds.base import Cost
from doconv_core.kinds.do_conv import LayerCost, layer_cost
from doconv_core.maths.spec import ConvSpec
from doconv_core.models.report import place as named


class LayerAt(NamedTuple):
    """A layer of a file and its cost. output: the spatial size of its output; None if not told.

    cost: at this output, or at one position where none is told; None where the kernel size is not
    known, and for layers that multiply nothing.
    """

    layer: Layer
    output: tuple[int, ...] | None
    cost: LayerCost | None


class FileCost(NamedTuple):
    """The cost of a file's layers, in its order, and of all that are at known places together.

    total: parameters of all layers, in training and folded; multiply-accumulates of those whose
    places are told. uncounted: the layers whose multiply-accumulates are not in it.
    """

    layers: list[LayerAt]
    total: LayerCost
    uncounted: list[LayerAt]


def cost_of_file(
    checkpoint: Checkpoint,
    places: Sequence[tuple[str, Place]],
    input_size: tuple[int, ...] | None,
    batch: int,
) -> FileCost:
    """Return the cost of each layer and of all. places: by glob pattern; the last match counts.

    Of several copies of a model in the file, the first is looked at. A linear layer works at one
    position unless a pattern says otherwise. Raises ValueError for a pattern that matches nothing,
    and for a place of another number of dimensions than the kernel's, or relative to no input.
    """
    layers = []
    for layer in checkpoint.layers:
        if layer.part == checkpoint.parts[0]:
            output = _output(layer, places, input_size)
            positions = 1 if output is None else prod(output)
            layers.append(LayerAt(layer, output, _cost(checkpoint, layer, positions, batch)))
    require_kernel_sizes(checkpoint, [at.layer for at in layers])
    names = [at.layer.name for at in layers if at.layer.kind in (CONVOLUTION, LINEAR)]
    for pattern, place in places:
        if not any(matching(name, [(pattern, place)]) for name in names):
            raise ValueError(
                f"--at: {pattern!r} matches no convolution or linear layer; the file has such as "
                f"{', '.join(map(repr, names[:3])) or 'none'}."
            )
    uncounted = [at for at in layers if at.layer.kind in (CONVOLUTION, LINEAR) and not at.output]
    return FileCost(layers, _total(checkpoint, layers), uncounted)


def _total(checkpoint: Checkpoint, layers: Sequence[LayerAt]) -> LayerCost:
    trained = sum(checkpoint.parameters(at.layer) for at in layers)
    folded = sum(checkpoint.folded_parameters(at.layer) or 0 for at in layers)
    costs = [at.cost for at in layers if at.output is not None and at.cost is not None]
    parameters = {"ordinary": folded, "folded": folded}
    return LayerCost(
        **{
            form: Cost(parameters.get(form, trained), sum(getattr(c, form).macs for c in costs))
            for form in LayerCost._fields
        }
    )


def _output(
    layer: Layer, places: Sequence[tuple[str, Place]], input_size: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    if layer.kind not in (CONVOLUTION, LINEAR):
        return None
    place = matching(layer.name, places)
    if place is None:
        return (1,) if layer.kind == LINEAR and places else None
    output = place.of(input_size)
    shape = layer.kernel_shape
    if layer.kind == CONVOLUTION and shape is not None and len(output) != len(shape) - 2:
        raise ValueError(
            f"{named(layer.name)} has a kernel of {len(shape) - 2} dimensions; received an output "
            f"of {len(output)}."
        )
    return output


def _cost(checkpoint: Checkpoint, layer: Layer, positions: int, batch: int) -> LayerCost | None:
    shape = layer.kernel_shape
    if layer.kind not in (CONVOLUTION, LINEAR) or shape is None:
        return None
    if layer.over_parameterized and isinstance(layer.spec, ConvSpec):
        return layer_cost(layer.spec, positions, batch=batch, bias="bias" in layer.entries)
    # Of an ordinary convolution, the groups are not known, nor is there a D that would need them.
    return LayerCost(*[Cost(checkpoint.parameters(layer), prod(shape) * positions * batch)] * 4)
