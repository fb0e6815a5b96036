"""JPEGs that are made smaller are decoded smaller, and come out as they would have."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from cases import one_test
from PIL import Image

from doconv_core.training.data import parsed
from doconv_core.training.data.images import as_array, drafted


def smooth(width, height):
    """Return a stored JPEG whose colours change slowly, so that no size of it has more detail."""
    y, x = np.mgrid[:height, :width]
    planes = [np.sin(x / 97 + n) + np.cos(y / 83 - n) for n in range(3)]
    pixels = (127.5 + 60 * np.stack(planes, -1)).astype(np.uint8)
    stored = BytesIO()
    Image.fromarray(pixels).save(stored, "JPEG", quality=95)
    return stored


@one_test
@pytest.mark.parametrize(
    ("size", "wanted", "factor"),
    [
        ((1000, 800), (200, 250), 2),
        ((1000, 800), (201, 250), 1),
        ((1001, 801), (200, 250), 2),
        ((1001, 803), (100, 125), 4),
        ((1001, 803), (50, 62), 8),
    ],
)
def test_a_jpeg_is_decoded_smaller_whatever_its_size(size, wanted, factor):
    image, x, y = drafted(Image.open(smooth(*size)), wanted)
    assert image.size == tuple(-(-side // factor) for side in size)
    assert (x, y) == (image.width / size[0], image.height / size[1])
    assert image.height >= 2 * wanted[0] or factor == 1
    image.close()


@one_test
@pytest.mark.parametrize("text", ["resize 96 96", "short_side 96"])
def test_what_is_decoded_smaller_is_what_it_would_have_been(text):
    stored = smooth(1001, 803)
    whole = Image.open(stored).convert("RGB")  # which has no format any more, and is not drafted
    rng = np.random.default_rng(0)
    expected = as_array(parsed(text)(whole, rng)).astype(int)
    found = as_array(parsed(text)(Image.open(stored), rng)).astype(int)
    assert found.shape == expected.shape
    # Two roundings to 8 bits, and the part of a pixel by which a smaller image ends beyond.
    assert np.abs(found - expected).max() <= 3
