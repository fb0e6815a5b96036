"""Batches of images for a training or an evaluation, prepared on grain.

What is in a batch depends on the seed, the epoch and the step alone: not on where a run began, how
many processes read, or how many train.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from doconv_core.maths.numeric import Array
from doconv_core.training.data.images import as_array
from doconv_core.training.data.needed import needed
from doconv_core.training.data.operations import Normalize, Operation, parsed
from doconv_core.training.data.sources import Arrays, BrokenImages, DataError, Source
from doconv_core.training.engine import Batch
from doconv_core.training.loss import mixed, targets

LAYOUTS = ("NCHW", "NHWC")
THREADS = min(8, os.cpu_count() or 1)  # that decode files, in each process that reads
UNREADABLE = (OSError, ValueError, SyntaxError)  # what Pillow raises for a file that is no image


class Prepared(Protocol):
    """What is asked of a recipe here."""

    @property
    def batch_size(self) -> int:
        """Of all processes together."""

    @property
    def epochs(self) -> int:
        """Of the training."""

    @property
    def drop_last(self) -> bool:
        """Whether a last short batch is left out."""

    @property
    def label_smoothing(self) -> float:
        """Of the targets."""

    @property
    def mixup(self) -> float:
        """Of Beta's distribution; 0 for none."""

    @property
    def mixup_off_epochs(self) -> int:
        """At the end, without mixing."""

    @property
    def train_images(self) -> tuple[str, ...]:
        """Operations in training."""

    @property
    def eval_images(self) -> tuple[str, ...]:
        """Operations in evaluation."""


