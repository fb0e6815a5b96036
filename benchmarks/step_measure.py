"""Times that can be compared: the ways of doing something, by turns, in one process."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Way = Callable[[], Any]

# Rounds that are measured at least, however long they take; a quick run sets it to fewer.
least_rounds = 7


class Row(NamedTuple):
    """What was measured of one case.

    seconds: the median for each way. ratios: of each way to the first, the median of the rounds'
    own ratios. spread: half the distance of their quartiles.
    """

    backend: str
    what: str
    case: str
    seconds: dict[str, float]
    ratios: dict[str, float]
    spread: dict[str, float]
    rounds: int


def measure(backend: str, what: str, case: str, ways: Mapping[str, Way], patience: float) -> Row:
    """Run each way once a round, by turns, for `patience` seconds or `least_rounds`."""
    for way in ways.values():
        way()
    begin = time.perf_counter()
    for way in ways.values():
        way()
    rounds = max(least_rounds, min(101, int(patience / (time.perf_counter() - begin))))
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            begin = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - begin)
    first = seconds[names[0]]
    ratios = {n: [a / b for a, b in zip(s, first, strict=True)] for n, s in seconds.items()}
    return Row(
        backend, what, case,
        {name: statistics.median(values) for name, values in seconds.items()},
        {name: statistics.median(values) for name, values in ratios.items()},
        {name: _spread(values) for name, values in ratios.items()},
        rounds,
    )  # fmt: skip


def _spread(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def figure(backend: str, what: str, case: str, **values: float) -> Row:
    """Return a row of figures that are no times, such as bytes: each beside the first."""
    first = next(iter(values.values()))
    ratios = {name: value / first if first else 0.0 for name, value in values.items()}
    return Row(backend, what, case, dict(values), ratios, dict.fromkeys(values, 0.0), 1)


def emit(row: Row) -> None:
    """Print a row for the process that asked for it."""
    print(json.dumps(row._asdict()), flush=True)
