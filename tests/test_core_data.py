"""Operations on images, compared with torchvision's and GluonCV's definitions, written out here."""

from __future__ import annotations

from math import exp, log, sqrt

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from doconv_core.training.data import DataError, parsed
from doconv_core.training.data.images import as_array, as_floats

BILINEAR = Image.Resampling.BILINEAR
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Drawn:
    """Stands for random numbers: gives what it was given, and no more."""

    def __init__(self, *numbers, order=(0, 1, 2)):
        self.numbers, self.order = list(numbers), list(order)

    def _next(self, *_):
        return self.numbers.pop(0)

    uniform = integers = random = _next

    def permutation(self, count):
        assert count == len(self.order)
        return self.order

    def normal(self, mean, deviation, count):
        return mean + deviation * np.array([self._next() for _ in range(count)])


def picture(height=30, width=44, channels=3, seed=0):
    """A smooth image of bytes, with its own noise, as an array."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    found = np.asarray(small.resize((width, height), BILINEAR)).astype(int)
    found = np.clip(found + rng.integers(-9, 10, found.shape), 0, 255).astype(np.uint8)
    return found if channels == 3 else found[:, :, :1]


def forms(array):
    """The image as Pillow's, as an array, and as floats."""
    flat = array if array.shape[2] == 3 else array[:, :, 0]
    return {"pillow": Image.fromarray(flat), "bytes": array, "floats": as_floats(array)}


def done(text, image, *numbers, **others):
    return as_array(parsed(text)(image, Drawn(*numbers, **others)))


