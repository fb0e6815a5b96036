"""Batches of images for a training or an evaluation, prepared on grain.

What is in a batch depends on the seed, the epoch and the step alone: not on where a run began, how
many processes read, or how many train.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.util import Finalize
from typing import Any, Protocol
from weakref import WeakSet

import numpy as np

from doconv_core.maths.numeric import Array
from doconv_core.training.data.images import as_array
from doconv_core.training.data.needed import grain_module
from doconv_core.training.data.operations import Affine, Operation, parsed
from doconv_core.training.data.sources import Arrays, BrokenImages, DataError, Source
from doconv_core.training.engine import Batch
from doconv_core.training.loss import mixed, targets

LAYOUTS = ("NCHW", "NHWC")
AHEAD = 16  # steps at least that a worker can prepare before they are asked for
THREADS = min(8, os.cpu_count() or 1)  # that decode files, each for a batch
# What Pillow raises for a file that is no image, or is damaged.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error)


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
) -> Iterator[Batch]:
    """Yield the batches of an epoch, each as a recipe prepares it.

    training: shuffled, augmented, smoothed and mixed; else in order, each image once. start: how
    many of the epoch's steps are left out. process, processes: this one gets its part of each
    batch, as even as can be; of a short one it may be no row in training, and no batch else.
    layout: of the images. workers: processes that read and prepare, started for this epoch and
    ended with it; 0 for threads of this one. An image that cannot be read is named in a warning; in
    training the next one takes its place, in evaluation none does, and it does not count. Raises
    BrokenImages where there are more than the source's `max_broken`; DataError where images of a
    batch differ in size or channels, or in channels from what the recipe normalizes; ValueError for
    other arguments that can't be; ImportError without grain.

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
    whole, rest = divmod(len(source), recipe.batch_size)
    steps = whole + (rest > 0 and not (training and recipe.drop_last))
    made = _Maker(
        source, classes, operations, recipe.batch_size, training,
        recipe.label_smoothing if training else 0.0, recipe.mixup if mixes else 0.0,
        seed, epoch, process, processes, layout, steps,
    )  # fmt: skip
    drawn = _drawn(made, range(min(start, steps), steps), workers)
    if workers:
        _OPEN.add(drawn)
    return drawn


_OPEN: WeakSet[Generator[Batch, None, None]] = WeakSet()  # which have processes that read


def _close_all() -> None:
    """End the processes that read, while there is all that this needs."""
    for drawn in list(_OPEN):
        with suppress(ValueError):  # where a thread draws from it just now
            drawn.close()


Finalize(None, _close_all, exitpriority=100)  # before what multiprocessing ends at its exit


def _drawn(made: _Maker, steps: range, workers: int) -> Generator[Batch, None, None]:
    iterator = iter(_prepared(made, steps, workers))
    broken: dict[str, str] = {}
    try:
        for _ in steps:
            found = next(iterator)
            _tell(broken, dict(zip(found["names"], found["errors"], strict=True)), made)
            arrays = [found[name] for name in ("images", "targets", "labels")]
            if workers:  # memory that is shared, and is given back as soon as it is copied
                arrays = [np.array(array) for array in arrays]
            images, wanted, labels = arrays
            batch = Batch(images, wanted, labels, int(found["total"]))
            del found, arrays
            # Of a last short batch this process may have no part. In training it takes the step.
            if len(labels) or made.shuffled:
                yield batch
    finally:
        iterator.close()


def _prepared(made: _Maker, steps: range, workers: int) -> Any:
    """Return what grain draws the batches from."""
    grain = grain_module()
    # A thread prepares a batch at a time, and so does a worker.
    threads = 0 if workers or isinstance(made.source, Arrays) else THREADS
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    # There are more steps than will be drawn, with nothing in them: where a process of grain's
    # comes to its end, what it gave last stays in the memory that is shared.
    beyond = steps.stop + AHEAD * workers
    drawn = grain.MapDataset.range(steps.start, beyond).map(made).to_iter_dataset(read)
    if not workers:
        return drawn
    return drawn.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


