"""What is done to an image: Pillow's, or an array `(H, W, C)`, uint8 or float32 from 0 to 1.

An image of a file is decoded as late as can be: a JPEG that is made smaller is decoded smaller.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from doconv_core.maths.numeric import Array
from doconv_core.training.data.needed import needed

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue
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


def padded(image: Any, upper: int, lower: int, left: int, right: int) -> Any:
    """Return the image with black around it, so many pixels at each side."""
    if not (upper or lower or left or right):
        return image
    array = as_array(image)
    height, width, channels = array.shape
    made = np.zeros((upper + height + lower, left + width + right, channels), array.dtype)
    made[upper : upper + height, left : left + width] = array
    return made


def as_pillow(image: Any) -> Any:
    """Return an image of bytes, of one channel or three, as Pillow has it."""
    if not isinstance(image, np.ndarray):
        return image
    flat = image[:, :, 0] if image.shape[2] == 1 else image
    return needed("PIL.Image").fromarray(np.ascontiguousarray(flat))


def is_bytes(image: Any) -> bool:
    """Return whether Pillow can have the image: bytes, of one channel or three."""
    if not isinstance(image, np.ndarray):
        return True
    return image.dtype == np.uint8 and image.shape[2] in (1, 3)


def resized(image: Any, size: Size, box: tuple[float, ...] | None = None) -> Any:
    """Return the image, or a part of it, in another size: bilinear, over all pixels that it takes.

    Source: Pillow's `resize`, whose filter grows with the reduction, so that nothing aliases.
    """
    if size_of(image) == size and box is None:
        return image
    module = needed("PIL.Image")

    def change(one: Any) -> Any:
        return one.resize(size[::-1], module.Resampling.BILINEAR, box=box)

    if is_bytes(image):
        return change(as_pillow(image))
    planes = [module.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(image, 2, 0)]
    return np.stack([np.asarray(change(plane)) for plane in planes], -1)


def grey(image: Any) -> Any:
    """Return a colour image's brightness in each channel, and any other as it is.

    Source: ITU-R BT.601.
    """
    if not isinstance(image, np.ndarray):
        return image.convert("L").convert(image.mode)
    return np.broadcast_to((image @ LUMA)[:, :, None], image.shape) if _is_colour(image) else image


def blended(other: Any, image: Any, factor: float) -> Any:
    """Return `factor` of the image and the rest of another, from black to white.

    other: an image like it, or one grey for all of it, from 0 to 1.
    """
    if isinstance(image, np.ndarray):
        found: Array = np.clip(other + np.float32(factor) * (image - other), 0, 1)
        return found
    module = needed("PIL.Image")
    if isinstance(other, (int, float)):
        bands = len(image.getbands())
        level = round(255 * other)
        other = module.new(image.mode, image.size, (level,) * bands if bands > 1 else level)
    return module.blend(other, image, factor)


def brightness(image: Any) -> float:
    """Return the mean of an image's grey, from 0 to 1."""
    if isinstance(image, np.ndarray):
        return float(grey(image)[:, :, 0].mean()) if _is_colour(image) else float(image.mean())
    return float(np.asarray(image.convert("L")).mean()) / 255


def _is_colour(image: Array) -> bool:
    return bool(image.shape[2] == 3)


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