def batches(
    source: Source,
    classes: int,
    recipe: Prepared,
    *,
    training: bool,
    epoch: int = 0,
    start: int = 0,
    seed: int = 0,
    process: int = 0,
    processes: int = 1,
    layout: str = "NCHW",
    workers: int = 0,
    max_broken: int = 0,
) -> Iterator[Batch]:
    """Yield the batches of an epoch, each as a recipe prepares it.

    training: shuffled, augmented, smoothed and mixed; else in order, each image once. start: how
    many of the epoch's steps are left out. process, processes: this one gets its part of each
    batch, as even as can be. layout: of the images. workers: processes that read and prepare; 0
    for threads of this one. max_broken: how many unreadable images have others in their place.
    Raises BrokenImages, with their names, past that; DataError where images of a batch differ in
    size, or in channels from what the recipe normalizes; ValueError for other arguments that can't
    be; ImportError without grain.

    >>> from doconv_core.training.data import open_data
    >>> from doconv_core.training.recipe import recipe
    >>> data = open_data("digits")
    >>> batch = next(batches(data.train, 10, recipe("digits"), training=True))
    >>> batch.images.shape, batch.targets.shape
    ((32, 1, 32, 32), (32, 10))
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; received {layout!r}.")
    if workers < 0 or start < 0 or not 0 <= process < processes:
        raise ValueError(
            f"workers and start must be at least 0, and process one of {processes}; received "
            f"workers={workers}, start={start}, process={process}."
        )
    texts = recipe.train_images if training else recipe.eval_images
    operations = tuple(map(parsed, texts))
    mixes = training and recipe.mixup > 0 and epoch < recipe.epochs - recipe.mixup_off_epochs
    made = _Maker(
        source, classes, operations, recipe.batch_size, training,
        recipe.label_smoothing if training else 0.0, recipe.mixup if mixes else 0.0,
        seed, epoch, process, processes, layout,
    )  # fmt: skip
    whole, rest = divmod(len(source), recipe.batch_size)
    steps = whole + (rest > 0 and not (training and recipe.drop_last))
    return _drawn(made, range(min(start, steps), steps), workers, max_broken)


def _drawn(made: _Maker, steps: range, workers: int, max_broken: int) -> Iterator[Batch]:
    grain = needed("grain")
    threads = 0 if isinstance(made.source, Arrays) and not workers else THREADS
    told = grain.MapDataset.range(steps.start, steps.stop).map(made)
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    drawn = told.to_iter_dataset(read)
    if workers:
        drawn = drawn.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    broken: dict[str, str] = {}
    for found in drawn:
        broken.update(zip(found["names"], found["errors"], strict=True))
        if len(broken) > max_broken:
            raise _too_many(broken, max_broken)
        if len(found["images"]):  # or this process has no part in a last short batch
            arrays = (found[name] for name in ("images", "targets", "labels"))
            if workers:  # which hand over memory that is shared, and has to be given back soon
                arrays = (np.array(array) for array in arrays)
            images, wanted, labels = arrays
            yield Batch(images, wanted, labels, int(found["total"]))


def _too_many(broken: dict[str, str], allowed: int) -> BrokenImages:
    name, error = next(reversed(broken.items()))
    others = f" and {len(broken) - 1} before it" if len(broken) > 1 else ""
    return BrokenImages(
        f"{name}{others} could not be read ({error}); {allowed} may be. Replace or remove the "
        "files, or allow more by max_broken."
    )


@dataclass
class _Maker:
    """What makes the batch of a step, in whatever process."""

    source: Source
    classes: int
    operations: tuple[Operation, ...]
    batch_size: int
    shuffled: bool
    smoothing: float
    mixup: float
    seed: int
    epoch: int
    process: int
    processes: int
    layout: str

    def __call__(self, step: int) -> dict[str, Any]:
        first = step * self.batch_size
        total = min(self.batch_size, len(self.source) - first)
        own = np.array_split(np.arange(total), self.processes)[self.process]
        broken: dict[str, str] = {}
        images, labels = self._images(first, own, broken)
        wanted = targets(labels, self.classes, self.smoothing)
        if self.mixup:
            share = float(self._random(step).beta(self.mixup, self.mixup))
            others = total - 1 - own
            if self.processes == 1:
                other, other_labels = images[::-1], labels[::-1]
            else:
                other, other_labels = self._images(first, others, broken)
            images = mixed(images, other, share)
            wanted = mixed(wanted, targets(other_labels, self.classes, self.smoothing), share)
        return {
            "images": images, "targets": wanted, "labels": labels, "total": total,
            "names": list(broken), "errors": list(broken.values()),
        }  # fmt: skip

    def _images(self, first: int, rows: Array, broken: dict[str, str]) -> tuple[Array, Array]:
        """Return the images and labels of rows of the batch that begins at `first`."""
        places = [first + int(row) for row in rows]
        order = self._order if self.shuffled else range(len(self.source))
        indices = [order[place] for place in places]
        out: Array | None = None
        for n, index in enumerate(indices):
            image, index = self._image(index, broken)
            indices[n] = index
            if out is None:
                height, width, channels = image.shape
                shape = (channels, height, width) if self.layout == "NCHW" else image.shape
                out = np.empty((len(indices), *shape), np.float32)
            self._put(image, out[n], index)
        labels = self.source.labels[indices] if indices else np.empty(0, np.int64)
        return np.empty((0, 0, 0, 0), np.float32) if out is None else out, labels

    def _image(self, index: int, broken: dict[str, str]) -> tuple[Array, int]:
        """Return an image after all but a last normalization; the next for one that is broken."""
        for at in range(index, index + len(self.source)):
            place = at % len(self.source)
            try:
                image = self.source.image(place)
                rng = self._random(place, 1) if self._draws else _NONE
                for operation in self._before:
                    image = operation(image, rng)
                return as_array(image), place
            except UNREADABLE as error:
                if isinstance(error, DataError):
                    raise
                broken[self.source.name(place)] = str(error).rstrip(".") or type(error).__name__
        raise BrokenImages(f"none of {len(self.source)} images could be read.")

    def _put(self, image: Array, out: Array, index: int) -> None:
        """Write an image into a batch, normalized or from 0 to 1."""
        scale, shift = self._affine(image)
        view = out if self.layout == "NHWC" else out.transpose(1, 2, 0)
        if image.shape[:2] != view.shape[:2]:
            raise DataError(
                f"{self.source.name(index)} is {image.shape[0]}x{image.shape[1]}, and others of "
                f"its batch are {view.shape[0]}x{view.shape[1]}; let the recipe resize or crop."
            )
        np.multiply(image, scale, out=view, casting="unsafe")
        if shift is not None:
            view += shift

    def _affine(self, image: Array) -> tuple[Any, Any]:
        if self._last is not None:
            try:
                return self._last.affine(image.dtype, image.shape[2])
            except ValueError as error:
                raise DataError(str(error)) from None
        return np.float32(1 / 255 if image.dtype == np.uint8 else 1), None

    @property
    def _last(self) -> Normalize | None:
        last = self.operations[-1] if self.operations else None
        return last if isinstance(last, Normalize) else None

    @property
    def _before(self) -> tuple[Operation, ...]:
        return self.operations[:-1] if self._last else self.operations

    @property
    def _draws(self) -> bool:
        return any(operation.random for operation in self.operations)

    @property
    def _order(self) -> Any:
        """Return the epoch's order of the images, which takes no memory."""
        seed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0]
        return needed("grain").MapDataset.range(len(self.source)).shuffle(seed=int(seed))

    def _random(self, *of: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64((self.seed, self.epoch, *of)))


_NONE = np.random.Generator(np.random.PCG64(0))  # for operations that draw nothing
