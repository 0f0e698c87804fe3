import math

import numpy as np
import pytest
from PIL import Image

import artaug as aa
from artaug.testing import (
    FixedCritic,
    FixedFilter,
    FixedScorer,
    SwatchSynthesizer,
    check_critic,
    check_filter,
    check_scorer,
    check_synthesizer,
)


def test_the_doubles_keep_the_promises_of_their_seams():
    check_critic(FixedCritic(aa.Critique()))
    check_critic(FixedCritic(aa.Abstention("it is only a double")))
    check_synthesizer(SwatchSynthesizer())
    check_scorer(FixedScorer(0.5))
    check_filter(FixedFilter(keep=True))
    check_filter(FixedFilter(keep=False))


class Sloppy(aa.Critic):
    def critique(self, image, prompt):
        return None


class Painter(aa.Critic):
    def critique(self, image, prompt):
        image.paste(0 if image.mode == "L" else "red", (0, 0, 1, 1))
        return aa.Critique()


class Shortener(aa.Critic):
    def critique(self, image, prompt):
        return aa.Critique()

    def critique_batch(self, images, prompts):
        return [aa.Critique()]


@pytest.mark.parametrize(
    ("critic", "message"),
    [
        (Sloppy(), "returned NoneType: expected artaug.Critique or artaug.Abstention"),
        (Painter(), "changed the picture"),
        (Shortener(), "gave 1 answers for 6 pictures"),
    ],
)
def test_check_critic_catches(critic, message):
    with pytest.raises(AssertionError, match=message):
        check_critic(critic)


class Forgetful(aa.Synthesizer):
    def __init__(self):
        self.drawn = 0

    def synthesize(self, plan, *, seed):
        self.drawn += 1
        return Image.new("RGB", (8, 8), (self.drawn, 0, 0))


class Deaf(aa.Synthesizer):
    def synthesize(self, plan, *, seed):
        return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8))


class Stubborn(aa.Synthesizer):
    def synthesize(self, plan, *, seed):
        return Image.new("RGB", (8, 8), (len(plan.regions), 0, 0))


@pytest.mark.parametrize(
    ("synthesizer", "message"),
    [
        (Forgetful(), "two pictures for the same plan and seed"),
        (Deaf(), "read no region"),
        (Stubborn(), "the same picture for two seeds"),
    ],
)
def test_check_synthesizer_catches(synthesizer, message):
    with pytest.raises(AssertionError, match=message):
        check_synthesizer(synthesizer)


class BatchBias(aa.Scorer):
    def score(self, image, prompt):
        return 0.5

    def score_batch(self, images, prompts):
        return [0.6 for _ in images]


@pytest.mark.parametrize(
    ("scorer", "message"),
    [(FixedScorer(math.nan), "expected finite numbers"), (BatchBias(), "in a batch")],
)
def test_check_scorer_catches(scorer, message):
    with pytest.raises(AssertionError, match=message):
        check_scorer(scorer)


class Mute(aa.PairFilter):
    def judge(self, pair):
        return aa.Verdict(keep=True, reason="", scores={})


class Bare(aa.PairFilter):
    def judge(self, pair):
        return True


@pytest.mark.parametrize(
    ("keep", "message"), [(Mute(), "gave no reason"), (Bare(), "returned bool: expected artaug.Verdict")]
)
def test_check_filter_catches(keep, message):
    with pytest.raises(AssertionError, match=message):
        check_filter(keep)
