"""Where images come from: arrays, files, Parquet; each a sequence of images with their labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from doconv_core.maths.numeric import Array
from doconv_core.training.data.needed import needed

MODES = {1: "L", 3: "RGB"}  # Pillow's, by the number of channels


class DataError(ValueError):
    """Data that is not there, or not what it should be; the message says what would be right."""


class BrokenImages(DataError):
    """More images could not be read than may be."""


class Source(ABC):
    """A sequence of images. labels: `(N,)`, integers from 0. channels: of each image."""

    labels: Array
    channels: int

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
        ends, joined = [0], bytearray()
        for name in names:
            joined += name.encode("utf-8", "surrogateescape")
            ends.append(len(joined))
        self.joined = bytes(joined)
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
        return str(self.folder / prefix / self.names[index])

    def image(self, index: int) -> Any:
        """Return the image, which is decoded when it is used."""
        # The file stays open until then, and Pillow closes it.
        return opened(self.name(index), self.channels)


class Place(NamedTuple):
    """Where a row of Parquet is: the file, the group in it, the row of that."""

    file: int
    group: int
    row: int


@dataclass
class Parquet(Source):
    """Images in files of Parquet, as Hugging Face's `datasets` writes them: one column of bytes.

    A group of rows is read whole, and the last ones are kept. starts: `(G + 1,)`, the first row of
    each group; groups: `(G, 2)`, the file and the group in it.
    """

    files: list[Path]
    column: str
    starts: Array
    groups: Array
    labels: Array
    channels: int = 3

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


@lru_cache(maxsize=16)
def _group(file: Path, group: int, column: str) -> Any:
    table = needed("pyarrow.parquet").ParquetFile(file).read_row_group(group, columns=[column])
    return table.column(0)


def opened(file: Any, channels: int) -> Any:
    """Return an image file as Pillow has it, in the mode of so many channels."""
    needed("PIL.ImageFile").LOAD_TRUNCATED_IMAGES = False  # which GluonCV turns on for everybody
    image = needed("PIL.Image").open(file)
    mode = MODES[channels]
    if image.mode == mode:
        return image
    if image.mode in ("P", "RGBA", "LA", "PA") or "transparency" in image.info:
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
        return self.as_image(self.items[index][0])


@dataclass
class ImageData:
    """A data set. classes: their names, in the order of the labels. train, val: its two parts.

    max_broken: how many images may be unreadable before that is an error; others take their place.
    Raises DataError where a part is empty, or has labels outside of the classes.
    """

    name: str
    classes: tuple[str, ...]
    train: Source
    val: Source
    max_broken: int = 0

    def __post_init__(self) -> None:
        for part, source in (("train", self.train), ("val", self.val)):
            source.labels = np.ascontiguousarray(source.labels, np.int64)
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