@pytest.mark.parametrize("form", ["pillow", "bytes", "floats"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("text", "size"), [("resize 20 50", (20, 50)), ("short_side 20", (20, 29))]
)
def test_resizing_is_pillows(text, size, channels, form):
    array = picture(channels=channels)
    found = as_floats(done(text, forms(array)[form]))
    wanted = as_floats(np.asarray(forms(array)["pillow"].resize(size[::-1], BILINEAR)))
    assert found.shape == (*size, channels)
    # Pillow rounds bytes after each of the two directions.
    np.testing.assert_allclose(found, wanted.reshape(found.shape), atol=1.1 / 255)


@pytest.mark.parametrize("form", ["pillow", "bytes", "floats"])
@pytest.mark.parametrize(("height", "width"), [(30, 45), (31, 44), (30, 15), (17, 16)])
def test_center_crop_is_torchvisions(height, width, form):
    array = picture(height, width)
    found = as_floats(done("center_crop 20", forms(array)[form]))
    lack_y, lack_x = max(0, 20 - height), max(0, 20 - width)
    pads = ((lack_y // 2, (lack_y + 1) // 2), (lack_x // 2, (lack_x + 1) // 2), (0, 0))
    padded = np.pad(as_floats(array), pads)
    upper, left = (round((side - 20) / 2.0) for side in padded.shape[:2])
    np.testing.assert_array_equal(found, padded[upper : upper + 20, left : left + 20])


@pytest.mark.parametrize("form", ["pillow", "bytes", "floats"])
@pytest.mark.parametrize("padding", [0, 4])
def test_random_crop_is_torchvisions(padding, form):
    array = picture()
    text = f"random_crop 24 {padding}"
    found = as_floats(done(text, forms(array)[form], 5, 3))
    whole = np.pad(as_floats(array), ((padding,) * 2, (padding,) * 2, (0, 0)))
    np.testing.assert_array_equal(found, whole[5:29, 3:27])
    places = {parsed(text)(array[:, :, :1], np.random.default_rng(n)).tobytes() for n in range(300)}
    assert len(places) > 15 * (1 + padding)  # anywhere in it


def torchvisions_part(height, width, draws):
    """RandomResizedCrop.get_params."""
    area = height * width
    for _ in range(10):
        target = area * draws.pop(0)
        aspect = exp(draws.pop(0))
        w, h = round(sqrt(target * aspect)), round(sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return draws.pop(0), draws.pop(0), h, w
    ratio = width / height
    if ratio < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif ratio > 4 / 3:
        h, w = height, round(height * (4 / 3))
    else:
        h, w = height, width
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("form", ["pillow", "bytes", "floats"])
@pytest.mark.parametrize(
    ("size", "draws"),
    [
        ((30, 44), (0.3, 0.1, 4, 7)),
        ((30, 44), (0.99, 0.28, 0.5, log(3 / 4), 2, 1)),  # the first does not fit
        ((30, 44), (1.0, log(3 / 4)) * 10),
        ((40, 20), (1.0, log(4 / 3)) * 10),
        ((30, 30), (1.0, log(4 / 3)) * 10),
    ],
)
def test_random_resized_crop_is_torchvisions(size, draws, form):
    array = picture(*size)
    upper, left, height, width = torchvisions_part(*size, list(draws))
    part = array[upper : upper + height, left : left + width]
    found = as_floats(done("random_resized_crop 16", forms(array)[form], *draws))
    # As it resizes tensors, from a part cut out, and in floats.
    planes = [
        Image.fromarray(as_floats(part)[:, :, n]).resize((16, 16), BILINEAR) for n in (0, 1, 2)
    ]
    inner = (slice(2, -2),) * 2  # at the edges, Pillow sees a little of what is around the part
    wanted = np.stack([np.asarray(plane) for plane in planes], -1)
    np.testing.assert_allclose(found[inner], wanted[inner], atol=1.1 / 255)
    assert np.abs(found - wanted).mean() < 2 / 255


def test_parts_have_areas_and_proportions_in_their_limits():
    operation, rng = parsed("random_resized_crop 8 .2 .5 .5 2"), np.random.default_rng(0)
    parts = np.array([operation.part((100, 120), rng) for _ in range(500)])
    width, height = parts[:, 2] - parts[:, 0], parts[:, 3] - parts[:, 1]
    area, ratio = width * height / 12000, width / height
    assert 0.19 < area.min() < 0.22
    assert 0.47 < area.max() < 0.51
    assert 0.48 < ratio.min() < 0.55
    assert 1.8 < ratio.max() < 2.07
    assert parts.min() >= 0
    assert parts[:, 2].max() <= 120
    assert parts[:, 3].max() <= 100


@pytest.mark.parametrize("form", ["pillow", "bytes", "floats"])
@pytest.mark.parametrize("drawn", [0.49, 0.5])
def test_flip_exchanges_left_and_right_of_every_other_image(drawn, form):
    image = forms(picture())[form]
    wanted = as_array(image)[:, ::-1] if drawn < 0.5 else as_array(image)
    np.testing.assert_array_equal(done("flip", image, drawn), wanted)


ENHANCERS = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("form", ["pillow", "bytes"])
def test_jitter_of_bytes_is_torchvisions_of_pillows_images(form, order):
    image = wanted = Image.fromarray(picture())
    factors = 1.35, 0.7, 1.3
    for number, factor in zip(order, factors, strict=True):
        wanted = ENHANCERS[number](wanted).enhance(factor)
    found = done("jitter .4 .4 .4", forms(picture())[form], *factors, order=order)
    # Pillow rounds the mean of grey its own way.
    assert np.abs(found.astype(int) - np.asarray(wanted)).max() <= 1
    assert np.abs(found.astype(int) - np.asarray(image)).max() > 20


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_jitter_of_floats_is_torchvisions_of_tensors(order):
    wanted = x = as_floats(picture())
    factors = 1.35, 0.7, 1.3

    def grey(image):
        return (0.2989 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2])[..., None]

    for number, factor in zip(order, factors, strict=True):
        other = (np.zeros_like(wanted), grey(wanted).mean(), grey(wanted))[number]
        wanted = np.clip(factor * wanted + (1 - factor) * other, 0, 1)
    found = done("jitter .4 .4 .4", x, *factors, order=order)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=2e-4)  # 0.2989 is 0.299 here, as in Pillow


@pytest.mark.parametrize("form", ["pillow", "bytes", "floats"])
def test_jitter_takes_grey_images_and_leaves_out_what_is_zero(form):
    image = forms(picture(channels=1))[form]
    found = as_floats(done("jitter .5 0 .5", image, 0.5, 1.5))  # saturation changes no grey
    np.testing.assert_allclose(found, as_floats(image) * 0.5, atol=1 / 255)
    found = parsed("jitter 2 0 0")(image, np.random.default_rng(0))
    assert as_floats(found).min() >= 0


def test_lighting_is_gluoncvs():
    x, drawn = picture(), (0.3, -1.2, 2.0)
    # gluoncv.data.transforms and mxnet.image.LightingAug: values of bytes.
    values = np.array([55.46, 4.794, 1.148])
    vectors = np.array(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    moved = x + np.dot(vectors * (0.1 * np.array(drawn)), values)
    np.testing.assert_allclose(done("lighting .1", x, *drawn), moved / 255, atol=1e-6)
    grey = picture(channels=1)
    np.testing.assert_array_equal(done("lighting .1", grey), as_floats(grey))


@pytest.mark.parametrize("form", ["pillow", "bytes", "floats"])
def test_normalize_is_torchvisions(form):
    x = picture()
    text = "normalize .485 .456 .406 .229 .224 .225"
    wanted = (x / 255 - np.array(IMAGENET[0])) / np.array(IMAGENET[1])
    np.testing.assert_allclose(done(text, forms(x)[form]), wanted, atol=2e-6)
    np.testing.assert_allclose(
        done("normalize .5 .25", forms(x)[form]), (x / 255 - 0.5) / 0.25, atol=2e-6
    )
    with pytest.raises(DataError, match="normalize has 3 means, and images have 1 channels"):
        done(text, x[:, :, :1])


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path):
    array = picture(800, 1000, seed=1)
    Image.fromarray(array).save(tmp_path / "a.jpg", quality=95)
    for text, numbers in (
        ("short_side 64", ()),
        ("resize 64 48", ()),
        ("random_resized_crop 40", (0.5, 0.1, 5, 7)),
    ):
        lazy, whole = Image.open(tmp_path / "a.jpg"), Image.open(tmp_path / "a.jpg").convert("RGB")
        found, wanted = done(text, lazy, *numbers), done(text, whole, *numbers)
        assert lazy.size[0] < 600
        assert whole.size == (1000, 800)
        assert found.shape == wanted.shape
        assert np.abs(found.astype(int) - wanted).mean() < 1.5  # of 255


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is no operation on images; there are resize, short_side,"),
        ("turn 3", "'turn 3' is no operation on images"),
        ("flip 1", "an operation is written 'flip'; received 'flip 1'"),
        ("resize 3", "an operation is written 'resize HEIGHT WIDTH'; received 'resize 3'"),
        ("random_crop 3.5", r"written 'random_crop SIZE \[PADDING\]'; received 'random_crop 3.5'"),
        ("jitter a b c", "an operation is written 'jitter BRIGHTNESS CONTRAST SATURATION'"),
        ("center_crop 0", "sizes must be at least 1; received 'center_crop 0'"),
        ("random_crop 8 -1", "numbers must not be negative; received 'random_crop 8 -1'"),
        ("lighting nan", "numbers must be finite; received 'lighting nan'"),
        ("normalize 1 0", "deviations must be above 0; received 'normalize 1 0'"),
        ("random_resized_crop 8 .9 .1 1 1", "areas must rise from above 0 to 1, and ratios"),
        ("random_resized_crop 8 .1 .9 2 1", "areas must rise from above 0 to 1, and ratios"),
    ],
)
def test_what_is_no_operation_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parsed(text)
