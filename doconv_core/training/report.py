"""A run's report: one page without anything from elsewhere, of what its folder says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from math import prod
from typing import Any

import numpy as np

from doconv_core.atomic import write_text
from doconv_core.kinds.do_conv import DO_CONV, identity
from doconv_core.maths.spec import ConvSpec
from doconv_core.networks.cost import count
from doconv_core.networks.names import known_name
from doconv_core.state.file import State, entry
from doconv_core.training.run import REPORT, Run

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 460, 260, 56, 34, 14  # of a plot, and its margins, in pixels
COLOURS = {"train": "#c2571a", "eval": "#1f5fa8"}
NAMES = {"train": "training", "eval": "evaluation"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .9rem .15rem 0; text-align: left;
  vertical-align: top; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; } .plots { display: flex; flex-wrap: wrap; gap: 1rem; }
"""


def moved(state: State) -> dict[str, dict[str, float]]:
    """Return how far training has moved each D from zero, by its layer's path.

    relative: the Frobenius norm of D to that of the identity that it is added to. largest: of its
    entries, without sign.
    """
    found = {}
    for path, form in state.layers.items():
        if form.composed is not DO_CONV or not isinstance(form.spec, ConvSpec):
            continue
        array = state.arrays.get(entry(path, DO_CONV.names[1]))
        if array is None:
            continue
        depthwise = array.astype(np.float64)
        whole = np.linalg.norm(identity(form.spec)) * np.sqrt(len(depthwise))
        relative, largest = np.linalg.norm(depthwise) / whole, np.abs(depthwise).max()
        found[path] = {"relative": float(relative), "largest": float(largest)}
    return found


def cost_of(
    described: Mapping[str, Any], state: State, image: tuple[int, int, int]
) -> dict[str, Any] | None:
    """Return what a network costs for one image; None for one that no name describes.

    described: of the run, whose network and options are counted if that gives the parameters that
    the state has.
    """
    name = known_name(described.get("network"))
    if name is None:
        return None
    options = described["notes"].get("options", {})
    found = count(name, image, described["data"]["classes"], **options)
    trained = sum(
        prod(shape)
        for form in state.layers.values()
        for role, shape in form.shapes.items()
        if not role.startswith(("running_", "inactive"))
    )
    if found.training_parameters != trained:
        return None
    names = ("parameters", "training_parameters", "macs", "flops")
    return {"input": list(image), **{name: getattr(found, name) for name in names}}


def write_report(run: Run) -> None:
    """Write the report of a run that has come to its end into its folder."""
    write_text(run.folder / REPORT, page(run.described, run.metrics(), run.result))


def page(
    described: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], result: Mapping[str, Any]
) -> str:
    """Return the report's HTML, of what a run's files say."""
    title = described.get("network") or "A model"
    told = f"{title} on {described['data']['name']}"
    parts = [
        f"<h1>{escape(told)}</h1>",
        f"<p>{escape(_sentence(described, result))}</p>",
        '<h2>Curves</h2><div class="plots">',
        plot("loss", metrics, ("train_loss", "eval_loss"), lambda value: f"{value:.3g}"),
        plot("top-1", metrics, ("train_top1", "eval_top1"), lambda value: f"{value:.0%}"),
        plot("learning rate", metrics, ("learning_rate",), lambda value: f"{value:.3g}"),
        "</div>",
        "<h2>Accuracy on the evaluation data</h2>",
        _table(("", "top-1", "top-5", "loss"), _accuracies(result)),
        f"<p>{escape(_difference(result))}</p>",
    ]
    if result["cost"] is not None:
        parts += ["<h2>Cost of one image</h2>", _table(("", ""), _costs(result["cost"]))]
    if result["moved"]:
        parts += [
            "<h2>How far each D has moved from the identity</h2>",
            _table(("layer", "|D|/|E|", "max |D|"), _moves(result["moved"])),
        ]
    parts += ["<h2>Recipe</h2>", _table(("field", ""), _fields(described["recipe"]))]
    parts += ["<h2>With what</h2>", _table(("", ""), _surroundings(described))]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f"<title>{escape(told)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body>\n"
        "</html>\n"
    )


