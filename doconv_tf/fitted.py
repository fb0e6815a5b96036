"""What Keras trains: a model around the given one, and the parts of batches that it takes.

So nothing of the user's model is compiled, and what it was compiled with stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from doconv_core.maths.numeric import Array
from doconv_core.training.engine import Batch
from doconv_core.training.fields import KERNELS
from doconv_core.training.recipe import Recipe
from doconv_core.training.schedule import parts
from doconv_tf.composed import ComposedConv
from doconv_tf.devices import Devices
from doconv_tf.optimizer import RecipeOptimizer
from doconv_tf.ordinary import first_occurrences, put
from doconv_tf.orthonormal import wide


class Calling(keras.Model):
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
    """A part of a batch, which one call of Keras' step takes.

    is_last: of the batch's parts. total: images of the batch in all processes; rows: of this part.
    pieces: for each replica images, targets and labels, and weights.
    """

    is_last: bool
    total: int
    rows: int
    pieces: list[Any]


def divided(batch: Batch, devices: Devices, recipe: Recipe | None = None) -> Iterator[Part]:
    """Yield the parts of a batch, each divided among the replicas. None: it is one."""
    rows = len(batch.images)
    slices = [slice(0, rows)]
    if recipe is not None:  # as many in each process as in the one with the most rows
        most = len(list(parts(recipe, -(-batch.total // devices.processes))))
        slices = [*parts(recipe, rows), *[slice(rows, rows)] * most][:most]
    for rows_of in slices:
        arrays = (batch.images[rows_of], batch.targets[rows_of], batch.labels[rows_of])
        split = (np.array_split(each, devices.replicas) for each in arrays)
        pieces = [_piece(batch.total, *each) for each in zip(*split, strict=True)]
        yield Part(rows_of is slices[-1], batch.total, len(arrays[0]), pieces)


def _piece(total: int, images: Array, targets: Array, labels: Array) -> Any:
    """Return what Keras takes; where there is no image, one of zeros with no weight."""
    weights = np.full(len(images), 1 / total, np.float32)
    if not len(images):
        given = images, targets, labels, weights
        images, targets, labels, weights = (np.zeros((1, *e.shape[1:]), e.dtype) for e in given)
    return images, {"targets": targets, "labels": labels}, weights


def blank(part: Part) -> Part:
    """Return a part like this one, without images."""
    pieces = keras.tree.map_structure(np.zeros_like, part.pieces)
    return part._replace(rows=0, pieces=pieces)
