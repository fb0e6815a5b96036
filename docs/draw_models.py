"""Draw accuracy against parameters and operations, of BSConv's published tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator, NullFormatter

from doconv_core.atomic import replacing

Row = dict[str, str]

# What a name ends with, what it is called, and its look: colours that everybody tells apart, and
# markers that need none.
KINDS = (
    ("", "ordinary", "o", "#000000"),
    ("_bsconvu", "BSConv-U", "s", "#0072B2"),
    ("_bsconvs_p1d4", "BSConv-S, p = 1/4", "^", "#D55E00"),
)
FAMILIES = {"ResNets": "cifar_resnet", "WRN-28": "cifar_wrn28_", "WRN-40": "cifar_wrn40_"}
VARIES = {"ResNets": "depth", "WRN-28": "width factor", "WRN-40": "width factor"}
AMOUNTS = {"parameters": "parameters [millions]", "flops": "FLOPs [millions]"}
ACCURACY = "accuracy on CIFAR100, top-1 [%]"


def draw(rows: Sequence[Row], amount: str, path: Path) -> None:
    """Draw the tables side by side to an SVG file, which is replaced whole or not at all.

    rows: of `bsconv_cifar100.csv`. amount: "parameters" or "flops", for the horizontal axis.
    """
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, len(FAMILIES), sharey=True)
    for axes, table in zip(panels, FAMILIES, strict=True):
        _panel(axes, table, [row for row in rows if row["table"] == table], amount)
    panels[0].set_ylabel(ACCURACY)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(KINDS), frameon=False)
    # The same drawing gives the same file.
    with mpl.rc_context({"svg.hashsalt": "doconv"}), replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None}, facecolor="white")


def _panel(axes: Axes, table: str, rows: Sequence[Row], amount: str) -> None:
    """Draw one line for each kind, whose points come in the order of the numbers in their names."""
    for suffix, label, marker, color in KINDS:
        found = by_number(FAMILIES[table], suffix, rows)
        x = [float(row[f"{amount}_millions"]) for row in found.values()]
        y = [float(row["accuracy_percent"]) for row in found.values()]
        axes.plot(x, y, marker=marker, color=color, label=label, linewidth=1.4, markersize=6)
    numbers = ", ".join(map(str, by_number(FAMILIES[table], "", rows)))
    axes.set_title(f"{table}\n{VARIES[table]} {numbers}, from left to right", fontsize=10)
    axes.set(xscale="log", xlabel=AMOUNTS[amount])
    axes.margins(x=0.08)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MultipleLocator(2))
    axes.grid(alpha=0.3)


def by_number(start: str, suffix: str, rows: Sequence[Row]) -> dict[int, Row]:
    """Return the rows whose names are `start`, a number and `suffix`, by that number, in order."""
    pattern = re.compile(f"{start}([0-9]+){suffix}")
    found = {int(name[1]): row for row in rows if (name := pattern.fullmatch(row["model"]))}
    return dict(sorted(found.items()))
