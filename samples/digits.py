"""The samples' data: handwritten digits, 28×28, from scikit-learn or from MNIST."""

from __future__ import annotations

import socket
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.ndimage import zoom
from sklearn.datasets import fetch_openml, load_digits
from sklearn.model_selection import train_test_split

DATASETS = ("digits", "mnist")
SIZE = 28
MARGIN = 4
MNIST_TRAINING = 60_000  # of 70,000; OpenML keeps them in their original order
MNIST_FILE = "mnist.npz"
MNIST_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
PATIENCE = 20  # seconds without a byte from the network


class DataError(Exception):
    """The data is not there, or is not what it should be; the message says what to do."""


class Data(NamedTuple):
    """Images `(N, 28, 28)` in float32 from 0 to 1, and labels `(N,)` in int64 from 0 to 9."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(name: str, data_dir: str | Path) -> Data:
    """Return the data set "digits" or "mnist"; the latter is looked for in `data_dir` first.

    Raises DataError where MNIST can be neither found nor downloaded.
    """
    return load_small() if name == "digits" else load_mnist(Path(data_dir))


def load_small() -> Data:
    """Return scikit-learn's 1,797 digits: the same 1,257 to train and 540 to test with, always.

    Their 8×8 pixels, which they fill, become 20×20 in a frame of 28×28, as MNIST's digits are: so
    the tutorials' networks meet what they were made for. The interpolation is cubic, for the soft
    edges of a pen's stroke, and clipped where it overshoots. The split keeps each digit's share.
    """
    small, labels = load_digits(return_X_y=True)
    small = small.reshape(-1, 8, 8) / 16
    scale = (SIZE - 2 * MARGIN) / 8
    # grid_mode: pixels are areas, not points, so the digit keeps its place between the margins.
    large = zoom(small, (1, scale, scale), order=3, mode="nearest", grid_mode=True)
    images = np.pad(large.clip(0, 1), ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))
    images = images.astype(np.float32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.3, random_state=0, stratify=labels
    )
    labels = labels.astype(np.int64)
    return Data(images[train], labels[train], images[test], labels[test])


def load_mnist(data_dir: Path) -> Data:
    """Return MNIST, 60,000 images to train with and 10,000 to test with.

    It is read from `mnist.npz` in `data_dir` where there is such a file, else fetched from OpenML
    by scikit-learn, which keeps what it fetches in `data_dir`. Raises DataError if neither works.
    """
    file = data_dir / MNIST_FILE
    if file.exists():
        return _read_mnist(file)
    # The faster of the two parsers is the one that needs pandas, which is not asked for here.
    parser = "pandas" if find_spec("pandas") else "liac-arff"
    try:
        with _impatient(), warnings.catch_warnings():
            # The one retry that scikit-learn insists on announces itself; the error says more.
            warnings.filterwarnings("ignore", "A network error occurred", UserWarning)
            pixels, labels = fetch_openml(
                "mnist_784", version=1, data_home=data_dir, return_X_y=True, as_frame=False,
                parser=parser, n_retries=1, delay=0.1,
            )  # fmt: skip
    except (OSError, HTTPException, ValueError) as error:
        raise DataError(
            f"MNIST could not be fetched from openml.org: {error}.\n"
            f"On a machine with a network, download {MNIST_URL}\n"
            f"(11 MB), and put it here as {file.absolute()}"
        ) from error
    images = pixels.reshape(-1, SIZE, SIZE)
    n = MNIST_TRAINING
    return _scaled(images[:n], labels[:n], images[n:], labels[n:])


def _read_mnist(file: Path) -> Data:
    """Return what `mnist.npz` holds; any number of images will do. DataError says what is wrong."""
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        # Opened here, as NumPy would leave a damaged file open.
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
            arrays = [stored[name] for name in names]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{file} is not a whole {MNIST_FILE}, which has the arrays {', '.join(names)}: "
            f"{error}.\nDownload it again from {MNIST_URL}."
        ) from error
    for name, array in zip(names, arrays, strict=True):
        wanted = (SIZE, SIZE) if name.startswith("x") else ()
        if array.dtype != np.uint8 or array.shape[1:] != wanted or not len(array):
            raise DataError(
                f"{file}: {name} must be uint8 of shape {('N', *wanted)}; "
                f"found {array.dtype} of shape {array.shape}."
            )
    x_train, y_train, x_test, y_test = arrays
    for images, labels in ((x_train, y_train), (x_test, y_test)):
        if len(images) != len(labels) or labels.max() > 9:
            raise DataError(
                f"{file}: expected one label from 0 to 9 for each image; found {len(labels)} "
                f"labels up to {labels.max()} for {len(images)} images."
            )
    return _scaled(x_train, y_train, x_test, y_test)


def _scaled(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
) -> Data:
    """Return pixels from 0 to 255 as 0 to 1, and labels of any type as integers."""
    scale = np.float32(255)
    return Data(
        train_images.astype(np.float32) / scale,
        train_labels.astype(np.int64),
        test_images.astype(np.float32) / scale,
        test_labels.astype(np.int64),
    )


@contextmanager
def _impatient() -> Iterator[None]:
    """Let a connection that stays silent fail after a while; by default it may hang for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
