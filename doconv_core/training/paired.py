"""What pairs of runs tell: means, what one gains over the other, and how sure that is.

A pair are two runs of one seed, which begin with the same weights as far as they have the same
layers, and see the same batches. So what they have in common drops out of their difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Summary(NamedTuple):
    """Of some numbers: how many, their mean, standard deviation, and the interval of the mean.

    std: of the sample, by n - 1; it and the interval, which is Student's at 95 %, are NaN for fewer
    than two numbers.
    """

    count: int  # type: ignore[assignment]  # which hides a method of tuples
    mean: float
    std: float
    low: float
    high: float


def summary(values: Sequence[float]) -> Summary:
    """Return what finite numbers come to. Raises ImportError where scipy is not installed.

    >>> found = summary([1.0, 2.0, 3.0])
    >>> found.mean, found.std, round(found.high, 4)
    (2.0, 1.0, 4.4841)
    """
    count = len(values)
    mean = float(np.mean(values)) if count else math.nan
    if count < 2:
        return Summary(count, mean, math.nan, math.nan, math.nan)
    std = float(np.std(values, ddof=1))
    half = _student(count - 1) * std / math.sqrt(count)
    return Summary(count, mean, std, mean - half, mean + half)


def check_installed() -> None:
    """Raise ImportError where scipy, whose Student's t is taken, is not installed."""
    _student(1)


def _student(freedom: int) -> float:
    """Return the quantile of Student's t within which 95 % lie."""
    try:  # here, as the core is to be imported without it
        from scipy.special import stdtrit
    except ImportError:
        raise ImportError(
            "a study needs scipy, which is not installed. Install it with: "
            'python -m pip install "overconv[train]"'
        ) from None
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


class Wins(NamedTuple):
    """In how many pairs one was better, as good, and worse."""

    better: int
    equal: int
    worse: int


def wins(differences: Sequence[float]) -> Wins:
    """Return in how many pairs a difference is above zero, zero and below.

    >>> wins([0.5, 0.0, -0.1, 2.0])
    Wins(better=2, equal=1, worse=1)
    """
    found = np.asarray(differences)
    return Wins(int((found > 0).sum()), int((found == 0).sum()), int((found < 0).sum()))


def epochs_to(losses: Sequence[float], level: float) -> float:
    """Return after how many epochs a curve has come down to a level; infinity where it never does.

    losses: after the first epoch, the second, and so on. Between two of them it is taken to be
    straight, and the first epoch counts whole.

    >>> epochs_to([2.0, 1.0, 0.5], 0.75)
    2.5
    """
    for epoch, loss in enumerate(losses):
        if loss <= level:
            if epoch == 0:
                return 1.0
            before = losses[epoch - 1]
            return epoch + (before - level) / (before - loss)
    return math.inf
