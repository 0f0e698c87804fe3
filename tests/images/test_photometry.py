"""Laws of the four measures, and what they were checked against."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

import artaug as aa
from artaug.images.photometry import METRICS, chroma, contrast, exposure, luma, sharpness, srgb
from support.strategies import images, pixels


def crete(grey):
    """The blur effect as the paper writes it, one loop a step; borders mirrored, the outermost pixels left out."""
    blur = []
    for picture in (grey, grey.T):
        rows, columns = picture.shape
        reflected = [(index if index >= 0 else -index - 1) for index in range(-5, rows)]
        reflected += [rows - 1 - index for index in range(5)]
        mean = np.array([picture[reflected[row : row + 11]].mean(axis=0) for row in range(rows)])
        sharp, soft = [
            np.array(
                [
                    [
                        abs(np.array([1, 2, 1]) @ (it[row + 1, at - 1 : at + 2] - it[row - 1, at - 1 : at + 2])) / 8
                        for at in range(1, columns - 1)
                    ]
                    for row in range(1, rows - 1)
                ]
            )
            for it in (picture, mean)
        ]
        lost = np.maximum(0, sharp - soft).sum()
        blur.append((sharp.sum() - lost) / sharp.sum())
    return max(blur)


def noise(seed, *, size=32, spread=60):
    return Image.fromarray(
        np.clip(np.random.default_rng(seed).normal(128, spread, (size, size, 3)), 0, 255).astype(np.uint8)
    )


@given(images())
def test_every_picture_has_four_numbers_from_0_to_1(image):
    for metric in METRICS.values():
        assert 0 <= metric(srgb(image)) <= 1


@given(pixels())
def test_mirroring_and_turning_change_nothing(picture):
    picture = picture / 255
    for metric in METRICS.values():
        for other in (picture[::-1], picture[:, ::-1], picture.transpose(1, 0, 2)):
            assert metric(other) == pytest.approx(metric(picture), abs=1e-9)


@given(pixels())
def test_grey_pictures_have_no_chroma(picture):
    assert chroma(np.repeat(luma(picture / 255)[:, :, None], 3, axis=2)) == pytest.approx(0, abs=1e-9)


@given(pixels(), st.floats(0, 1))
def test_chroma_grows_in_proportion_to_the_distance_from_grey(picture, share):
    picture = picture / 255
    grey = luma(picture)[:, :, None]
    assume(chroma(picture) < 1)
    assert chroma(grey + share * (picture - grey)) == pytest.approx(share * chroma(picture), abs=1e-9)


@given(pixels(), st.floats(0, 1))
def test_contrast_grows_in_proportion_to_the_distance_from_the_mean(picture, share):
    picture = picture / 255
    assert contrast(0.5 + share * (picture - 0.5)) == pytest.approx(share * contrast(picture), abs=1e-9)


@given(pixels(), st.floats(0, 1))
def test_exposure_grows_towards_mid_grey(picture, share):
    picture = picture / 255
    assert exposure(0.5 + share * (picture - 0.5)) >= exposure(picture) - 1e-9


@given(st.integers(0, 1000), st.sampled_from([0.8, 1.2, 2, 4]))
def test_blurring_costs_sharpness(seed, radius):
    picture = noise(seed)
    assert sharpness(srgb(picture.filter(ImageFilter.GaussianBlur(radius)))) < sharpness(srgb(picture))


@given(st.integers(0, 1000))
def test_dimming_leaves_sharpness_alone(seed):
    picture = srgb(noise(seed))
    assert sharpness(picture * 0.3) == pytest.approx(sharpness(picture))


@pytest.mark.parametrize("seed", range(3))
def test_sharpness_is_one_minus_the_blur_effect(seed):
    picture = srgb(noise(seed, size=24).filter(ImageFilter.GaussianBlur(seed)))
    assert sharpness(picture) == pytest.approx(1 - crete(luma(picture)), abs=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 2), (3, 3), (40, 2)])
def test_tiny_and_flat_pictures_have_defined_numbers(size):
    flat = srgb(Image.new("RGB", size, (40, 80, 120)))
    assert contrast(flat) == pytest.approx(0, abs=1e-9)
    assert sharpness(flat) == 0
    assert all(np.isfinite(metric(flat)) for metric in METRICS.values())


def test_known_pictures_have_known_numbers():
    black, grey = np.zeros((4, 4, 3)), np.full((4, 4, 3), 0.5)
    halves = np.concatenate([black, black + 1])
    assert exposure(grey) == 1
    assert exposure(black) == exposure(black + 1) == pytest.approx(np.exp(-3.125))
    assert contrast(halves) == 1
    assert chroma(np.array([[[1.0, 0, 0], [0, 1, 1]]])) == 1
    pale = np.full((4, 4, 3), (0.5, 0.4, 0.4))
    assert chroma(pale) == pytest.approx(0.3 * np.hypot(0.1, 0.05) * 255 / 109)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "YCbCr", "1"])
def test_a_mode_is_only_a_way_to_write_pixels(mode):
    picture = Image.new("RGB", (4, 4), "white")
    assert srgb(picture.convert(mode)).tolist() == srgb(picture).tolist()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_white_are_refused(mode):
    with pytest.raises(aa.InvalidValueError, match=f"an image of mode '{mode}' does not say which number is white"):
        srgb(Image.new(mode, (4, 4)))


def test_an_image_without_pixels_is_refused():
    with pytest.raises(aa.InvalidValueError, match="an image of 0 x 4 pixels has nothing to measure"):
        srgb(Image.new("RGB", (0, 4)))
