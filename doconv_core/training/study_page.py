"""What a study found, as text: a page with tables and curves, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from doconv_core.atomic import write_json, write_text
from doconv_core.training.html import COLOURS, Curve, document, plot, table
from doconv_core.training.study import (
    ACCURACY,
    EVAL_LOSS,
    FOUND,
    MEASURES,
    PAGE,
    TRAIN_LOSS,
    Study,
    findings,
)

UNKNOWN = "–"
RESULTS = (
    "", "runs", "top-1 [%]", "gain [points]", "wins", "loss in evaluation", "training loss",
    "of the baseline's", "epochs to its loss",
)  # fmt: skip
COSTS = (
    "", "parameters, folded", "in training", "multiply-accumulates", "of composing", "of branches",
    "seconds of a run",
)  # fmt: skip


def write(folder: Path, study: Study) -> dict[str, Any]:
    """Write what the finished runs of a study tell, as JSON and as a page, and return it."""
    found = findings(folder, study)
    write_json(folder / FOUND, found)
    write_text(folder / PAGE, page(found))
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """Return the results and the costs as two tables in Markdown."""
    return "\n".join(
        _markdown(heads, rows) for heads, rows in ((RESULTS, results(found)), (COSTS, costs(found)))
    )


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    marks = [":-", *["-:"] * (len(heads) - 1)]
    cells = ([cell.replace("|", "\\|") for cell in row] for row in (heads, marks, *rows))
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def results(found: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each arm: its measures, and what it gains over the first, the baseline."""
    return [_result(arm) for arm in found["arms"]]


def _result(arm: Mapping[str, Any]) -> list[str]:
    measures, against = arm["measures"], arm["against"]
    failed = f", {len(arm['failed'])} failed" if arm["failed"] else ""
    row = [
        arm["name"], f"{arm['finished']}{failed}", _plus_minus(measures[ACCURACY], 100, 2),
        UNKNOWN, UNKNOWN,
        _plus_minus(measures[EVAL_LOSS], 1, 4), _plus_minus(measures[TRAIN_LOSS], 1, 4),
        UNKNOWN, _epochs(arm["epochs_to_loss"]),
    ]  # fmt: skip
    if against is not None:
        gain, ratio = against[ACCURACY], against["train_loss_ratio"]
        row[3:5] = [interval(gain, 100, 2), _wins(gain)]
        row[7:] = [_share(ratio), _epochs(against["epochs_to_loss"])]
    return row


def _plus_minus(summary: Mapping[str, Any], scale: float, digits: int) -> str:
    """Return a mean, and the standard deviation where there is one."""
    if summary["mean"] is None:
        return UNKNOWN
    mean = f"{scale * summary['mean']:.{digits}f}"
    return mean if summary["std"] is None else f"{mean} ± {scale * summary['std']:.{digits}f}"


def interval(summary: Mapping[str, Any], scale: float, digits: int) -> str:
    """Return a mean with its sign, and the half of its 95 % interval where there is one."""
    if summary["mean"] is None:
        return UNKNOWN
    mean = f"{scale * summary['mean']:+.{digits}f}"
    if summary["high"] is None:
        return mean
    return f"{mean} ± {scale * (summary['high'] - summary['mean']):.{digits}f}"


def _wins(gain: Mapping[str, Any]) -> str:
    equal = f", {gain['equal']} equal" if gain["equal"] else ""
    return f"{gain['better']} of {gain['count']}{equal}"


def _share(ratio: Mapping[str, Any]) -> str:
    if ratio["mean"] is None:
        return UNKNOWN
    mean = f"{100 * ratio['mean']:.1f} %"
    if ratio["low"] is None:
        return mean
    return f"{mean} ({100 * ratio['low']:.1f} to {100 * ratio['high']:.1f})"


def _epochs(found: Mapping[str, Any]) -> str:
    """Return the median; infinite, so not known, where most runs do not come there."""
    if not found["count"]:
        return UNKNOWN
    some = found["reached"] < found["count"]
    reached = f" ({found['reached']} of {found['count']} come there)" if some else ""
    return f"{UNKNOWN if found['median'] is None else format(found['median'], '.1f')}{reached}"


