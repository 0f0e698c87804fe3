"""How alike two pictures are: SSIM against its published equation, cosines against theirs."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from PIL import Image

import artaug as aa
from artaug.images.photometry import luma, srgb
from artaug.images.similarity import compare_pairs, diversity, metric_name
from support.strategies import images, pixels


def test_ssim_is_wangs_equation_with_his_window():
    signal = pytest.importorskip("scipy.signal")
    generator = np.random.default_rng(0)
    one, other = (Image.fromarray(generator.integers(0, 256, (40, 30, 3), dtype=np.uint8)) for _ in range(2))
    other = Image.blend(one, other, 0.4)

    x, y = luma(srgb(one)), luma(srgb(other))
    line = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    window = np.outer(line, line) / line.sum() ** 2
    mx, my, xx, yy, xy = (signal.convolve2d(each, window, mode="valid") for each in (x, y, x * x, y * y, x * y))
    top = (2 * mx * my + 1e-4) * (2 * (xy - mx * my) + 9e-4)
    bottom = (mx**2 + my**2 + 1e-4) * (xx - mx**2 + yy - my**2 + 9e-4)
    assert aa.StructuralSimilarity().compare(one, other) == pytest.approx((top / bottom).mean(), abs=1e-10)


@given(images())
def test_a_picture_is_like_itself(image):
    assert aa.StructuralSimilarity().compare(image, image.copy()) == 1
    assert diversity(aa.StructuralSimilarity(), [image] * 3) == 0


@given(pixels(least=2), pixels(least=2))
def test_likeness_is_symmetric_and_at_most_one(one, other):
    first = Image.fromarray(one)
    second = Image.fromarray(other).resize(first.size)
    there, back = (aa.StructuralSimilarity().compare(*both) for both in ((first, second), (second, first)))
    assert there == pytest.approx(back, abs=1e-12)
    assert -1 - 1e-9 <= there <= 1 + 1e-9


def test_grain_counts_less_on_a_smaller_picture():
    grain = np.random.default_rng(0).integers(-60, 60, (64, 64, 1))
    flat = np.full((64, 64, 3), 120)
    one, other = (Image.fromarray((flat + sign * grain).clip(0, 255).astype(np.uint8)) for sign in (1, -1))
    assert aa.StructuralSimilarity(side_px=8).compare(one, other) > aa.StructuralSimilarity().compare(one, other)


@dataclass(frozen=True)
class Colour:
    """Embeds a picture as the colour of its corner."""

    name: str = "colour"

    def embed_images(self, images):
        return [image.convert("RGB").getpixel((0, 0)) for image in images]


def test_an_embedded_likeness_is_the_cosine():
    one, other = Image.new("RGB", (2, 2), (30, 40, 0)), Image.new("RGB", (2, 2), (0, 40, 30))
    measure = aa.EmbeddingSimilarity(Colour())
    assert measure.compare(one, other) == pytest.approx(1600 / 2500)
    assert measure.compare(one, Image.new("RGB", (2, 2), (60, 80, 0))) == pytest.approx(1)
    assert (measure.name, measure.compare_batch([], [])) == ("colour", [])


def test_a_vector_without_direction_and_too_few_vectors_are_named():
    black = Image.new("RGB", (2, 2))
    with pytest.raises(aa.NonFiniteError, match=r"colour\.embed_images returned a vector without direction"):
        aa.EmbeddingSimilarity(Colour()).compare(black, black)

    class Short(Colour):
        def embed_images(self, images):
            return [[1.0]]

    with pytest.raises(aa.ContractError, match=r"returned shape \(1, 1\) for 2 pictures"):
        aa.EmbeddingSimilarity(Short()).compare(black, black)


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (math.nan, aa.NonFiniteError, "returned nan for pair 0"),
        ("much", aa.ContractError, "returned str 'much' for pair 0"),
    ],
)
def test_answers_that_are_no_numbers_are_refused(answer, error, text):
    picture = Image.new("L", (2, 2))
    with pytest.raises(error, match=text):
        compare_pairs(lambda *_: answer, [picture], [picture])


def test_too_few_answers_are_counted_and_one_picture_has_no_diversity():
    class Short(aa.ImageSimilarity):
        def compare(self, one, other):
            return 1.0

        def compare_batch(self, ones, others):
            return []

    picture = Image.new("L", (2, 2))
    with pytest.raises(aa.ContractError, match=r"Short.compare_batch returned 0 answers for 1 pair"):
        compare_pairs(Short(), [picture], [picture])
    with pytest.raises(aa.InvalidValueError, match="need at least 2 pictures of one prompt"):
        diversity(Short(), [picture])
    with pytest.raises(aa.InvalidValueError, match="need side_px of at least 1"):
        aa.StructuralSimilarity(side_px=0)


def test_a_measure_goes_by_its_name():
    assert metric_name(aa.StructuralSimilarity()) == "StructuralSimilarity"
    assert metric_name(math.dist) == "dist"
