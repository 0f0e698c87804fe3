"""The shipped model: right, dull, and responsive. `python -m benchmarks.playground` measures the same on more prompts."""

from statistics import fmean

import pytest

import artaug as aa
from artaug import playground
from artaug.scorers import Chroma, Contrast, Exposure, Sharpness
from artaug.testing import check_synthesizer

EVERYTHING = ", vivid, softly lit, sharp, glowing"


@pytest.fixture(scope="module")
def model():
    return playground.synthesizer(guide=aa.OutputMix())


@pytest.fixture(scope="module")
def prompts():
    return playground.prompts(48, seed=11, held_out=True)


@pytest.fixture(scope="module")
def plain(model, prompts):
    return model.synthesize_batch([aa.Plan(prompt) for prompt in prompts], seeds=range(len(prompts)))


def mean(scorer, images, prompts):
    return fmean(scorer.score_batch(images, prompts))


def test_the_weights_take_at_most_sixteen_megabytes():
    assert sum(file.stat().st_size for file in playground.WEIGHTS.rglob("*") if file.is_file()) <= 16e6


def test_it_is_a_synthesizer_like_any_other(model):
    check_synthesizer(model)


@pytest.mark.parametrize(("of", "at_least"), [("color", 0.95), ("shape", 0.85), ("place", 0.95)])
def test_it_draws_combinations_that_it_was_never_trained_on(plain, prompts, of, at_least):
    assert mean(playground.Accuracy(of), plain, prompts) >= at_least


@pytest.mark.parametrize(
    ("adjective", "scorer", "at_least"),
    [
        ("vivid", Chroma(), 0.05),
        ("softly lit", Exposure(), 0.15),
        ("sharp", Sharpness(), 0.02),
        ("glowing", Contrast(), 0.03),
    ],
)
def test_an_adjective_improves_what_it_stands_for(model, plain, prompts, adjective, scorer, at_least):
    with_adjective = model.synthesize_batch(
        [aa.Plan(f"{prompt}, {adjective}") for prompt in prompts], seeds=range(len(prompts))
    )
    assert mean(scorer, with_adjective, prompts) - mean(scorer, plain, prompts) >= at_least


def test_all_adjectives_together_improve_every_score(model, plain, prompts):
    praised = model.synthesize_batch([aa.Plan(prompt + EVERYTHING) for prompt in prompts], seeds=range(len(prompts)))
    for scorer, at_least in ((Exposure(), 0.2), (Chroma(), 0.15), (Contrast(), 0.12), (Sharpness(), 0.02)):
        assert mean(scorer, praised, prompts) - mean(scorer, plain, prompts) >= at_least


def test_an_adjective_in_a_region_improves_that_region_and_hardly_the_rest(model, plain, prompts):
    left, right = aa.Box(0, 0, 0.5, 1), aa.Box(0.5, 0, 1, 1)
    plans = [aa.Plan(prompt, (aa.Region(left, prompt + EVERYTHING),)) for prompt in prompts[:16]]
    regional = model.synthesize_batch(plans, seeds=range(16))

    def gain(box):
        crops = [[image.crop(box.to_pixels(image.size)) for image in images] for images in (regional, plain[:16])]
        return mean(Chroma(), crops[0], prompts[:16]) - mean(Chroma(), crops[1], prompts[:16])

    assert gain(left) > 0.02
    assert gain(left) > 2 * abs(gain(right))
