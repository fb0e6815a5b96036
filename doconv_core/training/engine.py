"""What a framework does for a run: steps, evaluations, checkpoints; and what it is told for them.

The session (`session.py`) decides, an engine computes. It is told numbers: the images and targets
of a step, its learning rate, and how far the training has come.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from doconv_core.maths.numeric import Array
from doconv_core.models.report import Converted
from doconv_core.state.file import State
from doconv_core.training.loss import cross_entropy


class Batch(NamedTuple):
    """What one step computes with, or one step of an evaluation.

    images: `(B, C, H, W)` in float32, or `(B, H, W, C)` where the engine asks for that. targets:
    `(B, classes)` in float32, what the output's softmax is to be: one-hot, smoothed and mixed as
    the recipe has it. labels: `(B,)` in int64, of the images that were not mixed, for accuracy.
    total: how many images the batch has in all processes together; this one has B of them.
    """

    images: Array
    targets: Array
    labels: Array
    total: int


class Step(NamedTuple):
    """Which step this is, and the numbers that it is computed with.

    number: from 0, over all epochs. epoch: from 0. learning_rate: of this step. progress: how far
    the training has come, from 0 to 1, for layers that ask for it.
    """

    number: int
    epoch: int
    learning_rate: float
    progress: float


class Sums(NamedTuple):
    """Of one step or more: the sum of the images' losses, the right ones, and how many images.

    loss: of the cross entropy with the targets, and what kinds add to it, times the images.
    correct: images whose largest output is that of the label; top5: whose five largest have it.
    """

    loss: float = 0.0
    correct: int = 0
    top5: int = 0
    images: int = 0

    def plus(self, other: Sums) -> Sums:
        """Return the sums of both."""
        loss, *counts = (a + b for a, b in zip(self, other, strict=True))
        return Sums(loss, *map(int, counts))


class Verified(NamedTuple):
    """The trained model beside the folded one, on the same images.

    before, after: what the trained and what the folded model reach. absolute: the largest
    difference of two outputs; relative: to the largest output.
    """

    before: Sums
    after: Sums
    absolute: float
    relative: float


def sums_of(logits: Array, targets: Array, labels: Array) -> Sums:
    """Return what a model's outputs for some images, `(B, classes)`, come to.

    Of equal outputs the first counts as the larger, and none is larger than one that is no number.

    >>> logits, labels = np.array([[1.0, 3.0], [2.0, 2.0]]), np.array([1, 1])
    >>> sums_of(logits, np.eye(2)[labels], labels)[1:]
    (1, 2, 2)
    """
    own, classes = logits[np.arange(len(logits)), labels][:, None], np.arange(logits.shape[1])
    equal = (logits == own) & (classes < labels[:, None])
    rank = ((logits > own) | np.isnan(logits) | equal).sum(1)
    loss = float(cross_entropy(logits.astype(np.float64), targets).sum())
    return Sums(loss, int((rank < 1).sum()), int((rank < 5).sum()), len(logits))


def verified(calls: Iterable[tuple[Array, Array, Batch]]) -> Verified:
    """Return how the outputs of two models for the same batches compare.

    >>> batch = Batch(np.zeros((1, 1, 2, 2)), np.eye(2)[:1], np.zeros(1, int), 1)
    >>> verified([(np.array([[2.0, 1.0]]), np.array([[2.0, 1.5]]), batch)]).relative
    0.25
    """
    before, after, absolute, largest = Sums(), Sums(), 0.0, 0.0
    for a, b, batch in calls:
        before = before.plus(sums_of(a, batch.targets, batch.labels))
        after = after.plus(sums_of(b, batch.targets, batch.labels))
        absolute = max(absolute, float(np.abs(b - a).max(initial=0)))
        largest = max(largest, float(np.abs(a).max(initial=0)))
    return Verified(before, after, absolute, absolute / largest if largest else 0.0)


class Engine(ABC):
    """A model in a framework, with its optimizer, as a session trains it.

    framework: the backend's name, as in "torch"; version: the framework's. layout: of the images
    that it takes, "NCHW" or "NHWC". process, processes: which of how many this is; the first writes
    the files.
    model: the framework's own. described: what `run.json` says of it besides, such as its precision
    and devices. Every process calls every method, but for `folded_state` and `write_folded`. Of a
    disk that takes no more, what writes raises OSError.
    """

    framework: str
    version: str
    layout: str = "NCHW"
    process: int = 0
    processes: int = 1
    model: Any
    described: Mapping[str, Any] = {}

    def close(self) -> None:
        """Give the model back to whoever has made the engine; there may be nothing to do."""

    @abstractmethod
    def train_step(self, step: Step, batch: Batch) -> None:
        """Update the weights by one batch, in parts where the recipe accumulates."""

    @abstractmethod
    def taken(self) -> list[Sums]:
        """Return what each step since the last call came to, in this process; waits for them."""

    @abstractmethod
    def evaluate(self, batches: Iterable[Batch]) -> Sums:
        """Return what the model reaches in evaluation mode, averaged if the recipe averages."""

    @abstractmethod
    def total(self, sums: Sums) -> Sums:
        """Return the sums over all processes."""

    @abstractmethod
    def save(self, folder: Path | None) -> None:
        """Write all that it goes on with: weights, optimizer, averages, random states.

        folder: None in a process that writes nothing, but may have to hand its parts over.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Take up what `save` wrote, in every process."""

    @abstractmethod
    def export_state(self) -> State:
        """Return the model's canonical state, of the averaged weights if the recipe averages."""

    @abstractmethod
    def load_state(self, state: State) -> None:
        """Take up a canonical state's weights before the first step; averages begin with them."""

    @abstractmethod
    def fold(self) -> Converted[Any]:
        """Return a folded copy of the model, in evaluation mode, and the report."""

    @abstractmethod
    def folded_state(self, folded: Any) -> State:
        """Return a folded model's canonical state."""

    @abstractmethod
    def verify(self, folded: Any, batches: Iterable[Batch]) -> Verified:
        """Compare the model with the folded one on all of the batches."""

    @abstractmethod
    def write_folded(self, folded: Any, folder: Path) -> Path:
        """Write a folded model's weights in the framework's own format; return the file."""