def _tell(known: dict[str, str], found: dict[str, str], made: _Maker) -> None:
    """Warn of images that could not be read, or raise BrokenImages where they are too many."""
    becomes = "the next takes its place" if made.shuffled else "it does not count"
    for name, error in found.items():
        if name in known:
            continue
        known[name] = error
        if len(known) > made.source.max_broken:
            others = f" and {len(known) - 1} before it" if len(known) > 1 else ""
            raise BrokenImages(
                f"{name}{others} could not be read ({error}); {made.source.max_broken} may be. "
                "Replace or remove the files, or allow more by max_broken."
            )
        warnings.warn(f"{name} could not be read ({error}); {becomes}", stacklevel=1)


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
    steps: int

    def __call__(self, step: int) -> dict[str, Any]:
        if step >= self.steps:
            return {}
        first = step * self.batch_size
        total = min(self.batch_size, len(self.source) - first)
        own = np.array_split(np.arange(total), self.processes)[self.process]
        broken: dict[str, str] = {}
        rows, own = len(own), own if len(own) else np.arange(1)  # of none: one tells the shape
        images, labels = self._images(first + own, broken)
        wanted = targets(labels, self.classes, self.smoothing)
        if self.mixup:
            if self.processes == 1:
                other, other_labels = images[::-1], labels[::-1]
            else:
                other, other_labels = self._images(first + total - 1 - own, broken)
            share = float(self._random(step).beta(self.mixup, self.mixup))
            images = mixed(images, other, share)
            wanted = mixed(wanted, targets(other_labels, self.classes, self.smoothing), share)
        return {
            "images": images[:rows], "targets": wanted[:rows], "labels": labels[:rows],
            "total": total,
            "names": list(broken), "errors": list(broken.values()),
        }  # fmt: skip

    def _images(self, places: Array, broken: dict[str, str]) -> tuple[Array, Array]:
        """Return the images and labels at places in the epoch's order."""
        indices = self._order[places] if self.shuffled else places
        images, own = np.empty((0,) * 4, np.float32), list[int]()
        for found in (self._image(int(index), broken) for index in indices):
            if found is None:
                continue
            image, index, scale, shift = found
            if not own:
                height, width, channels = image.shape
                nchw = self.layout == "NCHW"
                shape = (channels, height, width) if nchw else (height, width, channels)
                images = np.empty((len(indices), *shape), np.float32)
            view = images[len(own)]
            view = view if self.layout == "NHWC" else view.transpose(1, 2, 0)
            own.append(index)
            if image.shape != view.shape:
                raise DataError(
                    f"{self.source.name(index)} is {_size(image)}, and others of its "
                    f"batch are {_size(view)}; let the recipe resize or crop."
                )
            _write(image, scale, shift, view)
        return images[: len(own)], self.source.labels[np.array(own, np.int64)]

    def _image(self, index: int, broken: dict[str, str]) -> tuple[Array, int, Array, Array] | None:
        """Return an image, or the next for one that is broken; its place; and how it is written.

        That is a number for each channel to multiply with, and one to add. In evaluation none takes
        another's place: None for one that is broken.
        """
        for at in range(index, index + (len(self.source) if self.shuffled else 1)):
            place = at % len(self.source)
            rng = self._random(place, 1) if self._draws else _NONE
            try:
                image = self.source.image(place)
                for operation in self._before:
                    image = operation(image, rng)
                image = as_array(image)
            except DataError:
                raise
            except UNREADABLE as error:
                broken[self.source.name(place)] = str(error).rstrip(".") or type(error).__name__
            else:
                return image, place, *self._affine(image, rng)
        if not self.shuffled:
            return None
        raise BrokenImages(f"none of {len(self.source)} images could be read.")

    def _affine(self, image: Array, rng: np.random.Generator) -> tuple[Array, Array]:
        """Return what the operations at the end come to together, in float32."""
        channels = image.shape[2]
        scale = np.full(channels, 1 / 255 if image.dtype == np.uint8 else 1.0)
        shift = np.zeros(channels)
        for operation in self._after:
            factor, added = operation.numbers(channels, rng)
            scale, shift = scale * factor, shift * factor + added
        return scale.astype(np.float32), shift.astype(np.float32)

    @cached_property
    def _after(self) -> list[Affine]:
        """Return the operations at the end that are done as one, while the batch is written."""
        found: list[Affine] = []
        for operation in reversed(self.operations):
            if not isinstance(operation, Affine):
                break
            found.insert(0, operation)
        return found

    @cached_property
    def _before(self) -> tuple[Operation, ...]:
        return self.operations[: len(self.operations) - len(self._after)]

    @cached_property
    def _draws(self) -> bool:
        return any(operation.random for operation in self.operations)

    @cached_property
    def _order(self) -> Array:
        return self.source.shuffled(self._random())

    def _random(self, *of: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64((self.seed, self.epoch, *of)))


def _write(image: Array, scale: Array, shift: Array, out: Array) -> None:
    """Write an image, each channel times a number and plus another, into `(H, W, C)` of a batch."""
    if out.flags.c_contiguous:  # rows at a time, as NumPy takes long over many short axes
        width = image.shape[1]
        rows = out.reshape(len(out), -1)
        np.multiply(image.reshape(rows.shape), np.tile(scale, width), out=rows, dtype=np.float32)
        if shift.any():
            rows += np.tile(shift, width)
        return
    for channel, (factor, added) in enumerate(zip(scale, shift, strict=True)):
        plane = out[..., channel]
        np.multiply(image[..., channel], factor, out=plane, dtype=np.float32)
        if added:
            plane += added


def _size(image: Array) -> str:
    return "x".join(map(str, image.shape))


_NONE = np.random.Generator(np.random.PCG64(0))  # for operations that draw nothing
