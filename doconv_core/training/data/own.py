"""Data of a user's own: arrays, sequences of images and labels, or anything that gives these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from doconv_core.maths.numeric import Array
from doconv_core.training.data.sources import (
    MODES,
    Arrays,
    DataError,
    ImageData,
    Items,
    Source,
    converted,
)

HELP = (
    "give (images, labels), or ((images, labels), (images, labels)) to train and to evaluate with; "
    "or for each of the two a sequence or an iterable of (image, label) or of batches"
)
SHARE = 5  # every fifth image is to evaluate with where there is one part alone


def as_data(data: Any, *, classes: tuple[str, ...] | None = None) -> ImageData:
    """Return a user's own data as a data set.

    data: `(images, labels)`, arrays of `(N, H, W)` or `(N, H, W, C)`, uint8, or floats from 0 to 1,
    and integers of `(N,)`; of them every fifth is to evaluate with. Or a pair of what there is to
    train and to evaluate with, each such a pair; a sequence, such as a data set of PyTorch's, of
    (image, label), where an image is Pillow's or an array; or an iterable of these or of batches of
    both, which is read to memory at once. Or an `ImageData`. classes: names of the labels.
    Raises DataError or TypeError for anything else, with what would be right.

    >>> data = as_data((np.zeros((10, 8, 8), np.uint8), np.arange(10) % 2))
    >>> len(data.train), len(data.val), data.classes
    (8, 2, ('0', '1'))
    """
    if isinstance(data, ImageData):
        return data
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise TypeError(
            f"data must be of images and labels; received {type(data).__name__}: {HELP}."
        )
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise TypeError(f"data must be a pair; received {type(data).__name__}: {HELP}.")
    train: Source
    val: Source
    if _is_array(data[0]) and _is_array(data[1]):
        train, val = _divided(_arrays(*data))
    else:
        train, val = (_source(part) for part in data)
    if classes is None:
        labels = np.concatenate([train.labels, val.labels])
        count = int(labels.max(initial=0)) + 1
        classes = tuple(map(str, range(count)))
    return ImageData("own data", classes, train, val)


def _is_pair(data: Any) -> bool:
    return isinstance(data, (tuple, list)) and len(data) == 2


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and len(getattr(value, "shape", ())) >= 1


def _source(part: Any) -> Source:
    if isinstance(part, Source):
        return part
    if _is_pair(part) and all(_is_array(each) for each in part):
        return _arrays(*part)
    if hasattr(part, "__getitem__") and hasattr(part, "__len__") and not _is_array(part):
        return _items(part)
    if isinstance(part, Iterable) and not _is_array(part):
        return _collected(part)
    raise TypeError(f"received {type(part).__name__} as a part of the data: {HELP}.")


def _arrays(images: Any, labels: Any) -> Arrays:
    images, labels = as_images(np.asarray(images)), _as_labels(labels)
    if images.ndim != 4 or len(images) != len(labels):
        raise DataError(
            f"images must be (N, H, W, C) with one label each; received {images.shape} and "
            f"{labels.shape}."
        )
    return Arrays(images, labels)


def as_images(images: Array) -> Array:
    """Return images as uint8 or float32, `(…, H, W, C)`; DataError for values outside of [0, 1]."""
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim == 4 and images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
        images = np.moveaxis(images, 1, -1)
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind in "iu":
        if images.size and (images.min() < 0 or images.max() > 255):
            raise DataError("integers in images must be from 0 to 255; others were received.")
        return images.astype(np.uint8)
    if images.dtype.kind != "f":
        raise DataError(f"images must be integers or floats; received {images.dtype}.")
    if images.size and not (images.min() >= 0 and images.max() <= 1):
        raise DataError(
            "floats in images must be from 0 to 1, and finite; received "
            f"{images.min():.4g} to {images.max():.4g}. Normalize by the recipe."
        )
    return images.astype(np.float32)


def _as_labels(labels: Any) -> Array:
    array = np.asarray(labels)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise DataError(
            f"labels must be integers of shape (N,); received {array.dtype} of {array.shape}."
        )
    return array.astype(np.int64)


def _items(items: Any) -> Items:
    """Return a sequence; its labels are read now, as all that shuffles must know how many."""
    if not len(items):
        raise DataError("a part of the data has no images.")
    try:
        told = getattr(items, "targets", None)
        if told is None or len(told) != len(items):
            told = [int(items[n][1]) for n in range(len(items))]
        labels = _as_labels(np.asarray(told))
        first = as_image(items[0][0])
    except (TypeError, IndexError, KeyError) as error:
        raise TypeError(f"a sequence must be of (image, label): {error}; {HELP}.") from error
    channels = first.shape[2] if isinstance(first, np.ndarray) else len(first.getbands())
    return Items(items, labels, channels, as_image)


def as_image(image: Any) -> Any:
    """Return one image as the operations take it."""
    if hasattr(image, "getbands"):  # Pillow's
        return image if image.mode in MODES.values() else converted(image, 3)
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise DataError(f"an image must be (H, W, C); received {array.shape}.")
    if array.shape[2] not in (1, 3) and array.shape[0] in (1, 3):
        array = np.moveaxis(array, 0, -1)
    return as_images(array[None])[0]


def _collected(iterable: Iterable[Any]) -> Arrays:
    """Return what an iterable gives, single images or batches, in memory."""
    images: list[Array] = []
    labels: list[Array] = []
    for item in iterable:
        if not (isinstance(item, (tuple, list)) and len(item) >= 2):
            raise TypeError(f"an iterable must give (images, labels); {HELP}.")
        label = np.asarray(item[1])
        if label.ndim == 0:
            images.append(np.atleast_3d(as_image(item[0]))[None])
        else:
            images.append(as_images(np.asarray(item[0])))
        labels.append(_as_labels(np.atleast_1d(label)))
    if not images:
        raise DataError("an iterable of the data gave no images.")
    shapes = {x.shape[1:] for x in images}
    if len(shapes) > 1:
        raise DataError(
            f"images of an iterable must be of one size; received {sorted(shapes)[:3]}."
        )
    return _arrays(np.concatenate(images), np.concatenate(labels))


def _divided(whole: Arrays) -> tuple[Arrays, Arrays]:
    chosen = np.arange(len(whole)) % SHARE == SHARE - 1
    parts = [Arrays(whole.images[rows], whole.labels[rows]) for rows in (~chosen, chosen)]
    return parts[0], parts[1]
