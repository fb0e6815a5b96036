"""What a run shows while it goes on: a bar on a terminal, elsewhere a line for each epoch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from doconv_core.training.engine import Sums, Verified


class Display:
    """Shows a run's course on standard output. quiet: nothing at all.

    A context manager; in it a terminal has a bar.
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Display:
        if not self.quiet and sys.stdout is not None and sys.stdout.isatty():
            from rich.progress import (  # here, as importing it takes longer than most of a start
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            columns = (
                TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[metrics]}"),
            )  # fmt: skip
            self.bar = Progress(*columns, transient=True)
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = self.task = None

    def epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """Show that an epoch begins, counted from 0, of so many steps."""
        if self.bar is not None:
            self._forget()
            told = f"epoch {epoch + 1} of {epochs}"
            self.task = self.bar.add_task(told, total=steps, metrics="")

    def step(self, done: int, sums: Sums, seconds: float) -> None:
        """Show how many of the epoch's steps are done, and what they came to."""
        if self.bar is not None and self.task is not None and sums.images:
            text = f"loss {sums.loss / sums.images:.4f}  top-1 {sums.correct / sums.images:.2%}"
            self.bar.update(self.task, completed=done, metrics=text)

    def evaluating(self) -> None:
        """Show that there is something else to wait for now."""
        if self.bar is not None:
            self._forget()
            self.task = self.bar.add_task("evaluating", total=None, metrics="")

    def _forget(self) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None

    def say(self, text: str) -> None:
        """Print a line."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        elif not self.quiet:
            print(text, flush=True)

    def line(self, metrics: Mapping[str, Any], epochs: int) -> None:
        """Print an epoch's line."""
        self.say(epoch_line(metrics, epochs))

    def end(self, folder: Path, verified: Verified, files: list[str]) -> None:
        """Print what the run came to, and as its last line where everything is."""
        before, after = (100 * sums.correct / max(sums.images, 1) for sums in verified[:2])
        self.say(
            f"top-1 {before:.2f} % trained, {after:.2f} % folded; outputs differ by at most "
            f"{verified.absolute:.2g}, {verified.relative:.2g} of the largest"
        )
        self.say(f"{folder}: {', '.join(files)}")


def epoch_line(metrics: Mapping[str, Any], epochs: int) -> str:
    """Return the line that tells an epoch's metrics.

    >>> epoch_line({"epoch": 1, "learning_rate": 0.1, "train_loss": 2.0, "train_top1": 0.5,
    ...             "eval_loss": 1.0, "eval_top1": 0.75, "seconds": 2.0}, 3)
    'epoch 1 of 3: loss 2.0000, top-1 50.00 %; evaluation: loss 1.0000, top-1 75.00 %; 2.0 s'
    """
    width = len(str(epochs))
    told = [
        f"loss {metrics[f'{part}_loss']:.4f}, top-1 {100 * metrics[f'{part}_top1']:.2f} %"
        for part in ("train", "eval")
    ]
    return (
        f"epoch {metrics['epoch']:{width}} of {epochs}: {told[0]}; evaluation: {told[1]}; "
        f"{metrics['seconds']:.1f} s"
    )
