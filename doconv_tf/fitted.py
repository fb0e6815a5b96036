"""What Keras' `fit` is called on: a model around the one that is trained, its data, and callbacks.

So nothing of the user's model is compiled, and what it was compiled with stays as it is.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from doconv_core.maths.numeric import Array
from doconv_core.training.engine import Batch, Step
from doconv_core.training.fields import KERNELS
from doconv_core.training.recipe import Recipe
from doconv_core.training.schedule import parts
from doconv_tf.composed import ComposedConv
from doconv_tf.optimizer import RecipeOptimizer
from doconv_tf.ordinary import first_occurrences, put
from doconv_tf.orthonormal import wide
from doconv_tf.private import BuiltModel


class Calling(BuiltModel):
    """A model around another, the net, so that what is compiled for a call is not the net's."""

    def __init__(self, net: keras.Layer, name: str = "calling") -> None:
        super().__init__(name=name)
        self.net = net
        self.built = True

    def call(self, images: Any, training: bool | None = None) -> Any:
        """Return the net's output; Keras tells the net itself whether this is training."""
        return self.net(images)


class Fitted(Calling):
    """A model whose training is a recipe's, around the user's, the net. Made in its scope.

    sums: of the last call in a replica, the loss, its share of the batch's mean; and of its images
    how many are right, and how many among five.
    """

    def __init__(self, net: keras.Layer, recipe: Recipe, scaled: bool) -> None:
        super().__init__(net, "fitted")
        self.sums = keras.Variable(np.zeros(3, "float32"), trainable=False, name="sums")
        self.rules = RecipeOptimizer.of(recipe, scaled=scaled)
        self.rules.build(net.trainable_variables)
        self.average = None
        if recipe.average is not None:
            self.average = Average(net, recipe.average, recipe.average_of == KERNELS)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Return this call's share of the batch's mean loss.

        y: targets and labels. sample_weight: of each image, 1 over the batch's number of them in
        all replicas, parts and processes; 0 of one that stands where there is none. What layers add
        to the loss, in training alone, counts by the share of images: so it is counted once.
        """
        targets, labels = y["targets"], y["labels"]
        _check_logits(y_pred, targets)
        logits = ops.cast(y_pred, wide(y_pred.dtype))
        weights = ops.cast(sample_weight, logits.dtype)
        targets = ops.cast(targets, logits.dtype)
        entropies = -ops.sum(targets * ops.log_softmax(logits, axis=-1), axis=-1)
        loss = ops.sum(weights * entropies)
        if training:
            for extra in self.losses:
                loss = loss + ops.sum(weights) * ops.cast(ops.sum(extra), logits.dtype)
        counts = _right(logits, labels, sample_weight)
        self.sums.assign(ops.stack([ops.cast(loss, "float32"), *counts]))
        return loss

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Any]:
        """Return nothing that counts, as the compiled step has to return something."""
        return {"none": ops.zeros(1)}  # not a scalar, which several machines could not average

    @property
    def metrics(self) -> list[Any]:
        """No metrics, which would be gathered from all replicas at each step: there are `sums`."""
        return []

    def train_step(self, data: Any) -> Any:
        """Take a step, and let the averages follow."""
        logs = super().train_step(data)
        if self.average is not None:
            self.average.follow(self.rules.last if self.rules.parts else None)
        return logs


class Average:
    """The moving average of a net's weights, or of the kernels that they compose.

    values: what is averaged, by a variable for each.
    """

    def __init__(self, net: keras.Layer, decay: float, of_kernels: bool) -> None:
        self.decay = decay
        composed = [
            layer
            for _, layer in first_occurrences(net)
            if isinstance(layer, ComposedConv) and len(layer.entries()) > 1
        ]
        self.composed: list[Any] = composed if of_kernels else []
        inside = {id(v) for layer in self.composed for v in layer.entries().values()}
        self.variables = [v for v in net.trainable_variables if id(v) not in inside]
        self.values = [
            keras.Variable(ops.convert_to_numpy(value), trainable=False, name="average")
            for value in self._now()
        ]

    def _now(self) -> list[Any]:
        kernels = [layer.composed_kernel() for layer in self.composed]
        return [*map(ops.convert_to_tensor, self.variables), *kernels]

    def follow(self, last: Any) -> None:
        """Let the averages follow the weights after a step. last: 0 where it has more parts."""
        for average, now in zip(self.values, self._now(), strict=True):
            before = ops.convert_to_tensor(average)
            new = self.decay * before + (1 - self.decay) * now
            if last is not None:
                new = ops.where(ops.cast(last, "bool"), new, before)
            average.assign(new)

    def give(self) -> list[tuple[Any, Any]]:
        """Give the net the averages; return the variables with what they were."""
        held = [*self.variables, *(v for c in self.composed for v in c.entries().values())]
        before = [(variable, ops.copy(variable)) for variable in held]
        for variable, average in zip(self.variables, self.values, strict=False):
            put(variable, average)
        for layer, average in zip(self.composed, self.values[len(self.variables) :], strict=True):
            started = layer.start(ops.convert_to_tensor(average), layer.spec)
            for name, variable in layer.entries().items():
                put(variable, started[name])
        return before


def _check_logits(outputs: Any, targets: Any) -> None:
    got = tuple(outputs.shape) if hasattr(outputs, "shape") else type(outputs).__name__
    if len(got) != 2 or got[1] != targets.shape[1]:
        raise ValueError(
            f"the model must give logits of shape (B, classes), with {targets.shape[1]} classes "
            f"for these data; it gave {got}."
        )


def _right(logits: Any, labels: Any, weights: Any) -> list[Any]:
    """Return of how many images the label has the largest logit, and one of the five largest.

    Of equal logits the first counts as the larger, and none is larger than one that is no number.
    """
    labels = ops.cast(labels, "int32")[:, None]
    own = ops.take_along_axis(logits, labels, axis=-1)
    later = ops.arange(logits.shape[-1], dtype="int32")[None] >= labels
    before = (logits > own) | ops.isnan(logits) | ((logits == own) & ~later)
    rank = ops.sum(ops.cast(before, "int32"), axis=-1)
    counted = ops.cast(weights, "float32") > 0
    return [ops.sum(ops.cast((rank < most) & counted, "float32")) for most in (1, 5)]


class Part(NamedTuple):
    """A part of a batch, which one call of the train step takes.

    step: None in evaluation. is_last: of the batch's parts. total: images of the batch in all
    processes; rows: of this part. pieces: for each replica images, targets and labels, and weights.
    """

    step: Step | None
    is_last: bool
    total: int
    rows: int
    pieces: list[Any]


class Feed:
    """The parts of steps, for data sets, which draw ahead, and begin anew where they please.

    A data set draws in a thread of TensorFlow's, where an error would lose its type: it ends there,
    and `close` raises it. Each time that it is gone through, it begins with the part that was not
    begun yet.
    """

    def __init__(
        self, steps: Iterable[tuple[Step | None, Batch]], recipe: Recipe | None, replicas: int
    ) -> None:
        self._parts = _divided(steps, recipe, replicas)
        self._held: deque[Part] = deque()  # from the one that is computed now on
        self._first = 0  # the number of the first of them
        self._begun = 0  # how many were begun
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._open = True

    def __iter__(self) -> Iterator[Any]:
        """Yield the pieces of each part, one for each replica."""
        number = self._first
        while (part := self._part(number)) is not None:
            yield from part.pieces
            number += 1

    def _part(self, number: int) -> Part | None:
        """Return the part of this number, if there is one; draw it, if it was not drawn yet."""
        with self._lock:
            while self._open and number >= self._first + len(self._held):
                try:
                    self._held.append(next(self._parts))
                except StopIteration:
                    return None
                except BaseException as error:
                    self._error, self._open = error, False
            return self._held[number - self._first] if self._open else None

    def has_any(self) -> bool:
        """Return whether there is a part to begin."""
        return self._part(self._begun) is not None

    def begin(self) -> Part:
        """Return the part that is begun now: `fit` says so before it asks for its pieces."""
        part = self._part(self._begun)
        assert part is not None  # as `has_any` was asked
        with self._lock:
            while self._first < self._begun:
                self._held.popleft()
                self._first += 1
            self._begun += 1
        return part

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Draw no more; raise what went wrong on drawing."""
        with self._lock:
            self._open = False
            self._held.clear()
        if error is None and self._error is not None:
            raise self._error


