"""What `doconv cost` prints of a checkpoint: its layers, where they work, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import click

from doconv_core.cli.command import (
    counted,
    number,
    print_json,
    print_table,
    require_kernel_sizes,
    say,
    size,
)
from doconv_core.cli.options import (
    Place,
    matching,
)
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.layers import CONVOLUTION, DYNAMIC, LINEAR, Layer
from doconv_core.kinds.base import Cost
from doconv_core.kinds.do_conv import DO_CONV, LayerCost, layer_cost
from doconv_core.models.report import place as named

MULTIPLY = (CONVOLUTION, LINEAR, DYNAMIC)  # heads as all their channels do, without the selectors
FORMS = {
    "ordinary": "ordinary",
    "kernel_composed": "in training, composing the kernel",
    "feature_composed": "in training, composing the features",
    "folded": "folded",
}


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


def cost_file(
    checkpoint: Checkpoint,
    places: Sequence[tuple[str, Place]],
    input_size: tuple[int, ...] | None,
    batch: int,
    as_json: bool,
) -> None:
    """Print what the layers of a file cost, each and all. A place that fits none is wrong usage."""
    try:
        found = _cost_of_file(checkpoint, places, input_size, batch)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if as_json:
        print_json(_file_object(str(checkpoint.path), batch, found))
    else:
        _print_file(str(checkpoint.path), batch, found)


def _cost_of_file(
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
    first = checkpoint.parts[:1]  # found anew in all layers at each call
    for layer in checkpoint.in_order:
        if layer.part in first:
            output = _output(layer, places, input_size)
            positions = 1 if output is None else prod(output)
            layers.append(LayerAt(layer, output, _cost(checkpoint, layer, positions, batch)))
    require_kernel_sizes(checkpoint, [at.layer for at in layers])
    names = [at.layer.name for at in layers if at.layer.kind in MULTIPLY]
    for pattern, place in places:
        if not any(matching(name, [(pattern, place)]) for name in names):
            raise ValueError(
                f"--at: {pattern!r} matches no convolution or linear layer; the file has such as "
                f"{', '.join(map(repr, names[:3])) or 'none'}."
            )
    uncounted = [at for at in layers if at.layer.kind in MULTIPLY and not at.output]
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
    if layer.kind not in MULTIPLY:
        return None
    place = matching(layer.name, places)
    if place is None:
        return (1,) if layer.kind == LINEAR and places else None
    output = place.of(input_size)
    shape = layer.kernel_shape
    if layer.kind != LINEAR and shape is not None and len(output) != len(shape) - 2:
        raise ValueError(
            f"{named(layer.name)} has a kernel of {len(shape) - 2} dimensions; received an output "
            f"of {len(output)}."
        )
    return output


def _cost(checkpoint: Checkpoint, layer: Layer, positions: int, batch: int) -> LayerCost | None:
    shape = layer.kernel_shape
    if layer.kind not in MULTIPLY or shape is None:
        return None
    spec: Any = layer.spec
    kind = layer.composed
    if kind is not None and spec is not None:
        bias = "bias" in layer.entries
        if kind is DO_CONV:
            return layer_cost(spec, positions, batch=batch, bias=bias)
        trained = kind.training_cost(spec, positions * batch, bias=bias)
        ordinary = Cost(prod(shape) + (shape[0] if bias else 0), prod(shape) * positions * batch)
        return LayerCost(ordinary, trained, trained, ordinary)  # no features of it are composed
    # Of an ordinary convolution, the groups are not known, nor is there a D that would need them.
    return LayerCost(*[Cost(checkpoint.parameters(layer), prod(shape) * positions * batch)] * 4)


def _file_object(file: str, batch: int, found: FileCost) -> dict[str, Any]:
    return {
        "file": file,
        "batch": batch,
        "layers": [
            {
                "path": at.layer.path,
                "part": at.layer.part,
                "kind": at.layer.kind,
                "output": at.output,
                "cost": None if at.cost is None else forms_object(at.cost),
            }
            for at in found.layers
        ],
        "uncounted": [at.layer.name for at in found.uncounted],
        "total": forms_object(found.total),
    }


def _print_file(subject: str, batch: int, found: FileCost) -> None:
    images = counted(batch, "image")
    if found.uncounted:
        say(f"{subject}: {images}; where no output is told, for one position of it")
    else:
        say(f"{subject}: {images}")
    click.echo()
    rows = []
    for at in found.layers:
        if at.cost is not None:
            output = "one position" if at.output is None else size(at.output)
            macs = [number(getattr(at.cost, form).macs) for form in FORMS if form != "folded"]
            rows.append([at.layer.name, size(at.layer.kernel_shape or ()), output, *macs])
    print_table(
        ["layer", "kernel", "output", "ordinary, folded", "composing the kernel", "the features"],
        rows,
        text_columns=3,
    )
    click.echo()
    if not any(at.output for at in found.layers):
        total = found.total
        click.echo(
            f"parameters: {number(total.folded.parameters)} ordinary and folded, "
            f"{number(total.kernel_composed.parameters)} in training"
        )
        return
    print_forms(found.total)
    if found.uncounted:
        names = [at.layer.name for at in found.uncounted]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        click.echo()
        say(f"not in the total, as --at does not tell their output: {shown}")


def forms_object(found: LayerCost) -> dict[str, Any]:
    """Return the cost of each form for JSON."""
    return {form: getattr(found, form)._asdict() for form in FORMS}


def print_forms(found: LayerCost) -> None:
    """Print the table of what each form costs."""
    least = found.ordinary.macs
    print_table(
        ["", "parameters", "multiply-accumulates", "ratio"],
        [
            [name, number(c.parameters), number(c.macs), f"{c.macs / least:.3f}" if least else ""]
            for name, c in ((name, getattr(found, form)) for form, name in FORMS.items())
        ],
    )
