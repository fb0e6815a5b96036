"""What is done to an image: Pillow's, or an array `(H, W, C)`, uint8 or float32 from 0 to 1.

An image of a file is decoded as late as can be: a JPEG that is made smaller is decoded smaller.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from doconv_core.maths.numeric import Array
from doconv_core.training.data.needed import needed

Box = tuple[int, int, int, int]  # left, upper, right, lower
Size = tuple[int, int]  # height, width


def size_of(image: Any) -> Size:
    """Return the height and the width."""
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    return image.height, image.width


def as_array(image: Any) -> Array:
    """Return the image as an array `(H, W, C)`, uint8 or float32."""
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def as_floats(image: Any) -> Array:
    """Return the image as an array `(H, W, C)` in float32, from 0 to 1."""
    array = as_array(image)
    return array.astype(np.float32) / np.float32(255) if array.dtype == np.uint8 else array


def cropped(image: Any, box: Box) -> Any:
    """Return a part of the image."""
    if isinstance(image, np.ndarray):
        left, upper, right, lower = box
        return image[upper:lower, left:right]
    return image.crop(box)


def padded(image: Any, margin: int) -> Array:
    """Return the image with black around it, as an array."""
    array = as_array(image)
    return np.pad(array, ((margin, margin), (margin, margin), (0, 0))) if margin else array


def resized(image: Any, size: Size, box: Box | None = None) -> Any:
    """Return the image, or a part of it, in another size: bilinear, over all pixels that it takes.

    Source: Pillow's `resize`, whose filter grows with the reduction, so that nothing aliases.
    """
    height, width = size
    module = needed("PIL.Image")
    if isinstance(image, np.ndarray):
        if image.shape[:2] == size and box is None:
            return image
        mode = None if image.dtype == np.uint8 else "F"
        planes = [image[:, :, n] for n in range(image.shape[2])]
        made = [
            np.asarray(
                module.fromarray(np.ascontiguousarray(plane), mode=mode).resize(
                    (width, height), module.Resampling.BILINEAR, box=box
                )
            )
            for plane in planes
        ]
        return np.stack(made, -1)
    return image.resize((width, height), module.Resampling.BILINEAR, box=box, reducing_gap=None)


def flipped(image: Any) -> Any:
    """Return the image with left and right exchanged."""
    if isinstance(image, np.ndarray):
        return image[:, ::-1]
    return image.transpose(needed("PIL.Image").Transpose.FLIP_LEFT_RIGHT)


def central(image: Any, size: Size) -> Box:
    """Return where the part of this size in the middle is."""
    (height, width), (h, w) = size_of(image), size
    upper, left = round((height - h) / 2), round((width - w) / 2)
    return left, upper, left + w, upper + h


def with_short_side(size: Size, short: int) -> Size:
    """Return the size whose shorter side is `short`, in the same proportion."""
    height, width = size
    if height <= width:
        return short, int(short * width / height)
    return int(short * height / width), short


def draft_factor(size: Size, wanted: Size) -> int:
    """Return by how much an image may be decoded smaller and still be at least twice as large."""
    least = min(size[0] / max(wanted[0], 1), size[1] / max(wanted[1], 1))
    return max((f for f in (1, 2, 4, 8) if f <= least / 2), default=1)


def drafted(image: Any, wanted: Size) -> tuple[Any, float, float]:
    """Return a JPEG that is not decoded yet so that it will be decoded smaller, and by how much.

    It stays at least twice as large as wanted, so that what is resampled has its detail. Any other
    image is returned as it is, with factors of 1.
    """
    height, width = size_of(image)
    factor = draft_factor((height, width), wanted)
    if factor == 1 or isinstance(image, np.ndarray) or getattr(image, "format", None) != "JPEG":
        return image, 1.0, 1.0
    # Rounded down: Pillow halves no further than both sides stay as large as it is told.
    image.draft(None, (width // factor, height // factor))
    return image, image.width / width, image.height / height
