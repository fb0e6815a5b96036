"""Where images come from: arrays, files, Parquet; each a sequence of images with their labels."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from doconv_core.maths.numeric import Array
from doconv_core.training.data.needed import needed

GROUPS = 16  # of Parquet's rows, whose images are mixed
MODES = {1: "L", 3: "RGB"}  # Pillow's, by the number of channels


class DataError(ValueError):
    """Data that is not there, or not what it should be; the message says what would be right."""


class BrokenImages(DataError):
    """More images could not be read than may be."""


class Source(ABC):
    """A sequence of images.

    labels: `(N,)`, integers from 0. channels: of each image. max_broken: how many images may be
    unreadable in an epoch before that is an error; in training the next ones take their place, in
    evaluation they do not count.
    """

    labels: Array
    channels: int
    max_broken: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int) -> Any:
        """Return an image, Pillow's, or an array `(H, W, C)`: uint8, or float32 from 0 to 1.

        What cannot be read raises OSError, ValueError or SyntaxError, as Pillow does.
        """

    def name(self, index: int) -> str:
        """Return what to call an image in messages."""
        return f"image {index}"

    def shuffled(self, rng: np.random.Generator) -> Array:
        """Return the order in which an epoch takes the images."""
        return rng.permutation(np.arange(len(self), dtype=np.int32))


@dataclass
class Arrays(Source):
    """Images in memory: `(N, H, W, C)`, uint8, or float32 from 0 to 1."""

    images: Array
    labels: Array

    @property
    def channels(self) -> int:  # type: ignore[override]
        """Return how many channels the images have."""
        return int(self.images.shape[3])

    def image(self, index: int) -> Array:
        """Return an image."""
        found: Array = self.images[index]
        return found


class Names:
    """Many short texts in two arrays: a Python string of each would take several times as much.

    >>> list(Names(["a.jpg", "b.jpg"]))
    ['a.jpg', 'b.jpg']
    """

    def __init__(self, names: Iterable[str]) -> None:
        ends, joined = array("q", [0]), bytearray()
        for name in names:
            joined += name.encode("utf-8", "surrogateescape")
            ends.append(len(joined))
        self.joined = joined
        self.ends = np.array(ends, np.int64 if len(joined) >= 2**31 else np.int32)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        text = self.joined[self.ends[index] : self.ends[index + 1]]
        return text.decode("utf-8", "surrogateescape")


@dataclass
class Files(Source):
    """Image files. folder: which the names are relative to; prefixes: of each label's names."""

    folder: Path
    names: Names
    labels: Array
    prefixes: Sequence[str] = ()
    channels: int = 3

    def name(self, index: int) -> str:
        """Return the file's path."""
        prefix = self.prefixes[self.labels[index]] if self.prefixes else ""
        return os.path.join(self.folder, prefix, self.names[index])

    def image(self, index: int) -> Any:
        """Return the image, which is decoded when it is used."""
        with open(self.name(index), "rb") as file:
            return opened(BytesIO(file.read()), self.channels)


class Place(NamedTuple):
    """Where a row of Parquet is: the file, the group in it, the row of that."""

    file: int
    group: int
    row: int


@dataclass
class Parquet(Source):
    """Images in files of Parquet, as Hugging Face's `datasets` writes them: one column of bytes.

    A group of rows is read whole, and the last ones are kept; so an epoch takes the groups in a
    random order, and mixes the images of `GROUPS` of them. starts: `(G + 1,)`, the first row of
    each group; groups: `(G, 2)`, the file and the group in it.
    """

    files: list[Path]
    column: str
    starts: Array
    groups: Array
    labels: Array
    channels: int = 3

    def shuffled(self, rng: np.random.Generator) -> Array:
        """Return the order in which an epoch takes the images."""
        groups = rng.permutation(len(self.groups))
        mixed = []
        for first in range(0, len(groups), GROUPS):
            chosen = groups[first : first + GROUPS]
            rows = [np.arange(self.starts[n], self.starts[n + 1], dtype=np.int32) for n in chosen]
            mixed.append(rng.permutation(np.concatenate(rows)))
        return np.concatenate(mixed)

    def place(self, index: int) -> Place:
        """Return where a row is."""
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        file, inside = map(int, self.groups[group])
        return Place(file, inside, index - int(self.starts[group]))

    def name(self, index: int) -> str:
        """Return the file and the row of it."""
        place = self.place(index)
        return f"row {place.row} of group {place.group} of {self.files[place.file]}"

    def image(self, index: int) -> Any:
        """Return the image."""
        place = self.place(index)
        column = _group(self.files[place.file], place.group, self.column)
        value = column[place.row].as_py()
        stored = value["bytes"] if isinstance(value, dict) else value
        if stored is None:
            raise ValueError("the row has no bytes of an image")
        return opened(BytesIO(stored), self.channels)


