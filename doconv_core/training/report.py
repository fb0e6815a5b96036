"""A run's report: one page without anything from elsewhere, of what its folder says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from math import log10, prod
from typing import Any

import numpy as np

from doconv_core.atomic import write_text
from doconv_core.kinds.do_conv import DO_CONV, identity
from doconv_core.maths.spec import ConvSpec
from doconv_core.networks.cost import count
from doconv_core.networks.names import known_name
from doconv_core.state.file import State, entry
from doconv_core.training.html import COLOURS, Curve, document, plot, table
from doconv_core.training.run import REPORT, Run

LEAST = 1e-9  # a loss that is drawn on a logarithmic axis


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
    told = f"{described['network'] or 'A model'} on {described['data']['name']}"
    return document(told, _parts(told, described, metrics, result))


def _parts(
    title: str,
    described: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    result: Mapping[str, Any],
) -> Iterator[str]:
    """Yield the parts of the page."""
    yield f"<h1>{escape(title)}</h1>"
    yield f"<p>{escape(_sentence(described, result))}</p>"
    yield f'<h2>Curves</h2><div class="plots">{"".join(_plots(metrics))}</div>'
    yield "<h2>Accuracy on the evaluation data</h2>"
    yield table(("", "top-1", "top-5", "loss"), _accuracies(result))
    yield f"<p>{escape(_difference(result))}</p>"
    if result["cost"] is not None:
        yield "<h2>Cost of one image</h2>"
        yield table(("", ""), _costs(result["cost"]))
    if result["moved"]:
        yield "<h2>How far each D has moved from the identity</h2>"
        yield table(("layer", "|D|/|E|", "max |D|"), _moves(result["moved"]))
    yield "<h2>Recipe</h2>"
    yield table(("field", ""), _fields(described["recipe"]), numeric=False)
    yield "<h2>With what</h2>"
    yield table(("", ""), _surroundings(described), numeric=False)


def _plots(metrics: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    def both(name: str, change: Callable[[float], float]) -> list[Curve]:
        named = (("training", "train", COLOURS[1]), ("evaluation", "eval", COLOURS[0]))
        return [
            Curve(told, [_changed(line[f"{part}_{name}"], change) for line in metrics],
                  colour=colour)
            for told, part, colour in named
        ]  # fmt: skip

    logarithms = both("loss", lambda loss: log10(max(loss, LEAST)))
    yield plot("loss", logarithms, lambda power: f"{10**power:.3g}")
    yield plot("top-1", both("top1", float), lambda share: f"{share:.0%}")
    rates = Curve("", [line["learning_rate"] for line in metrics], colour=COLOURS[-1])
    yield plot("learning rate", [rates], lambda rate: f"{rate:.3g}")


def _changed(value: float | None, change: Callable[[float], float]) -> float | None:
    return None if value is None else change(value)


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
        yield name, _percent(found["top1"]), _percent(found["top5"]), _number(found["loss"])


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


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
