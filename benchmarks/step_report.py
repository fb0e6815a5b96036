"""The table, the plot and the document of `training_step.py`, and what other benchmarks share."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

from step_measure import Row
from step_targets import targets

from doconv_core.atomic import replacing, write_text

DOCS = Path(__file__).parents[1] / "docs"
TICKS, WIDE_TICKS = (0.9, 1, 1.1, 1.2, 1.5, 2, 3), (1, 2, 3, 5, 10, 20, 50)
BEGIN, END = "<!-- begin: measured -->", "<!-- end: measured -->"


def machine(threads: int, versions: Sequence[str]) -> str:
    """Return what the figures were measured on."""
    names = ["", platform.processor()]
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        names = re.findall(r"model name\s*: (.*)", cpu.read_text(encoding="utf-8")) or names
    return f"{names[-1] or platform.machine()}, {os.cpu_count()} cores, {threads} threads; " + (
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )


def table(rows: Sequence[Row]) -> str:
    """Return all rows as a Markdown table: the first way in units, the others as ratios to it."""
    lines = ["| | what | case | first | others, of the first |", "|-|-|-|-|-|"]
    for row in rows:
        (first, value), *others = row.seconds.items()
        ratios = [f"{n} {_ratio(row, n)}" for n, _ in others]
        lines.append(
            f"| {row.backend} | {row.what} | {row.case} | {first} {_amount(row, value)} | "
            f"{'; '.join(ratios)} |"
        )
    return "\n".join(lines)


def _ratio(row: Row, name: str) -> str:
    spread = f" ± {row.spread[name]:.3f}" if row.rounds > 1 else ""
    return f"**{row.ratios[name]:.3f}**{spread}" if name != "floor" else f"{row.ratios[name]:.3f}"


def _amount(row: Row, value: float) -> str:
    if "seconds" in row.what:
        return f"{value:.2f} s"
    if row.rounds > 1:
        return f"{1000 * value:.3g} ms"
    return f"{value / 2**20:.1f} MiB"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the ratios of layers and training steps, by framework."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    backends = list(dict.fromkeys(row.backend for row in rows))
    kinds = ("layer", "training step")
    figure, axes = pyplot.subplots(
        len(kinds), len(backends), figsize=(5 * len(backends) + 1, 8), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for line, what in zip(axes, kinds, strict=True):
        for axis, backend in zip(line, backends, strict=True):
            shown = [row for row in rows if (row.backend, row.what) == (backend, what)]
            places = range(len(shown))
            for way, marker, color in (("formula", "x", "0.55"), ("ours", "o", "tab:blue")):
                ratios = [row.ratios[way] for row in shown]
                spread = [row.spread[way] for row in shown]
                axis.errorbar(
                    ratios, places, xerr=spread, fmt=marker, color=color, label=way, elinewidth=1
                )
            axis.axvline(1, color="black", linewidth=0.8)
            axis.set_xscale("log")
            found = [1, *(ratio for row in shown for ratio in row.ratios.values())]
            least, most = min(found), max(found)
            axis.set_xlim(0.95 * min(least, 0.9), 1.1 * max(most, 1.5))
            ticks = TICKS if most < 3 else WIDE_TICKS
            ticks = [tick for tick in ticks if tick < axis.get_xlim()[1]]
            axis.set_xticks(ticks, map(str, ticks))
            axis.minorticks_off()
            axis.set_yticks(places, [row.case for row in shown], fontsize=8)
            axis.invert_yaxis()
            axis.grid(axis="x", alpha=0.3)
            axis.set_title(f"{backend}: {what}, of the plain one's time", fontsize=10)
            axis.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)


def write_docs(rows: Sequence[Row], described: str, quick: bool) -> None:
    """Put the table and the plot into `docs/performance.md`, between its two marks."""
    if quick:
        raise SystemExit("--docs is for a whole run, without --quick.")
    measured = f"{described}.\n\n{targets(rows)}\n\nThe whole run:\n\n{table(rows)}\n\n"
    put(DOCS / "performance.md", f"{measured}![Ratios](performance.png)")
    draw(rows, DOCS / "performance.png")


def put(page: Path, measured: str, of: str = "") -> None:
    """Put what was measured into a page, between its two marks. of: which, if it has several."""
    begin, end = (mark.replace("measured", f"measured{of and ' '}{of}") for mark in (BEGIN, END))
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    write_text(page, f"{before}{begin}\n{measured}\n{end}{after}")