@lru_cache(maxsize=2 * GROUPS)  # as threads may read the next batches already
def _group(file: Path, group: int, column: str) -> Any:
    table = needed("pyarrow.parquet").ParquetFile(file).read_row_group(group, columns=[column])
    return table.column(0)


def opened(file: Any, channels: int) -> Any:
    """Return an image file as Pillow has it, of so many channels; decoded when it is used.

    Raises OSError, ValueError or SyntaxError for what is no image, or one that is not shown.
    """
    module = needed("PIL.Image")
    needed("PIL.ImageFile").LOAD_TRUNCATED_IMAGES = False  # which GluonCV turns on for everybody
    try:
        return converted(module.open(file), channels)
    except module.DecompressionBombError as error:
        raise ValueError(str(error)) from error


def converted(image: Any, channels: int) -> Any:
    """Return Pillow's image with so many channels; without transparency, and in bytes."""
    mode = MODES.get(channels)
    if mode in (None, image.mode):
        return image
    if image.mode.startswith("I"):  # of 16 bits, in 32 for some formats
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() >= 2**16:
            raise ValueError(f"its levels are {levels.min()} to {levels.max()}, not of 16 bits")
        image = needed("PIL.Image").fromarray((levels // 256).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its levels are floats, of which none says what is white")
    elif image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")  # what is transparent keeps its colour
    return image.convert(mode)


@dataclass
class Items(Source):
    """A user's own sequence of (image, label), such as a data set of PyTorch's."""

    items: Any
    labels: Array
    channels: int
    as_image: Callable[[Any], Any]

    def image(self, index: int) -> Any:
        """Return an image."""
        image = self.as_image(self.items[index][0])
        return image if isinstance(image, np.ndarray) else converted(image, self.channels)


@dataclass
class ImageData:
    """A data set. classes: their names, in the order of the labels. train, val: its two parts.

    Raises DataError where a part is empty, or has labels outside of the classes.

    >>> part = Arrays(np.zeros((2, 8, 8, 1), np.uint8), np.arange(2))
    >>> ImageData("halves", ("even", "odd"), part, part).channels
    1
    """

    name: str
    classes: tuple[str, ...]
    train: Source
    val: Source

    def __post_init__(self) -> None:
        for part, source in (("train", self.train), ("val", self.val)):
            source.labels = np.asarray(source.labels)
            if source.labels.dtype.kind not in "iu" or source.labels.ndim != 1:
                raise DataError(
                    f"{self.name}: labels must be integers of shape (N,); the {part} part has "
                    f"{source.labels.dtype} of {source.labels.shape}."
                )
            source.labels = source.labels.astype(np.int64, copy=False)
            if not len(source):
                raise DataError(f"{self.name}: the {part} part has no images.")
            low, high = int(source.labels.min()), int(source.labels.max())
            if low < 0 or high >= len(self.classes):
                wrong = low if low < 0 else high
                raise DataError(
                    f"{self.name}: labels must be from 0 to {len(self.classes) - 1}, as there are "
                    f"{len(self.classes)} classes; the {part} part has {wrong}."
                )
        if self.train.channels != self.val.channels:
            raise DataError(
                f"{self.name}: images to train with have {self.train.channels} channels, those to "
                f"evaluate with {self.val.channels}."
            )

    @property
    def channels(self) -> int:
        """Return how many channels the images have."""
        return self.train.channels
