"""Photometric scorers are the measures of `artaug.images.photometry`."""

import numpy as np
import pytest
from hypothesis import given
from PIL import Image

import artaug as aa
from artaug.images.photometry import METRICS, srgb
from artaug.scorers import Chroma, Contrast, Exposure, MeanOf, Photometric, Sharpness
from artaug.testing import check_scorer
from support.strategies import Listed, images

FOUR = (Exposure(), Chroma(), Contrast(), Sharpness())


@given(images())
def test_a_scorer_gives_its_measure(image):
    for scorer in FOUR:
        assert scorer.score(image, "a pear") == METRICS[scorer.name.lower()](srgb(image))


@given(images())
def test_photometric_is_the_mean_of_the_four(image):
    assert Photometric().score(image, "a pear") == pytest.approx(MeanOf(FOUR).score(image, "a pear"))
    assert 0 <= Photometric().score(image, "a pear") <= 1


def test_a_mean_of_none_is_refused():
    with pytest.raises(aa.InvalidValueError, match="has no scorers"):
        MeanOf(())


def test_a_mean_is_named_after_its_scorers():
    assert MeanOf(FOUR[:2]).name == "mean of Exposure and Chroma"
    assert repr(MeanOf(FOUR[:1])) == "MeanOf(scorers=(Exposure(),))"


def test_a_mean_calls_each_scorer_once_a_batch():
    grey = [Image.new("L", (2, 2), level) for level in (10, 20)]
    assert MeanOf((Listed("A"), Listed("B"))).score_batch(grey, ["", ""]) == [1.0, 2.0]


def test_scorers_of_one_kind_are_equal():
    assert Exposure() == Exposure() != Chroma()
    assert len({*FOUR, *FOUR}) == 4
    assert np.unique([scorer.name for scorer in FOUR]).size == 4


@pytest.mark.parametrize("scorer", [*FOUR, Photometric(), MeanOf(FOUR)], ids=lambda scorer: scorer.name)
def test_every_scorer_passes_the_scorer_checks(scorer):
    check_scorer(scorer)
