"""Where a run stands: what a checkpoint keeps of it, and what its sums come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from doconv_core.training.engine import Sums


@dataclass
class Position:
    """Where a run stands.

    epoch: which it is in, from 0. done: how many of its steps are done, and taken: how many of
    them are in the sums. sums: of this process. seconds: that they took. best, best_epoch: the
    largest share of right labels in evaluation so far, and after how many epochs it was reached.
    """

    epoch: int = 0
    done: int = 0
    taken: int = 0
    sums: Sums = field(default_factory=Sums)
    seconds: float = 0.0
    best: float = -1.0
    best_epoch: int = 0

    def told(self, gathered: list[Sums]) -> dict[str, Any]:
        """Return what a checkpoint keeps of it. gathered: every process's sums."""
        names = ("epoch", "done", "seconds", "best", "best_epoch")
        told = {name: getattr(self, name) for name in names}
        return {**told, "sums": [list(sums) for sums in gathered]}

    @classmethod
    def of(cls, told: Mapping[str, Any], process: int, processes: int) -> Position:
        """Return the position that a checkpoint keeps.

        Where there are as many processes as there were, each has its own sums again; else the first
        has those of all.
        """
        kept = [Sums(*sums) for sums in told["sums"]]
        if len(kept) == processes:
            sums = kept[process]
        else:
            sums = reduce(Sums.plus, kept) if process == 0 else Sums()
        names = ("epoch", "done", "seconds", "best", "best_epoch")
        return cls(**{name: told[name] for name in names}, taken=told["done"], sums=sums)

    def next_epoch(self, evaluated: Sums) -> bool:
        """Go to the beginning of the next epoch; return whether this one was the best so far."""
        self.epoch, self.done, self.taken = self.epoch + 1, 0, 0
        self.sums, self.seconds = Sums(), 0.0
        top1 = shares(evaluated)["top1"]
        if top1 <= self.best:
            return False
        self.best, self.best_epoch = top1, self.epoch
        return True


def shares(sums: Sums) -> dict[str, float]:
    """Return the mean loss, and the shares of images that are right, and among five that are.

    >>> shares(Sums(loss=3.0, correct=1, top5=2, images=4))
    {'loss': 0.75, 'top1': 0.25, 'top5': 0.5}
    """
    images = max(sums.images, 1)
    return {
        "loss": sums.loss / images, "top1": sums.correct / images, "top5": sums.top5 / images,
    }  # fmt: skip
