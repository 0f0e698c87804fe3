"""What every part of artaug sees of an image of any mode."""

import base64
import io

import numpy as np
import pytest
from PIL import Image, ImageCms

import artaug as aa
from artaug._internal.images import as_rgb, data_url, rgb_parts


def test_transparent_pixels_are_white():
    assert as_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert as_rgb(Image.new("LA", (1, 1), (0, 255))).getpixel((0, 0)) == (0, 0, 0)


MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]


def picture_of(mode):
    """The same gradients of colors in a mode, without transparent pixels."""
    gradients = np.moveaxis(np.mgrid[0:256:8, 0:256:8], 0, -1)
    rgb = Image.fromarray(np.dstack([gradients, 255 - gradients[..., :1]]).astype(np.uint8))
    if mode == "LAB":
        return ImageCms.profileToProfile(
            rgb, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    via = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode)
    return rgb.convert(via).convert(mode) if via else rgb.convert(mode)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_shows_its_colors(mode):
    rgb = as_rgb(picture_of(mode))
    assert (rgb.mode, rgb.size, rgb.info) == ("RGB", (32, 32), {})
    expected = np.asarray(picture_of("RGB").convert("L" if mode in {"L", "LA", "La", "1"} else "RGB").convert("RGB"))
    error = abs(np.asarray(rgb).astype(int) - expected)
    if mode == "1":  # dithered: right on average
        assert abs(np.asarray(rgb).mean() - expected.mean()) < 2
    else:
        assert error.mean() < {"P": 30, "PA": 30}.get(mode, 3)


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_what_transparent_pixels_hide_is_not_seen(mode):
    hidden = Image.new("RGBA", (2, 1), (200, 30, 30, 0))
    hidden.putpixel((1, 0), (90, 90, 90, 255))
    base = {"La": "LA", "RGBa": "RGBA"}.get(mode)
    image = hidden.convert(base).convert(mode) if base else hidden.convert(mode)
    rgb = as_rgb(image)
    assert rgb.getpixel((0, 0)) == (255, 255, 255)
    assert max(abs(level - 90) for level in rgb.getpixel((1, 0))) <= 2


def test_a_transparent_color_that_a_file_names_is_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    for image, transparency in ((palette, 0), (palette, b"\0\xff"), (palette.convert("RGB"), (255, 0, 0))):
        image.info["transparency"] = transparency
        assert [as_rgb(image).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]
    sixteen = Image.fromarray(np.array([[258, 65535, 0]], dtype=np.uint16))
    sixteen.info["transparency"] = 258
    assert [as_rgb(sixteen).getpixel((x, 0))[0] for x in range(3)] == [255, 255, 0]


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_sixteen_bits_are_scaled_in_any_order_of_bytes(mode):
    values = np.array([[0, 0x80FF, 0xFFFF]], dtype="<u2" if mode == "I;16" else ">u2")
    image = Image.frombytes(mode, (3, 1), values.tobytes())
    assert [as_rgb(image).getpixel((x, 0))[0] for x in range(3)] == [0, 0x80, 255]


def test_an_orientation_that_a_file_names_goes_no_further_than_the_pixels():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    file = io.BytesIO()
    Image.new("RGB", (4, 2), "teal").save(file, "png", exif=exif)
    rgb = as_rgb(Image.open(file))
    assert rgb.size == (4, 2)
    assert not rgb.getexif()


def test_a_digest_is_of_what_is_seen():
    first = Image.new("P", (2, 2))
    first.putpalette([255, 0, 0])
    second = first.copy()
    second.putpalette([0, 0, 255])
    assert rgb_parts(first) != rgb_parts(second)
    assert rgb_parts(first) == rgb_parts(first.convert("RGB"))
    transparent = first.copy()
    transparent.info["transparency"] = 0
    assert rgb_parts(transparent) == rgb_parts(Image.new("RGB", (2, 2), "white"))


def test_sixteen_bits_are_scaled():
    assert as_rgb(Image.fromarray(np.array([[65535, 0]], dtype=np.uint16))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_white_level_are_refused(mode):
    with pytest.raises(aa.InvalidValueError, match=f"an image of mode '{mode}' does not say which number is white"):
        as_rgb(Image.new(mode, (4, 4)))


def test_an_image_without_pixels_is_refused():
    with pytest.raises(aa.InvalidValueError, match="0 x 4 pixels"):
        as_rgb(Image.new("RGB", (0, 4)))


def test_an_image_whose_file_was_closed_before_it_was_read_says_so(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        canvas = aa.Canvas(image, strength=0.5)
    with pytest.raises(aa.InvalidValueError, match="was closed before its pixels were read"):
        hash(canvas.identity)


def test_a_data_url_holds_the_bytes():
    head, data = data_url(b"\0\xff", "webp").split(",")
    assert head == "data:image/webp;base64"
    assert base64.b64decode(data) == b"\0\xff"
