"""The comparison's report: one HTML file that needs nothing else, with the tables and the plots."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from compare_files import Recorded
from compare_problem import (
    CONVOLUTIONS,
    LEARNING_RATE,
    MOMENTUM,
    TRAINED,
    WEIGHT_DECAY,
    Answer,
)
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from doconv_core import compose
from doconv_core.atomic import write_text

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border-bottom: 1px solid #ccc; padding: .3rem .8rem; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.ok { color: #17652c; } .bad { color: #b00020; font-weight: bold; }
img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
.wide img { min-width: 44rem; }
h1 { overflow-wrap: break-word; }
@media (max-width: 40rem) { body { margin: 1rem auto; } th, td { padding: .3rem .4rem; } }
"""


def write_report(
    path: Path,
    rows: Sequence[Any],
    core: Answer,
    recorded: Sequence[Recorded],
    samples: Mapping[str, Path],
) -> None:
    """Write the report to `path`, atomically.

    rows: the table's. core and recorded: whose curves are drawn. samples: the JSON files that the
    samples wrote, by framework.
    """
    curves = [(record.title, record.answer.losses) for record in recorded]
    parts = [
        "<h1>DO-Conv, framework by framework</h1>",
        "<p>One network, one initial state and one sequence of batches of handwritten digits, in "
        "each framework in float32 and in the NumPy core in float64. Differences are the largest "
        "of any entry from the core's result; relative ones are divided by the largest entry of "
        "that result, those of the loss by the loss of the same step.</p>",
        _differences(rows),
        f"<h2>{len(core.losses)} steps of training</h2>",
        f"<p>Stochastic gradient descent: learning rate {LEARNING_RATE}, momentum {MOMENTUM}, "
        f"weight decay {WEIGHT_DECAY}.</p>",
        _image(draw_losses(core.losses, curves), "Loss curves and their differences"),
        "<h2>A trained layer</h2>",
        "<p>The first convolution after training: its depthwise weight D, which began as noise "
        "about a tenth as large as the identity; and the kernel of each output channel as it would "
        "be without D, and as it is composed with it.</p>",
        _image(draw_layer(core.trained), "D and the kernel before and after composition"),
        _samples(samples),
    ]
    write_text(
        path,
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1"><title>DO-Conv: comparison'
        f"</title><style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n",
    )


def draw_losses(core: np.ndarray, curves: Sequence[tuple[str, np.ndarray]]) -> Figure:
    """Draw the loss curves over each other, and their relative difference from the core's."""
    figure = Figure(figsize=(11, 4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(core, color="0.8", linewidth=8, label="NumPy core, float64")
    largest = 50 * TRAINED  # with room for the legend
    for n, (title, losses) in enumerate(curves):
        # Curves that lie on each other can all be seen: the later the narrower, and their markers
        # at steps of their own.
        style = {
            "linewidth": max(1.0, 5.5 - 2 * n),
            "marker": "osD^v"[n % 5],
            "markevery": (4 * n, 4 * max(len(curves), 3)),
            "markersize": 7,
            "markeredgecolor": "white",
        }
        (line,) = left.plot(losses, label=title, **style)
        relative = np.abs(losses - core) / np.abs(core)
        largest = max(largest, 2 * np.nanmax(relative))
        # A logarithmic axis has no zero; equal steps are drawn at its lower end.
        style |= {"linewidth": 1.5, "color": line.get_color()}
        right.semilogy(np.maximum(relative, 1e-9), label=title, **style)
    right.axhline(TRAINED, color="k", linewidth=1, linestyle="--", label="allowed")
    right.set(ylim=(5e-10, largest), title="relative difference from the core")
    left.set(title="loss", ylim=(0, None))
    for axes, columns in ((left, 1), (right, 2)):
        axes.set(xlabel="step")
        axes.legend(loc="upper right", ncols=columns)
    return figure


def draw_layer(trained: Mapping[str, np.ndarray]) -> Figure:
    """Draw the first layer's D, and its kernels with D taken as zero and as it is."""
    layer = CONVOLUTIONS[0]
    weight = trained[f"{layer.name}.weight"]
    depthwise = trained[f"{layer.name}.depthwise_weight"]
    before = compose(weight, np.zeros_like(depthwise), layer.spec)
    after = compose(weight, depthwise, layer.spec)
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.9))
    axes = left.subplots()
    limit = np.abs(depthwise).max()
    drawn = axes.imshow(depthwise[0], cmap="RdBu", vmin=-limit, vmax=limit)
    axes.set(title="D of input channel 0", xlabel="depth-multiplier index s", ylabel="tap m")
    left.colorbar(drawn, ax=axes, shrink=0.7)
    limit = max(np.abs(before).max(), np.abs(after).max())
    grid = right.subplots(4, 6)
    for channel in range(12):
        row, column = divmod(channel, 6)
        for offset, kernel in ((0, before), (1, after)):
            axes = grid[2 * row + offset, column]
            drawn = axes.imshow(kernel[channel, 0], cmap="RdBu", vmin=-limit, vmax=limit)
            axes.set(xticks=[], yticks=[])
            if column == 0:
                axes.set_ylabel(("before", "after")[offset])
            if offset == 0:
                axes.set_title(f"output {channel}", fontsize=9)
    right.colorbar(drawn, ax=grid, shrink=0.7)
    return figure


def _image(figure: Figure, description: str) -> str:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    data = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">'
    return f'<div class="wide">{image}</div>'


def _differences(rows: Sequence[Any]) -> str:
    body = []
    for row in rows:
        verdict = '<td class="ok">ok</td>' if row.passed else '<td class="bad">exceeded</td>'
        numbers = (f"{row.absolute:.2e}", f"{row.relative:.2e}", f"{row.allowed:.0e}")
        body.append(
            f"<tr><td>{escape(row.framework)}</td><td>{escape(row.result)}</td>"
            + "".join(f'<td class="number">{number}</td>' for number in numbers)
            + f"{verdict}</tr>"
        )
    head = ("framework", "result", "largest difference", "relative", "allowed", "")
    return _table(head, body)


def _samples(samples: Mapping[str, Path]) -> str:
    """Return the samples' accuracies; nothing where they were not run."""
    if not samples:
        return ""
    body = []
    for title, file in samples.items():
        report = json.loads(file.read_text(encoding="utf-8"))
        accuracy, fold = report["accuracy"], report["fold"]
        cells = [f"{np.mean(accuracy[layer]):.2f} %" for layer in ("conv", "doconv")]
        apart = fold["largest_difference"]
        cells += ["not finite" if apart is None else f"{apart:.2e}"]
        cells += ["yes" if fold["all_predictions_agree"] else "no"]
        body.append(
            f"<tr><td>{escape(title)}</td>"
            + "".join(f'<td class="number">{cell}</td>' for cell in cells)
            + "</tr>"
        )
    head = ("sample", "baseline", "DO-Conv", "folding changes outputs by", "predictions agree")
    note = "<p>One short run each, which shows that they run, not how well they do.</p>"
    return "<h2>The samples</h2>" + note + _table(head, body)


def _table(head: Sequence[str], body: Sequence[str]) -> str:
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="wide">{table}</div>'
