"""Operations on images, in words as recipes have them: "random_crop 32 4", "flip".

Each is a frozen dataclass of its numbers, which takes an image (`images.py`) and a source of random
numbers, and returns an image. Definitions: those of torchvision's transforms of the same names, and
of GluonCV's for `lighting`; values are in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from math import exp, log, sqrt
from typing import Any

import numpy as np

from doconv_core.maths.numeric import Array
from doconv_core.training.data.images import (
    Box,
    as_floats,
    as_pillow,
    blended,
    brightness,
    central,
    cropped,
    drafted,
    flipped,
    grey,
    is_bytes,
    padded,
    resized,
    size_of,
    with_short_side,
)
from doconv_core.training.data.sources import DataError

# Of the colours of ImageNet's images, from 0 to 1. Source: AlexNet, as GluonCV has it.
EIGENVALUES = np.array([55.46, 4.794, 1.148]) / 255
EIGENVECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)
ATTEMPTS = 10  # of a random part's proportions, before the middle is taken

Random = np.random.Generator


class Operation:
    """What is done to an image. random: whether it draws numbers."""

    random = False

    def __call__(self, image: Any, rng: Random) -> Any:
        """Return the image that comes of another."""
        raise NotImplementedError


@dataclass(frozen=True)
class Resize(Operation):
    """Both sides become as given."""

    height: int
    width: int

    def __call__(self, image: Any, rng: Random) -> Any:
        """Return the resized image."""
        size = self.height, self.width
        return resized(drafted(image, size)[0], size)


@dataclass(frozen=True)
class ShortSide(Operation):
    """The shorter side becomes as given, in the same proportion."""

    size: int

    def __call__(self, image: Any, rng: Random) -> Any:
        """Return the resized image."""
        size = with_short_side(size_of(image), self.size)
        return resized(drafted(image, size)[0], size)


@dataclass(frozen=True)
class CenterCrop(Operation):
    """The square in the middle; what an image is too small for is black."""

    size: int

    def __call__(self, image: Any, rng: Random) -> Any:
        """Return the part."""
        image = _large_enough(image, self.size)
        return cropped(image, central(image, (self.size, self.size)))


@dataclass(frozen=True)
class RandomCrop(Operation):
    """A square anywhere in the image, with black of the padding's width around it."""

    random = True
    size: int
    padding: int = 0

    def __call__(self, image: Any, rng: Random) -> Any:
        """Return the part."""
        image = _large_enough(padded(image, *(self.padding,) * 4), self.size)
        height, width = size_of(image)
        upper = int(rng.integers(height - self.size + 1))
        left = int(rng.integers(width - self.size + 1))
        return cropped(image, (left, upper, left + self.size, upper + self.size))