def _divided(
    steps: Iterable[tuple[Step | None, Batch]], recipe: Recipe | None, replicas: int
) -> Iterator[Part]:
    """Yield the parts of each step, each divided among the replicas. None: whole ones."""
    for step, batch in steps:
        rows = len(batch.images)
        slices = [slice(0, rows)] if recipe is None else [*parts(recipe, rows)] or [slice(0, 0)]
        for rows_of in slices:
            arrays = (batch.images[rows_of], batch.targets[rows_of], batch.labels[rows_of])
            divided = (np.array_split(each, replicas) for each in arrays)
            pieces = [_piece(batch.total, *each) for each in zip(*divided, strict=True)]
            yield Part(step, rows_of is slices[-1], batch.total, len(arrays[0]), pieces)


def _piece(total: int, images: Array, targets: Array, labels: Array) -> Any:
    """Return what `fit` takes; where there is no image, one of zeros with no weight."""
    weights = np.full(len(images), 1 / total, np.float32)
    if not len(images):
        given = images, targets, labels, weights
        images, targets, labels, weights = (np.zeros((1, *e.shape[1:]), e.dtype) for e in given)
    return images, {"targets": targets, "labels": labels}, weights


class Told(keras.callbacks.Callback):
    """Tells of each part before and after its call, in training and in evaluation."""

    def __init__(
        self, feed: Feed, before: Callable[[Part], None], after: Callable[[Part], None]
    ) -> None:
        super().__init__()
        self._feed, self._before, self._after = feed, before, after

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Begin a part."""
        self._part = self._feed.begin()
        self._before(self._part)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """End a part; after the last one, let Keras know, which would warn that there is none."""
        self._after(self._part)
        self.model.stop_training = self.model.stop_evaluating = not self._feed.has_any()

    on_test_batch_begin, on_test_batch_end = on_train_batch_begin, on_train_batch_end
