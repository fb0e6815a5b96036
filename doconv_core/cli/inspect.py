"""`doconv inspect`: what is in a checkpoint, and how far each D has moved from the identity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from doconv_core.cli.command import (
    counted,
    note_of,
    number,
    opened,
    print_json,
    print_table,
    progress,
    say,
    size,
)
from doconv_core.cli.options import (
    KernelSizes,
    allow_option,
    epsilon_option,
    json_option,
    kernel_size_option,
    source_argument,
)
from doconv_core.files.blocks import Block
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.layers import OTHER, D, Layer
from doconv_core.kinds.do_conv import DO_CONV, identity
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.numeric import Array, widened
from doconv_core.maths.spec import ConvSpec


@click.command(short_help="Show what is in a checkpoint.")
@click.argument("file", type=source_argument)
@kernel_size_option
@allow_option
@epsilon_option
@json_option
def inspect(
    file: Path,
    kernel_sizes: KernelSizes,
    allow: Sequence[str],
    epsilon: float | None,
    as_json: bool,
) -> None:
    """Show the layers of FILE: sizes, parameters, and what training has made of each D.

    |D|/|E| is the Frobenius norm of D relative to the identity's, rank the lowest of E + D over the
    input channels, condition the ratio of its largest singular value to its smallest, of the median
    and of the worst channel. A block of branches, such as RepVGG's, is one layer, with the name of
    the convolution that it is to be.

    \b
    Examples:
      doconv inspect model.pt
      doconv inspect model.safetensors --json
    """  # noqa: D301
    with opened(file, kernel_sizes, allow, epsilon) as checkpoint:
        layers = checkpoint.with_blocks(checkpoint.in_order)
        over_parameterized = [
            x for x in checkpoint.in_order if x.over_parameterized and D in x.entries
        ]
        measures = {}
        with progress("measuring") as step:
            for done, layer in enumerate(over_parameterized):
                step(done, len(over_parameterized))
                dtype = checkpoint.entries[layer.entries[D]].dtype
                depthwise = _depthwise_of(checkpoint, layer)
                if depthwise is not None:
                    measures[layer.name] = measure(depthwise, dtype)
        if as_json:
            print_json(_as_object(checkpoint, layers, measures))
        else:
            _print(checkpoint, layers, measures)


def _as_object(
    checkpoint: Checkpoint, layers: Sequence[Layer], measures: dict[str, Measures]
) -> dict[str, Any]:
    return {
        "file": str(checkpoint.path),
        "format": checkpoint.format,
        "bytes": checkpoint.path.stat().st_size,
        "layers": [_layer_object(checkpoint, layer, measures) for layer in layers],
        "others": list(checkpoint.others),
        **_totals(checkpoint, layers),
    }


def _layer_object(
    checkpoint: Checkpoint, layer: Layer, measures: dict[str, Measures]
) -> dict[str, Any]:
    block = None
    if isinstance(layer, Block):
        block = {
            "family": layer.family,
            "folds_to": layer.folded,
            "epsilon": None if not layer.is_untold else layer.epsilon,
            "layers": [_layer_object(checkpoint, each, measures) for each in layer.layers],
        }
    found = measures.get(layer.name) if layer.over_parameterized else None
    entries = {}
    for role, name in layer.entries.items():
        entry = checkpoint.entries[name]
        entries[role] = {"name": name, "shape": entry.shape, "dtype": entry.dtype}
    return {
        "path": layer.path,
        "part": layer.part,
        "kind": layer.kind,
        "origin": layer.origin,
        "over_parameterized": layer.over_parameterized,
        "kernel_shape": layer.kernel_shape,
        "entries": entries,
        "parameters": checkpoint.parameters(layer),
        "parameters_folded": checkpoint.folded_parameters(layer),
        "depthwise": None if found is None else found._asdict(),
        "block": block,
        "note": note_of(layer),
    }


def _totals(checkpoint: Checkpoint, layers: Sequence[Layer]) -> dict[str, Any]:
    """Return the parameters of the model; folded ones are None where a layer's are not known.

    Of several copies of it, such as an average, those of the first are counted.
    """
    first = checkpoint.parts[:1]  # found anew in all layers at each call
    layers = [layer for layer in layers if layer.part in first]
    folded = [checkpoint.folded_parameters(layer) for layer in layers]
    known = [count for count in folded if count is not None]
    return {
        "parameters": sum(checkpoint.parameters(layer) for layer in layers),
        "parameters_folded": sum(known) if len(known) == len(folded) else None,
    }


def _print(checkpoint: Checkpoint, layers: Sequence[Layer], measures: dict[str, Measures]) -> None:
    totals = _totals(checkpoint, layers)
    inner = [each for x in layers for each in (x.layers if isinstance(x, Block) else (x,))]
    blocks = sum(isinstance(layer, Block) for layer in layers)
    say(
        f"{checkpoint.path}: {checkpoint.format}, {counted(len(inner), 'layer')}, "
        f"{sum(layer.over_parameterized for layer in inner)} of them over-parameterized"
        + (f", {counted(blocks, 'block')} of branches" if blocks else "")
    )
    rows = [_layer_row(checkpoint, layer) for layer in layers]
    total = ["total", "", "", "", *map(number, totals.values())]
    click.echo()
    print_table(
        ["layer", "kind", "shape", "dtype", "parameters", "folded"], [*rows, total], text_columns=4
    )
    if measures:
        click.echo()
        print_table(
            ["over-parameterized", "D", "|D|/|E|", "max |D|", "rank", "condition", "worst"],
            [_measures_row(checkpoint, layer, measures) for layer in inner
             if D in layer.entries and layer.name in measures],
        )  # fmt: skip
    notes = [f"{layer.name}: {note_of(layer)}" for layer in layers if layer.note]
    untold = {layer.epsilon for layer in layers if isinstance(layer, Block) and layer.is_untold}
    for epsilon in untold:
        taken = "--epsilon says it" if epsilon is None else f"{epsilon:g}"
        notes.append(f"the file does not tell the epsilon of the blocks' batch norms: {taken}")
    if checkpoint.others:
        notes.append(f"also in the file: {', '.join(checkpoint.others)}")
    if notes:
        click.echo()
    for note in notes:
        say(note)


def _layer_row(checkpoint: Checkpoint, layer: Layer) -> list[str]:
    entries = [checkpoint.entries[name] for name in layer.entries.values()]
    kind = layer.kind
    if layer.composed is not None:
        kind = "DO-Conv" if layer.composed is DO_CONV else layer.composed.name
    if layer.origin.startswith("reference"):
        kind = f"{kind}, {layer.origin}"
    if isinstance(layer, Block):
        kind = f"{layer.family} block, to be {layer.becomes or 'a convolution'}"
    shape = layer.kernel_shape or entries[0].shape
    return [
        layer.name or "(the model itself)",
        kind,
        size(shape) if layer.kernel_shape or len(entries) == 1 or layer.kind != OTHER else "",
        ", ".join(dict.fromkeys(entry.dtype for entry in entries)),
        number(checkpoint.parameters(layer)),
        number(checkpoint.folded_parameters(layer)),
    ]


def _measures_row(checkpoint: Checkpoint, layer: Layer, measures: dict[str, Measures]) -> list[str]:
    found = measures[layer.name]
    depthwise = checkpoint.entries[layer.entries[D]]
    return [
        layer.name or "(the model itself)",
        size(depthwise.shape),
        f"{found.relative:.3g}",
        f"{found.largest:.3g}",
        f"{found.least_rank:g} of {found.taps}",
        f"{found.median_condition:.4g}",
        f"{found.worst_condition:.4g}",
    ]


_CHUNK = 1 << 22  # entries of which the singular values are computed at once: 32 MiB


class Measures(NamedTuple):
    """What is worth knowing of one layer's `D`, over its input channels.

    relative: `‖D‖ / ‖E‖`, Frobenius norms over all channels. largest: the largest `|D|`.
    taps: `M`, which is full rank. least_rank, median_rank: numerical ranks of `E + D`, a
    singular value counting where it exceeds `max(M, S)` roundings of the largest.
    median_condition, worst_condition: the ratio of the largest singular value to the smallest;
    infinite where the smallest is 0. All but `taps` are NaN where D is not finite.
    """

    relative: float
    largest: float
    taps: int
    least_rank: float
    median_rank: float
    median_condition: float
    worst_condition: float


def measure(depthwise: Array, dtype: str) -> Measures:
    """Return the measures of `D`, `(I, M, S)`. dtype: in which it is stored, by name."""
    channels, taps, multiplier = depthwise.shape
    if not np.isfinite(depthwise).all():
        return Measures(np.nan, np.nan, taps, *(np.nan,) * 4)
    unit = identity(ConvSpec(1, 1, (taps,), 1, multiplier))
    squares = np.square(widened(depthwise), dtype=np.float64).sum()
    singular = _singular_values(depthwise, unit)
    rounding = {"bfloat16": 2.0**-7}.get(dtype) or float(np.finfo(dtype).eps)
    ranks = (singular > singular[:, :1] * rounding * max(taps, multiplier)).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        conditions = singular[:, 0] / singular[:, -1]
    conditions[np.isnan(conditions)] = np.inf  # E + D is 0
    return Measures(
        relative=float(np.sqrt(squares / (np.square(unit).sum() * channels))),
        largest=float(np.abs(depthwise).max()),
        taps=taps,
        least_rank=float(ranks.min()),
        median_rank=float(np.median(ranks)),
        median_condition=float(np.median(conditions)),
        worst_condition=float(conditions.max()),
    )


def _singular_values(depthwise: Array, unit: Array) -> Array:
    """Return those of each channel's `E + D`, in float64, largest first: `(I, M)`."""
    step = max(1, _CHUNK // unit.size)
    parts = [
        np.linalg.svd(unit + depthwise[start : start + step], compute_uv=False)
        for start in range(0, len(depthwise), step)
    ]
    values: Array = np.concatenate(parts)
    return values


def _depthwise_of(checkpoint: Checkpoint, layer: Layer) -> Array | None:
    """Return an over-parameterized layer's D, `(I, M, S)`; None where its S is below M."""
    try:
        return checkpoint.pair(layer)[1]
    except NotFoldable:
        # Of a grouped layer of the reference's in PyTorch, only how W meets D is another.
        depthwise = checkpoint.read(layer.entries[D])
        is_pytorch = layer.origin == "reference PyTorch"
        return depthwise if is_pytorch and depthwise.shape[1] <= depthwise.shape[2] else None