def plot(
    title: str,
    metrics: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    text: Callable[[float], str],
) -> str:
    """Return an SVG of numbers over the epochs. names: of the metrics; text: of a number."""
    lines = {name: [float(line[name]) for line in metrics] for name in names}
    values = [value for line in lines.values() for value in line]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low == high:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    last = max(len(metrics), 2)

    def at(epoch: int, value: float) -> tuple[float, float]:
        x = LEFT + (epoch - 1) / (last - 1) * (WIDTH - LEFT - 10)
        return x, TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    drawn = [_frame(title, low, high, last, text)]
    for number, (name, line) in enumerate(lines.items()):
        part = name.partition("_")[0]
        colour = COLOURS.get(part, "#444")
        points = " ".join("{:.1f},{:.1f}".format(*at(n, v)) for n, v in enumerate(line, 1))
        drawn.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        if len(line) == 1:
            x, y = at(1, line[0])
            drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        if part in NAMES:
            drawn.append(_text(WIDTH - 10, TOP + 14 + 16 * number, NAMES[part], "end", colour))
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(drawn)}</svg>'
    )


def _frame(title: str, low: float, high: float, last: int, text: Callable[[float], str]) -> str:
    """Return a plot's grid, with the numbers beside it."""
    drawn = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)
        drawn.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 10}" stroke="#ddd"/>')
        drawn.append(_text(LEFT - 6, y + 4, text(low + share * (high - low)), "end"))
    for epoch, anchor, x in ((1, "start", LEFT), (last, "end", WIDTH - 10)):
        drawn.append(_text(x, HEIGHT - BOTTOM + 16, str(epoch), anchor))
    drawn.append(_text((LEFT + WIDTH) / 2, HEIGHT - 6, f"{title}, by epoch", "middle"))
    return "".join(drawn)


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#444") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="12" '
        f'font-family="system-ui, sans-serif" fill="{colour}">{escape(text)}</text>'
    )


def _sentence(described: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    data, recipe = described["data"], described["recipe"]
    best = result["best"]
    return (
        f"Trained by the recipe {recipe['name']} for {recipe['epochs']} epochs on "
        f"{data['train']:,} images of {data['classes']} classes, evaluated on {data['val']:,}, "
        f"seed {described['seed']}, in {described['framework']} {described['framework_version']}. "
        f"The best epoch in evaluation was {best['epoch']}, with {_percent(best['eval_top1'])}; "
        "what is folded is the model after the last."
    )


def _difference(result: Mapping[str, Any]) -> str:
    found = result["difference"]
    return (
        f"The outputs before and after folding differ by at most {found['absolute']:.2g}, "
        f"{found['relative']:.2g} of the largest."
    )


def _accuracies(result: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for name in ("trained", "folded"):
        found = result[name]
        yield name, _percent(found["top1"]), _percent(found["top5"]), f"{found['loss']:.4f}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _costs(cost: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    yield "input", "×".join(map(str, cost["input"]))
    if cost["training_parameters"] != cost["parameters"]:
        yield "parameters in training", f"{cost['training_parameters']:,}"
    yield "parameters, folded", f"{cost['parameters']:,}"
    yield "multiply-accumulates, folded", f"{cost['macs']:,}"
    yield "operations by BSConv's rule", f"{cost['flops']:,}"


def _moves(found: Mapping[str, Mapping[str, float]]) -> Iterable[tuple[str, ...]]:
    for path, one in found.items():
        yield path or "(the model itself)", f"{one['relative']:.3g}", f"{one['largest']:.3g}"


def _fields(recipe: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for name, value in recipe.items():
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _surroundings(described: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for part in ("versions", "machine", "engine"):
        yield from ((name, str(value)) for name, value in described[part].items())
    yield "processes", str(described["processes"])
    yield "began", described["began"]


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table: the first column is text, and the others numbers where there are several."""
    numeric = ' class="n"' if len(headings) > 2 else ""
    lines = []
    for tag, cells in (("th", headings), *(("td", row) for row in rows)):
        first, *others = map(escape, cells)
        more = "".join(f"<{tag}{numeric}>{cell}</{tag}>" for cell in others)
        lines.append(f"<tr><{tag}>{first}</{tag}>{more}</tr>")
    return f"<table>{''.join(lines)}</table>"
