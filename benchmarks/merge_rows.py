"""What the sweeps of networks with branches tell, whatever framework merged them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

ALLOWED = 1e-5  # of the largest output


@dataclass
class Row:
    """What became of a network.

    convolutions: of it, of it folded, of the other way's form. differences: of the two forms'
    outputs from its own, relative to the largest. merged: how many convolutions were made of
    branches. left: why others were not, and how often. wide: whether that is in float64, as
    rounding in float32 alone moves the output by more than is allowed.
    """

    name: str
    size: int
    convolutions: tuple[int, ...]
    differences: tuple[float, ...]
    merged: int
    seconds: float
    left: dict[str, int] = field(default_factory=dict)
    wide: bool = False

    @property
    def holds(self) -> bool:
        """Whether it is as it must be."""
        return self.convolutions[1] <= self.convolutions[2] and self.differences[0] <= ALLOWED


def line(row: Row) -> str:
    """Return a row to print."""
    before, ours, theirs = row.convolutions
    own, other = row.differences
    return (
        f"{row.name:24} {row.size:4} convolutions {before:4} {ours:4} {theirs:4} merged "
        f"{row.merged:3} differences {own:.1e} {other:.1e} {row.seconds:6.1f} s"
    )


def document(rows: Sequence[Row], whose: str) -> str:
    """Return the rows as a Markdown table, and why branches were left. whose: the other way."""
    head = [
        "network", "image", "convolutions", "folded", whose, "merged", "difference", whose,
        "seconds",
    ]  # fmt: skip
    cells = [
        [
            f"{row.name}{' (float64)' * row.wide}", f"{row.size}²",
            *map(str, row.convolutions), str(row.merged),
            *(f"{each:.1e}" for each in row.differences), f"{row.seconds:.1f}",
        ]
        for row in sorted(rows, key=lambda row: row.name)
    ]  # fmt: skip
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row.left)
    fewer = sum(row.convolutions[1] < row.convolutions[2] for row in rows)
    more = sum(not row.holds for row in rows)
    return "\n".join(
        [
            f"{len(rows)} networks: {len(rows) - fewer - more} with as many convolutions as "
            f"{whose} way leaves, {fewer} with fewer, {more} with more or another output.\n",
            *(f"| {' | '.join(each)} |" for each in (head, ["-"] * len(head), *cells)),
            "\nLeft as they were, in all of them:\n",
            *(f"- {count} × {reason}" for reason, count in total.most_common()),
        ]
    )
