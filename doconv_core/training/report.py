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
from doconv_core.training.html import Curve, document, plot, table
from doconv_core.training.run import REPORT, Run

COLOURS = {"train": "#c2571a", "eval": "#1f5fa8"}
NAMES = {"train": "training", "eval": "evaluation"}


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
        _plot("loss", metrics, ("train_loss", "eval_loss"), lambda value: f"{value:.3g}"),
        _plot("top-1", metrics, ("train_top1", "eval_top1"), lambda value: f"{value:.0%}"),
        _plot("learning rate", metrics, ("learning_rate",), lambda value: f"{value:.3g}"),
        "</div>",
        "<h2>Accuracy on the evaluation data</h2>",
        table(("", "top-1", "top-5", "loss"), _accuracies(result)),
        f"<p>{escape(_difference(result))}</p>",
    ]
    if result["cost"] is not None:
        parts += [
            "<h2>Cost of one image</h2>",
            table(("", ""), _costs(result["cost"]), numeric=False),
        ]
    if result["moved"]:
        parts += [
            "<h2>How far each D has moved from the identity</h2>",
            table(("layer", "|D|/|E|", "max |D|"), _moves(result["moved"])),
        ]
    parts += ["<h2>Recipe</h2>", table(("field", ""), _fields(described["recipe"]), numeric=False)]
    parts += ["<h2>With what</h2>", table(("", ""), _surroundings(described), numeric=False)]
    return document(told, parts)


def _plot(
    title: str,
    metrics: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    text: Callable[[float], str],
) -> str:
    """Return an SVG of numbers over the epochs. names: of the metrics; text: of a number."""
    curves = []
    for name in names:
        part = name.partition("_")[0]
        values = [float(line[name]) for line in metrics]
        curves.append(Curve(NAMES.get(part, ""), values, colour=COLOURS.get(part, "#444")))
    return plot(title, curves, text)


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
