"""What `doconv cost` prints and draws of a network that is given by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from doconv_core.atomic import replacing
from doconv_core.cli.command import (
    MISSING,
    Failure,
    check_target,
    counted,
    number,
    print_json,
    print_table,
    size,
    writing_to,
)
from doconv_core.networks.cost import NO_HEADS, CountedLayer, NetworkCost, count
from doconv_core.networks.families import enumerated
from doconv_core.networks.names import describe

PER_IMAGE = ("flops", "macs", "dgc_flops", "branch_macs")
PLOTS = (".png", ".svg", ".pdf")
MOST_NAMES = 60  # beside a plot; more could not be read


def cost_network(
    name: str,
    input_size: tuple[int, ...] | None,
    classes: int | None,
    batch: int,
    plot: Path | None,
    force: bool,
    as_json: bool,
    options: Mapping[str, Any],
) -> None:
    """Print what a network costs, and draw it to `plot` if that is given."""
    if plot is not None:
        _check_plot(plot, force)
    try:
        describe(name)
    except ValueError as error:
        reason = str(error).removeprefix(f"{name!r} is no network: ")
        raise click.UsageError(
            f"{name!r} is no file, and no layer such as 64,64,3x3, and no network: {reason}"
        ) from None
    try:
        found = _cost_of_network(name, input_size, classes, options)
    except (TypeError, ValueError) as error:
        raise click.UsageError(f"{name}: {error}") from None
    if plot is not None:
        _draw(found, batch, plot, force)
    if as_json:
        _print_json(found, batch)
    else:
        _print(found, batch)


def _cost_of_network(
    name: str,
    input_size: tuple[int, ...] | None,
    classes: int | None,
    options: Mapping[str, Any],
) -> NetworkCost:
    """Return what a network costs for one image; ValueError for what gives no network.

    input_size: with or without its channels; None for that of the images it is for.
    """
    shape = input_size
    if input_size is not None and len(input_size) not in (2, 3):
        raise ValueError(
            "--input of a network is rows and columns, such as 224x224, or channels before them, "
            f"such as 3x224x224; received {size(input_size)}."
        )
    if input_size is not None and len(input_size) == 2:
        shape = (describe(name).input_shape[0], *input_size)
    return count(name, shape, classes, **options)


def _print(found: NetworkCost, batch: int) -> None:
    """Print the table of its layers and its totals."""
    click.echo(f"{found.name}: {counted(batch, 'image')} of {size(found.input_shape)}")
    click.echo()
    operations = found.flops
    print_table(
        ["layer", "kind", "kernel", "input", "output",
         "parameters", "multiply-accumulates", "operations", "share"],
        [_row(layer, batch, operations) for layer in found.layers],
        text_columns=5,
    )  # fmt: skip
    click.echo()
    print_table(["total", ""], [[what, number(n)] for what, n in _totals(found, batch)])


def _row(layer: CountedLayer, batch: int, operations: int) -> list[str]:
    share = f"{100 * layer.flops / operations:.1f} %" if operations else ""
    return [
        layer.path, layer.kind, size(layer.kernel_size or ()), size(layer.before),
        size(layer.after), number(layer.parameters), number(batch * layer.macs),
        number(batch * layer.flops), share,
    ]  # fmt: skip


def _totals(found: NetworkCost, batch: int) -> list[tuple[str, Any]]:
    totals: list[tuple[str, Any]] = [
        ("parameters", found.parameters),
        ("multiply-accumulates", batch * found.macs),
        ("operations", batch * found.flops),
    ]
    if found.training_parameters != found.parameters:
        totals[0] = ("parameters, folded", found.parameters)
        totals.insert(1, ("parameters in training", found.training_parameters))
        if found.composition_macs:
            totals.append(("multiply-accumulates of composing the kernels", found.composition_macs))
        if found.branch_macs:
            totals.append(
                ("multiply-accumulates of branches in training", batch * found.branch_macs)
            )
    heads = found.heads
    if heads != NO_HEADS:
        totals += [
            ("parameters of the selectors among them", heads.parameters),
            ("operations by DGC's rule", _plain(batch * found.dgc_flops)),
            ("multiply-accumulates, dropped channels skipped", batch * _skipping(found)),
            ("numbers gathered for that", batch * heads.gathered),
        ]
    return totals


def _plain(value: float) -> float:
    """Return a number without a fraction as an integer."""
    return int(value) if value == int(value) else value


def _skipping(found: NetworkCost) -> int:
    """Return the multiply-accumulates of one image where channels that heads drop are skipped."""
    return int(found.macs - found.heads.dense + found.heads.kept + found.heads.selector)


def _print_json(found: NetworkCost, batch: int) -> None:
    """Print its layers and its totals as JSON."""
    dynamic = found.heads != NO_HEADS

    def scaled(cost: dict[str, Any]) -> dict[str, Any]:
        told = {key: batch * cost[key] if key in PER_IMAGE else cost[key] for key in cost}
        by_dgc, heads = told.pop("dgc_flops"), told.pop("heads")
        branches = told.pop("branch_macs")
        told |= {"dgc_flops": by_dgc, "heads": heads and heads._asdict()} if dynamic else {}
        return {**told, "branch_macs": branches} if found.branch_macs else told

    total = {
        key: getattr(found, key)
        for key in ("parameters", *PER_IMAGE, "training_parameters", "composition_macs", "heads")
    }
    print_json(
        {
            "network": found.name,
            "batch": batch,
            "input": found.input_shape,
            "output": found.output_shape,
            "layers": [scaled(asdict(layer)) for layer in found.layers],
            "total": scaled(total),
        }
    )


def _check_plot(target: Path, force: bool) -> None:
    """Raise Failure where a plot cannot be drawn or written to `target`."""
    if target.suffix.lower() not in PLOTS:
        raise click.UsageError(
            f"--plot: OUT must end in {enumerated(PLOTS)}; received {target.name!r}."
        )
    check_target(target, force)
    try:
        import matplotlib  # noqa: F401  # here, as the rest of the command does without it
    except ImportError:
        raise Failure(
            "--plot needs matplotlib, which is not installed. Install it with: "
            'python -m pip install "overconv[samples]"',
            MISSING,
        ) from None


def _draw(found: NetworkCost, batch: int, target: Path, force: bool) -> None:
    """Draw what its convolutions and linear layers cost, the first on top, to `target`."""
    from matplotlib.figure import Figure

    layers = [layer for layer in found.layers if layer.macs]
    every = -(-len(layers) // MOST_NAMES)
    height = 2 + 0.16 * min(len(layers), MOST_NAMES)
    figure = Figure(figsize=(11, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(layers))
    left.barh(places, [layer.parameters for layer in layers], color="tab:blue")
    right.barh(places, [batch * layer.flops for layer in layers], color="tab:orange")
    left.set_yticks(places[::every], [layer.path for layer in layers[::every]], fontsize=7)
    left.set_ylim(len(layers) - 0.5, -0.5)
    left.set_title("parameters")
    right.set_title("operations")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
    others = 100 * (1 - sum(layer.flops for layer in layers) / found.flops)
    figure.suptitle(
        f"{found.name}, {counted(batch, 'image')} of {size(found.input_shape)}\n"
        f"other layers take {others:.1f} % of the operations"
    )
    with writing_to(target), replacing(target, overwrite=force) as temporary:
        figure.savefig(temporary, dpi=120)
