"""Image similarity: SSIM against its published equation, cosine similarity, and the check of metrics of other people."""

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
    first, noise = (Image.fromarray(generator.integers(0, 256, (40, 30, 3), dtype=np.uint8)) for _ in range(2))
    second = Image.blend(first, noise, 0.4)

    x, y = luma(srgb(first)), luma(srgb(second))
    line = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    window = np.outer(line, line) / line.sum() ** 2
    mx, my, xx, yy, xy = (
        signal.convolve2d(signal_2d, window, mode="valid") for signal_2d in (x, y, x * x, y * y, x * y)
    )
    top = (2 * mx * my + 1e-4) * (2 * (xy - mx * my) + 9e-4)
    bottom = (mx**2 + my**2 + 1e-4) * (xx - mx**2 + yy - my**2 + 9e-4)
    assert aa.StructuralSimilarity().compare(first, second) == pytest.approx((top / bottom).mean(), abs=1e-10)


@given(images())
def test_an_image_equals_itself(image):
    assert aa.StructuralSimilarity().compare(image, image.copy()) == 1
    assert diversity(aa.StructuralSimilarity(), [image] * 3) == 0


@given(pixels(least=2), pixels(least=2))
def test_similarity_is_symmetric_and_at_most_one(first_pixels, second_pixels):
    first = Image.fromarray(first_pixels)
    second = Image.fromarray(second_pixels).resize(first.size)
    similarity = aa.StructuralSimilarity().compare(first, second)
    assert similarity == pytest.approx(aa.StructuralSimilarity().compare(second, first), abs=1e-12)
    assert -1 - 1e-9 <= similarity <= 1 + 1e-9


def test_grain_counts_less_on_a_downscaled_image():
    grain = np.random.default_rng(0).integers(-60, 60, (64, 64, 1))
    flat = np.full((64, 64, 3), 120)
    first, second = (Image.fromarray((flat + sign * grain).clip(0, 255).astype(np.uint8)) for sign in (1, -1))
    assert aa.StructuralSimilarity(side_px=8).compare(first, second) > aa.StructuralSimilarity().compare(first, second)


@dataclass(frozen=True)
class CornerColor:
    """Embeds an image as the color of its corner."""

    name: str = "color"

    def embed_images(self, images):
        return [image.convert("RGB").getpixel((0, 0)) for image in images]


def test_the_similarity_of_embeddings_is_their_cosine():
    first, second = Image.new("RGB", (2, 2), (30, 40, 0)), Image.new("RGB", (2, 2), (0, 40, 30))
    metric = aa.EmbeddingSimilarity(CornerColor())
    assert metric.compare(first, second) == pytest.approx(1600 / 2500)
    assert metric.compare(first, Image.new("RGB", (2, 2), (60, 80, 0))) == pytest.approx(1)
    assert (metric.name, metric.compare_batch([], [])) == ("color", [])


def test_zero_vectors_and_too_few_vectors_are_errors():
    black = Image.new("RGB", (2, 2))
    with pytest.raises(aa.NonFiniteError, match=r"color\.embed_images returned a vector without direction"):
        aa.EmbeddingSimilarity(CornerColor()).compare(black, black)

    class Short(CornerColor):
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
def test_results_that_are_not_numbers_are_refused(answer, error, text):
    image = Image.new("L", (2, 2))
    with pytest.raises(error, match=text):
        compare_pairs(lambda *_: answer, [image], [image])


def test_too_few_results_are_counted_and_one_image_has_no_diversity():
    class Short(aa.ImageSimilarity):
        def compare(self, first, second):
            return 1.0

        def compare_batch(self, first, second):
            return []

    image = Image.new("L", (2, 2))
    with pytest.raises(aa.ContractError, match=r"Short.compare_batch returned 0 answers for 1 pair"):
        compare_pairs(Short(), [image], [image])
    with pytest.raises(aa.InvalidValueError, match="need at least 2 pictures of one prompt"):
        diversity(Short(), [image])
    with pytest.raises(aa.InvalidValueError, match="need side_px of at least 1"):
        aa.StructuralSimilarity(side_px=0)


def test_the_name_of_a_metric_is_that_of_its_class_or_function():
    assert metric_name(aa.StructuralSimilarity()) == "StructuralSimilarity"
    assert metric_name(math.dist) == "dist"