def costs(found: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each arm: what it costs beside the first, the baseline."""
    base = found["arms"][0]["cost"]
    rows = []
    for arm in found["arms"]:
        cost = arm["cost"]
        cells = [f"{cost[n]:,}" for n in ("parameters", "training_parameters", "macs")]
        more = [f"{cost[n]:,}" for n in ("composition_macs", "branch_macs")]
        rows.append([arm["name"], *cells, *more, _seconds(cost, base)])
    return rows


def _seconds(cost: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    if cost["seconds"] is None:
        return UNKNOWN
    times = (
        ""
        if cost is base or not base["seconds"]
        else (f" ({cost['seconds'] / base['seconds']:.2f} times)")
    )
    return f"{cost['seconds']:.1f}{times}"


def sentence(found: Mapping[str, Any]) -> str:
    """Return what was compared, and how much of it is done."""
    seeds = len(found["seeds"])
    return (
        f"{found['finished']} of {found['runs']} runs on {found['data']} with the backend "
        f"{found['backend']} are finished: {len(found['arms'])} arms, "
        f"{seeds} seed{'s' * (seeds != 1)}."
    )


def page(found: Mapping[str, Any]) -> str:
    """Return the page, of what `findings` returns."""
    arms = found["arms"]
    title = f"{', '.join(arm['name'] for arm in arms)} on {found['data']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(sentence(found))} The baseline is {escape(arms[0]['name'])}. Runs of one seed "
        "are a pair: they see the same batches, and begin with the same weights in the layers that "
        "they have in common.</p>",
        "<h2>Results</h2>",
        table(RESULTS, results(found)),
        "<p>After the last epoch. ± is the standard deviation over the seeds; of the gain, which "
        "is the mean difference of pairs, the 95 % interval by Student's t. Wins: pairs in which "
        "top-1 is higher. The training loss as a share of the baseline's is the geometric mean of "
        "pairs, with its 95 % interval. Epochs to its loss: the median of when the training loss "
        "is that of the baseline of the same seed at its end.</p>",
        *_failures(arms),
        '<h2>Curves</h2><div class="plots">',
        *_plots(arms),
        "</div>",
        "<p>Bands of the first three are a standard deviation to either side; those of the "
        "differences are 95 % intervals.</p>",
        "<h2>Cost</h2>",
        table(COSTS, costs(found)),
        "<p>Of one image: multiply-accumulates of convolutions and linear layers once folded; "
        "composing the kernels is done once for a batch in training, what further branches compute "
        "for every image. Seconds are the median run's, "
        "on the machines that took part.</p>",
        "<h2>Recipes</h2>",
        table(("field", *(arm["name"] for arm in arms)), _recipes(arms), numeric=False),
        "<h2>Each seed's top-1</h2>",
        table(("seed", *(arm["name"] for arm in arms)), _seeds(found)),
    ]
    return document(title, parts)


def _failures(arms: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for arm in arms:
        for seed, reason in arm["failed"].items():
            told = f"{arm['name']}, seed {seed}, failed and counts in no mean: {reason}"
            yield f"<p>{escape(told)}</p>"


def _plots(arms: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    titles = {
        ACCURACY: "top-1 in evaluation", EVAL_LOSS: "loss in evaluation",
        TRAIN_LOSS: "training loss",
    }  # fmt: skip
    coloured = list(zip(arms, COLOURS * len(arms), strict=False))
    for name in MEASURES:
        curves = [Curve(arm["name"], **arm["curves"][name], colour=c) for arm, c in coloured]
        yield plot(titles[name], curves, _number(name))
    for name in (ACCURACY, TRAIN_LOSS) if len(arms) > 1 else ():
        curves = [
            Curve(arm["name"], **arm["against"]["curves"][name], colour=c)
            for arm, c in coloured[1:]
        ]
        yield plot(f"{titles[name]}, difference", curves, _number(name), zero=True)


def _number(name: str) -> Any:
    return (lambda v: f"{100 * v:.3g} %") if name == ACCURACY else (lambda v: f"{v:.3g}")


def _recipes(arms: Sequence[Mapping[str, Any]]) -> Iterable[list[str]]:
    for field in arms[0]["recipe"]:
        values = [arm["recipe"][field] for arm in arms]
        yield [
            field,
            *(
                ", ".join(v)
                if isinstance(v, list) and all(isinstance(each, str) for each in v)
                else str(v)
                for v in values
            ),
        ]


def _seeds(found: Mapping[str, Any]) -> Iterable[list[str]]:
    for seed in found["seeds"]:
        runs = [arm["seeds"].get(str(seed)) for arm in found["arms"]]
        yield [str(seed), *(UNKNOWN if r is None else f"{100 * r[ACCURACY]:.2f}" for r in runs)]
