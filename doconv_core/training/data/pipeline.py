"""Batches of images for a training or an evaluation, prepared on grain.

What is in a batch depends on the seed, the epoch and the step alone: not on where a run began, how
many processes read, or how many train.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, repeat
from multiprocessing.util import Finalize
from typing import Any, Protocol
from weakref import WeakSet

import numpy as np

from doconv_core.maths.numeric import Array
from doconv_core.training.data.images import as_array
from doconv_core.training.data.needed import grain_module
from doconv_core.training.data.operations import Affine, Operation, parsed
from doconv_core.training.data.sources import Arrays, BrokenImages, DataError, ImageData, Source
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
    _check(layout, workers, start, process, processes)
    made = _maker(source, classes, recipe, training, seed, process, processes, layout)
    return _alone(Series(_Plan([made], range(epoch, epoch + 1)), start, workers))


def series(
    data: ImageData,
    recipe: Prepared,
    *,
    epoch: int = 0,
    start: int = 0,
    seed: int = 0,
    process: int = 0,
    processes: int = 1,
    layout: str = "NCHW",
    workers: int = 0,
) -> Series:
    """Return the batches of a training: of each epoch those to train on, then those to evaluate on.

    Behind the last epoch those to evaluate on come once more. epoch, start: the first epoch, and
    how many of its steps are left out. The rest is as in `batches`; the processes that prepare are
    started once for all of it.

    >>> from doconv_core.training.data import open_data
    >>> from doconv_core.training.recipe import recipe
    >>> found = series(open_data("digits"), recipe("digits", epochs=1), start=40)
    >>> [len(list(found.part())) for _ in range(3)]
    [5, 12, 12]
    """
    _check(layout, workers, start, process, processes)
    train, val = (
        _maker(of, len(data.classes), recipe, training, seed, process, processes, layout)
        for of, training in ((data.train, True), (data.val, False))
    )
    return Series(_Plan([train, val], range(epoch, recipe.epochs), [val]), start, workers)


def _alone(one: Series) -> Generator[Batch, None, None]:
    """Yield the batches of the only part; then end what prepares them."""
    with closing(one):
        yield from one.part()


def _check(layout: str, workers: int, start: int, process: int, processes: int) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; received {layout!r}.")
    if workers < 0 or start < 0 or not 0 <= process < processes:
        raise ValueError(
            f"workers and start must be at least 0, and process one of {processes}; received "
            f"workers={workers}, start={start}, process={process}."
        )


def _maker(
    source: Source, classes: int, recipe: Prepared, training: bool, seed: int, process: int,
    processes: int, layout: str,
) -> _Maker:  # fmt: skip
    texts = recipe.train_images if training else recipe.eval_images
    whole, rest = divmod(len(source), recipe.batch_size)
    steps = whole + (rest > 0 and not (training and recipe.drop_last))
    return _Maker(
        source, classes, tuple(map(parsed, texts)), recipe.batch_size, training,
        recipe.label_smoothing if training else 0.0, recipe.mixup if training else 0.0,
        recipe.epochs - recipe.mixup_off_epochs, seed, process, processes, layout, steps,
    )  # fmt: skip


_OPEN: WeakSet[Generator[Batch, None, None]] = WeakSet()  # which have processes that read


def _close_all() -> None:
    """End the processes that read, while there is all that this needs."""
    for drawn in list(_OPEN):
        with suppress(ValueError):  # where a thread draws from it just now
            drawn.close()


Finalize(None, _close_all, exitpriority=100)  # before what multiprocessing ends at its exit


class Series:
    """Batches in parts, each to be drawn to its end before the next, and prepared on meanwhile.

    start: how many batches of the first part are left out. workers: processes that prepare, for all
    parts; 0 for threads. An image that cannot be read is named once.
    """

    def __init__(self, plan: _Plan, start: int, workers: int) -> None:
        self._parts, self._end = plan.parts(), 0
        first = plan.makers[0] if plan.epochs else plan.more[0]
        self._at = min(start, first.steps)
        self._drawn = _drawn(plan, range(self._at, plan.stop), workers)
        if workers:
            _OPEN.add(self._drawn)

    def part(self) -> Iterator[Batch]:
        """Return the batches of the next part; StopIteration where there is none."""
        made = next(self._parts)
        self._end += made.steps
        return self._until(self._end, made.shuffled)

    def _until(self, end: int, shuffled: bool) -> Iterator[Batch]:
        while self._at < end:
            batch = next(self._drawn)
            self._at += 1
            # Of a short batch this process may have no part. In training it takes the step.
            if len(batch.labels) or shuffled:
                yield batch

    def close(self) -> None:
        """End what prepares the batches."""
        self._drawn.close()


def _drawn(plan: _Plan, numbers: range, workers: int) -> Generator[Batch, None, None]:
    iterator = iter(_prepared(plan, numbers, workers))
    broken: dict[int, dict[str, str]] = {}
    try:
        for number in numbers:
            found = next(iterator)
            made, _, _ = plan.find(number)
            _tell(
                broken.setdefault(id(made), {}),
                dict(zip(found["names"], found["errors"], strict=True)), made,
            )  # fmt: skip
            arrays = [found[name] for name in ("images", "targets", "labels")]
            if workers:  # memory that is shared, and is given back as soon as it is copied
                arrays = [np.array(array) for array in arrays]
            images, wanted, labels = arrays
            batch = Batch(images, wanted, labels, int(found["total"]))
            del found, arrays
            yield batch
    finally:
        iterator.close()


def _prepared(plan: _Plan, numbers: range, workers: int) -> Any:
    """Return what grain draws the batches from."""
    grain = grain_module()
    # A thread prepares a batch at a time, and so does a worker.
    in_memory = all(isinstance(made.source, Arrays) for made in plan.makers)
    threads = 0 if workers or in_memory else THREADS
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    # There are more steps than will be drawn, with nothing in them: where a process of grain's
    # comes to its end, what it gave last stays in the memory that is shared.
    beyond = numbers.stop + AHEAD * workers
    drawn = grain.MapDataset.range(numbers.start, beyond).map(plan).to_iter_dataset(read)
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


class _Plan:
    """What makes the batches of several parts by their number, in whatever process.

    makers: what makes the parts of each epoch, and more: those behind the last one.
    """

    def __init__(
        self, makers: Sequence[_Maker], epochs: range, more: Sequence[_Maker] = ()
    ) -> None:
        self.makers, self.epochs, self.more = makers, epochs, more
        self.each = sum(made.steps for made in makers)
        self.stop = self.each * len(epochs) + sum(made.steps for made in more)

    def parts(self) -> Iterator[_Maker]:
        """Return what makes the parts, one after the other."""
        return chain(chain.from_iterable(repeat(self.makers, len(self.epochs))), self.more)

    def find(self, number: int) -> tuple[_Maker, int, int]:
        """Return what makes a batch, and of which epoch and step it is."""
        epoch = min(number // max(self.each, 1), len(self.epochs))
        step = number - epoch * self.each
        makers = iter(self.makers if epoch < len(self.epochs) else self.more)
        made = next(makers)
        while step >= made.steps:
            step -= made.steps
            made = next(makers)
        return made, self.epochs.start + epoch, step

    def __call__(self, number: int) -> dict[str, Any]:
        if number >= self.stop:
            return {}
        made, *of = self.find(number)
        return made.batch(*of)


@dataclass
class _Maker:
    """What makes the batch of a step of an epoch."""

    source: Source
    classes: int
    operations: tuple[Operation, ...]
    batch_size: int
    shuffled: bool
    smoothing: float
    mixup: float
    mixed_epochs: int
    seed: int
    process: int
    processes: int
    layout: str
    steps: int
    _orders: dict[int, Array] = field(default_factory=dict)

    def batch(self, epoch: int, step: int) -> dict[str, Any]:
        """Return the arrays of a batch, and which images could not be read."""
        first = step * self.batch_size
        total = min(self.batch_size, len(self.source) - first)
        own = np.array_split(np.arange(total), self.processes)[self.process]
        broken: dict[str, str] = {}
        rows, own = len(own), own if len(own) else np.arange(1)  # of none: one tells the shape
        images, labels = self._images(epoch, first + own, broken)
        wanted = targets(labels, self.classes, self.smoothing)
        if self.mixup and epoch < self.mixed_epochs:
            if self.processes == 1:
                other, other_labels = images[::-1], labels[::-1]
            else:
                other, other_labels = self._images(epoch, first + total - 1 - own, broken)
            share = float(self._random(epoch, step).beta(self.mixup, self.mixup))
            images = mixed(images, other, share)
            wanted = mixed(wanted, targets(other_labels, self.classes, self.smoothing), share)
        return {
            "images": images[:rows], "targets": wanted[:rows], "labels": labels[:rows],
            "total": total,
            "names": list(broken), "errors": list(broken.values()),
        }  # fmt: skip

    def _images(self, epoch: int, places: Array, broken: dict[str, str]) -> tuple[Array, Array]:
        """Return the images and labels at places in the epoch's order."""
        indices = self._order(epoch)[places] if self.shuffled else places
        images, own = np.empty((0,) * 4, np.float32), list[int]()
        for found in (self._image(epoch, int(index), broken) for index in indices):
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

    def _image(
        self, epoch: int, index: int, broken: dict[str, str]
    ) -> tuple[Array, int, Array, Array] | None:
        """Return an image, or the next for one that is broken; its place; and how it is written.

        That is a number for each channel to multiply with, and one to add. In evaluation none takes
        another's place: None for one that is broken.
        """
        for at in range(index, index + (len(self.source) if self.shuffled else 1)):
            place = at % len(self.source)
            rng = self._random(epoch, place, 1) if self._draws else _NONE
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

    def _order(self, epoch: int) -> Array:
        """Return the order of the images in an epoch; two are kept, as threads may be in both."""
        found = self._orders.get(epoch)
        if found is None:
            found = self.source.shuffled(self._random(epoch))
            self._orders = {**dict(list(self._orders.items())[-1:]), epoch: found}
        return found

    def _random(self, *of: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64((self.seed, *of)))


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