@dataclass(frozen=True)
class RandomResizedCrop(Operation):
    """A part of random area and proportions, resized to a square."""

    random = True
    size: int
    area_min: float = 0.08
    area_max: float = 1.0
    ratio_min: float = 3 / 4
    ratio_max: float = 4 / 3

    def __call__(self, image: Any, rng: Random) -> Any:
        """Return the resized part."""
        left, upper, right, lower = self.part(size_of(image), rng)
        # Decoded smaller by so much that this part still is twice as large as it will be.
        image, x, y = _drafted_part(image, (lower - upper, right - left), self.size)
        height, width = size_of(image)
        box = left * x, upper * y, min(right * x, width), min(lower * y, height)
        return resized(image, (self.size, self.size), box)

    def part(self, size: tuple[int, int], rng: Random) -> Box:
        """Return the part that is taken of an image of this height and width."""
        height, width = size
        for _ in range(ATTEMPTS):
            area = height * width * rng.uniform(self.area_min, self.area_max)
            ratio = exp(rng.uniform(log(self.ratio_min), log(self.ratio_max)))
            w, h = round(sqrt(area * ratio)), round(sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                upper, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
                return left, upper, left + w, upper + h
        ratio = min(max(width / height, self.ratio_min), self.ratio_max)
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        upper, left = (height - h) // 2, (width - w) // 2
        return left, upper, left + w, upper + h


@dataclass(frozen=True)
class Flip(Operation):
    """Left and right exchanged, of every other image."""

    random = True

    def __call__(self, image: Any, rng: Random) -> Any:
        """Return the image, flipped or not."""
        return flipped(image) if rng.random() < 0.5 else image


@dataclass(frozen=True)
class Jitter(Operation):
    """Brightness, contrast and saturation times 1 - x to 1 + x, in random order."""

    random = True
    brightness: float
    contrast: float
    saturation: float

    def __call__(self, image: Any, rng: Random) -> Any:
        """Return the changed image: of bytes, it stays one of bytes, rounded after each change."""
        image = as_pillow(image) if is_bytes(image) else as_floats(image)
        spans = self.brightness, self.contrast, self.saturation
        for number in rng.permutation(len(spans)):
            if span := spans[number]:
                factor = rng.uniform(max(0, 1 - span), 1 + span)
                image = blended(_WITHOUT[number](image), image, factor)
        return image


# What an image is without brightness, contrast or saturation.
_WITHOUT: tuple[Callable[[Any], Any], ...] = (lambda image: 0.0, brightness, grey)


class Affine(Operation):
    """Each channel times a number, plus another; several in a row are done as one."""

    def numbers(self, channels: int, rng: Random) -> tuple[Array, Array]:
        """Return what values from 0 to 1 are multiplied with, and what is added: for each channel.

        Raises DataError where images have another number of channels than the operation.
        """
        raise NotImplementedError

    def __call__(self, image: Any, rng: Random) -> Array:
        """Return the changed image, in float32."""
        x = as_floats(image)
        scale, shift = self.numbers(x.shape[2], rng)
        changed: Array = x * scale.astype(x.dtype) + shift.astype(x.dtype)
        return changed


@dataclass(frozen=True)
class Lighting(Affine):
    """Colours moved along the axes in which ImageNet's vary, by normal numbers; grey stays."""

    random = True
    deviation: float

    def numbers(self, channels: int, rng: Random) -> tuple[Array, Array]:
        """Return ones, and what is added to the colours."""
        if channels != 3:
            return np.ones(channels), np.zeros(channels)
        return np.ones(3), EIGENVECTORS @ (rng.normal(0, self.deviation, 3) * EIGENVALUES)


@dataclass(frozen=True, init=False)
class Normalize(Affine):
    """Each channel less its mean, divided by its deviation."""

    means: tuple[float, ...]
    deviations: tuple[float, ...]

    def __init__(self, *numbers: float) -> None:
        half = len(numbers) // 2
        object.__setattr__(self, "means", numbers[:half])
        object.__setattr__(self, "deviations", numbers[half:])

    def numbers(self, channels: int, rng: Random) -> tuple[Array, Array]:
        """Return what the means and deviations come to."""
        if len(self.means) not in (1, channels):
            raise DataError(
                f"normalize has {len(self.means)} means, and images have {channels} channels."
            )
        scale = np.broadcast_to(1 / np.array(self.deviations), channels)
        return scale, -np.array(self.means) * scale


def _large_enough(image: Any, size: int) -> Any:
    """Return the image, with black around it where it is smaller than a square."""
    lacking = [max(0, size - side) for side in size_of(image)]
    return padded(image, *(part for n in lacking for part in (n // 2, n - n // 2)))


def _drafted_part(image: Any, part: tuple[int, int], size: int) -> tuple[Any, float, float]:
    height, width = size_of(image)
    wanted = size * height // part[0], size * width // part[1]
    return drafted(image, wanted)


OPERATIONS: dict[str, type[Operation]] = {
    "resize": Resize, "short_side": ShortSide, "center_crop": CenterCrop,
    "random_crop": RandomCrop, "random_resized_crop": RandomResizedCrop, "flip": Flip,
    "jitter": Jitter, "lighting": Lighting, "normalize": Normalize,
}  # fmt: skip
# How many numbers each takes, and what they are.
TAKES = {
    "resize": ((2,), "HEIGHT WIDTH"), "short_side": ((1,), "SIZE"), "center_crop": ((1,), "SIZE"),
    "random_crop": ((1, 2), "SIZE [PADDING]"),
    "random_resized_crop": ((1, 5), "SIZE [AREA_MIN AREA_MAX RATIO_MIN RATIO_MAX]"),
    "flip": ((0,), ""), "jitter": ((3,), "BRIGHTNESS CONTRAST SATURATION"),
    "lighting": ((1,), "DEVIATION"), "normalize": ((2, 6), "MEANS… DEVIATIONS…, 1 or 3 of each"),
}  # fmt: skip


@lru_cache(maxsize=256)
def parsed(text: str) -> Operation:
    """Return the operation that a text says, such as "random_crop 32 4".

    Raises ValueError for another word, and for numbers that do not fit it.

    >>> parsed("random_crop 32 4")
    RandomCrop(size=32, padding=4)
    """
    word, *numbers = text.split() or [""]
    if word not in OPERATIONS:
        raise ValueError(f"{text!r} is no operation on images; there are {', '.join(OPERATIONS)}.")
    counts, told = TAKES[word]
    wanted = f"{word} {told}".strip()
    if len(numbers) not in counts:
        raise ValueError(f"an operation is written {wanted!r}; received {text!r}.")
    made = OPERATIONS[word]
    whole = {f.name: f.type == "int" for f in fields(made)}  # type: ignore[arg-type]
    names = list(whole) if word != "normalize" else [""] * 6
    try:
        values = [
            int(n) if whole.get(name) else float(n) for name, n in zip(names, numbers, strict=False)
        ]
    except ValueError:
        raise ValueError(f"an operation is written {wanted!r}; received {text!r}.") from None
    _check_numbers(word, values, text)
    return made(*values)


def _check_numbers(word: str, values: list[float], text: str) -> None:
    """Raise ValueError for numbers that give no image."""
    sizes = {"resize": 2, "short_side": 1, "center_crop": 1, "random_crop": 1}
    sizes["random_resized_crop"] = 1
    count = sizes.get(word, 0)
    if any(value < 1 for value in values[:count]):
        raise ValueError(f"sizes must be at least 1; received {text!r}.")
    if any(not np.isfinite(value) for value in values):
        raise ValueError(f"numbers must be finite; received {text!r}.")
    if word != "normalize" and any(value < 0 for value in values[count:]):
        raise ValueError(f"numbers must not be negative; received {text!r}.")
    if word == "normalize" and any(value <= 0 for value in values[len(values) // 2 :]):
        raise ValueError(f"deviations must be above 0; received {text!r}.")
    if word == "random_resized_crop" and len(values) == 5:
        a, b, c, d = values[1:]
        if not 0 < a <= b <= 1 or not 0 < c <= d:
            raise ValueError(f"areas must rise from above 0 to 1, and ratios, too; got {text!r}.")
