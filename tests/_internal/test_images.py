"""What every part of artaug sees of an image of any mode."""

import base64

import numpy as np
import pytest
from PIL import Image

import artaug as aa
from artaug._internal.images import as_rgb, data_url


def test_transparent_pixels_are_white():
    assert as_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert as_rgb(Image.new("LA", (1, 1), (0, 255))).getpixel((0, 0)) == (0, 0, 0)


def test_sixteen_bits_are_scaled():
    assert as_rgb(Image.fromarray(np.array([[65535, 0]], dtype=np.uint16))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_white_level_are_refused(mode):
    with pytest.raises(aa.InvalidValueError, match=f"an image of mode '{mode}' does not say which number is white"):
        as_rgb(Image.new(mode, (4, 4)))


def test_an_image_without_pixels_is_refused():
    with pytest.raises(aa.InvalidValueError, match="0 x 4 pixels"):
        as_rgb(Image.new("RGB", (0, 4)))


def test_a_data_url_holds_the_bytes():
    head, data = data_url(b"\0\xff", "webp").split(",")
    assert head == "data:image/webp;base64"
    assert base64.b64decode(data) == b"\0\xff"
