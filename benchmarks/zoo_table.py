"""The document of the sweep: a table for each zoo, what was left in it, and what failed and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from zoo_check import DISTURBANCE, ROUNDINGS
from zoo_networks import TITLES, ZOOS, Network
from zoo_row import Row

_INTRODUCTION = f"""\
# Every network in the zoos

This table was written by

```sh
python benchmarks/zoo.py
```

The zoos are those of pytorchcv, keras.applications and GluonCV, and this package's own networks by
name in each framework, with ordinary, DO-Conv and BSConv layers: a selection, of every family.

(`--zoo torch` tries one zoo again, `--only "resnet*"` some networks of each, and the others keep
their rows; `--resume` goes on where a sweep was interrupted.)

Each network is built with random weights; its batch norms get random scales and offsets, and the
statistics of a batch, disturbed. Then it is

1. over-parameterized, and its output compared with the original's, in evaluation and in training
   mode, and again after both have gathered statistics: they must be equal bit for bit;
2. trained by one step: the loss must be finite, and every D must have moved. Every D then gets
   normal noise of standard deviation {DISTURBANCE}, so that folding has something to do everywhere;
3. folded: the output must be equal bit for bit, the parameters as many as at first, and no layer of
   this package be left; BSConv layers are folded to their parts;
4. folded with its batch norms fused into the convolutions before them. That rounds every kernel
   once more, and the difference may be {ROUNDINGS} times that of another rounding, which stands
   beside it: every number of the batch norms moved to one of its neighbours in float32.

"Replaced" must be the number of ordinary convolutions of more than one tap. Networks whose names
end in `_doconv` are built of DO-Conv layers: "replaced" counts those, and they are held against the
ordinary networks, whose parameters stand first. "Over-parameterized" is the largest difference of
1, in both modes; "folded" and "fused" are relative to the largest entry of the trained network's
output. "Norms" are the batch norms that were fused, of all there are. Times are those of one run.
"""

_HEAD = (
    "network", "input", "replaced", "left", "parameters", "in training", "folded",
    "over-parameterized", "folded", "fused", "rounding", "norms", "seconds", "result",
)  # fmt: skip


def document(rows: Sequence[Row]) -> str:
    """Return the document, in Markdown."""
    parts = [_INTRODUCTION]
    for zoo, networks in ZOOS.items():
        found = {row.name: row for row in rows if row.zoo == zoo}
        order = [(found[network.name], network) for network in networks if network.name in found]
        if order:
            parts += _section(TITLES[zoo], order)
    return "\n".join(parts)


def _section(title: str, order: Sequence[tuple[Row, Network]]) -> Iterable[str]:
    verdicts = Counter(row.verdict(network) for row, network in order)
    counts = ", ".join(f"{count} {name}" for name, count in verdicts.items())
    versions = "; ".join(sorted({row.versions for row, _ in order} - {""}))
    yield f"## {title}\n"
    yield f"{versions}. {len(order)} networks: {counts}.\n"
    yield _table(_HEAD, [_cells(row, network) for row, network in order])
    yield from _counted("Left as they were", [row.left for row, _ in order])
    yield from _counted("Batch norms that were not fused", [row.unfused for row, _ in order])
    notes: dict[str, list[str]] = {}
    for _, network in order:
        notes.setdefault(network.note, []).append(network.name)
    lines = [f"- {', '.join(names)}: {note}" for note, names in notes.items() if note]
    if lines:
        yield "\n".join(["Notes:\n", *lines]) + "\n"
    failed = [(row, network) for row, network in order if row.problems]
    if failed:
        yield "What did not hold, and why:\n"
        lines = (
            f"- {row.name}: {'; '.join(row.problems)}. "
            f"**{row.explanation(network) or 'Not explained'}.**"
            for row, network in failed
        )
        yield "\n".join(lines) + "\n"


def _counted(title: str, counts: Iterable[Mapping[str, int]]) -> Iterable[str]:
    total: Counter[str] = Counter()
    for count in counts:
        for what, number in count.items():
            total[re.sub("'[^']*'", "…", what)] += number  # names of layers are no reasons
    if total:
        lines = (f"- {number} × {what}" for what, number in total.most_common())
        yield "\n".join([f"{title}, in all of them:\n", *lines]) + "\n"


def _cells(row: Row, network: Network) -> list[str]:
    counts = [f"{count:,}" for count in row.parameters]
    over = None if row.over is None or row.over_training is None else row.over + row.over_training
    norms = f"{row.norms[0] - row.norms[1]} of {row.norms[0]}" if row.norms else ""
    return [
        row.name,
        "×".join(map(str, row.shape)),
        "" if row.replaced is None else str(row.replaced),
        str(sum(row.left.values())) if row.replaced is not None else "",
        *(counts + [""] * 3)[:3],
        _figure(over),
        _figure(row.folded),
        _figure(row.fused),
        _figure(row.rounding),
        norms,
        f"{row.seconds:.1f}",
        row.verdict(network),
    ]


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.1e}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["-"] * len(head), *rows)]
    return "\n".join(lines) + "\n"
