"""The figures that training through D is to reach, beside what a run of the benchmark measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from step_measure import Row


class Target(NamedTuple):
    """A figure of one row. reach, aim: the largest ratio of `way` to the row's first that is well.

    seconds: whether the figure is the way's own time, not its ratio.
    """

    backend: str
    what: str
    case: str
    reach: float
    aim: float
    way: str = "ours"
    seconds: bool = False


TARGETS = (
    Target("PyTorch", "training step", "ResNet-18, 16×224²", 1.02, 1.01),
    Target("PyTorch", "training step", "ResNet-18, 64×64²", 1.12, 1.06),
    Target("PyTorch", "training step", "ResNet-18, 2×224²", 1.30, 1.15),
    Target("PyTorch", "composition alone", "3×3, 512→512", 0.45, 0.2),
    Target("PyTorch", "training step", "MobileNetV2, 16×224²", 1.05, 1.02),
    Target("Keras", "layer", "3×3, 512→512 @7²", 1.25, 1.10),
    Target("Keras", "training step", "ResNet-18, 16×224²", 1.04, 1.02),
    Target("Gluon", "layer", "3×3, 256→256 @14²", 1.06, 1.03),
    Target("Gluon", "layer", "3×3, 512→512 @7²", 1.25, 1.10),
    Target("PyTorch", "peak memory of a step", "ResNet-18, 16×224²", 1.03, 1.01),
    Target("PyTorch", "inference", "ResNet-18, 16×224²", 1.02, 1.00, "folded"),
    Target("Keras", "inference", "ResNet-18, 16×224²", 1.02, 1.00, "folded"),
    Target("Gluon", "inference", "ResNet-18, 16×224²", 1.02, 1.00, "folded"),
    Target(
        "PyTorch", "inference", "ResNet-18, 16×224²", 1.02, 1.00, "unfolded, composed_once"
    ),
    Target("PyTorch", "fold, seconds", "ResNet-152", 1.0, 1.0, seconds=True),
)  # fmt: skip


def targets(rows: Sequence[Row]) -> str:
    """Return the figures as a Markdown table, with what the rows have of them."""
    found = {(row.backend, row.what, row.case): row for row in rows}
    lines = [
        "| | what | case | plain formula | measured | to reach | to aim for |",
        "|-|-|-|-|-|-|-|",
    ]
    for target in TARGETS:
        row = found.get(target[:3])
        if row is not None:
            way = "" if target.way == "ours" else f" ({target.way})"
            lines.append(
                f"| {target.backend} | {target.what}{way} | {target.case} | {_formula(row)} | "
                f"{_measured(row, target)} | {target.reach:.2f} | {target.aim:.2f} |"
            )
    return "\n".join(lines)


def _formula(row: Row) -> str:
    return f"{row.ratios['formula']:.3f}" if "formula" in row.ratios else "–"


def _measured(row: Row, target: Target) -> str:
    values = row.seconds if target.seconds else row.ratios
    spread = f" ± {row.spread[target.way]:.3f}" if row.rounds > 1 else ""
    value, told = values[target.way], f"{values[target.way]:.3f}{spread}"
    return f"**{told}**" if value <= target.reach else f"{told}, missed"
