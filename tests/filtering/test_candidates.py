"""Several candidates for each prompt: the best is kept, and every prompt still ends exactly once."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug.testing import FixedCritic, FixedFilter
from support.strategies import Listed

ADVICE = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a lamp"),))
PROMPTS = [f"a scene {number}" for number in range(5)]


@dataclass(frozen=True)
class Brightening(aa.Synthesizer):
    """Before is black; after is as bright as the seed says."""

    def synthesize(self, plan, *, seed):
        return Image.new("L", (2, 2), seed % 251 if plan.regions else 0).convert("RGB")


@dataclass(frozen=True)
class AnswersBySeed(aa.Critic):
    """Answers by the picture of the seed: abstains, suggests nothing or suggests a change."""

    def critique(self, image, prompt):
        level = image.convert("L").getpixel((0, 0))
        return (aa.Abstention(f"it is {level}"), aa.Critique(), ADVICE)[level % 3]


@dataclass(frozen=True)
class Grained(aa.Synthesizer):
    def synthesize(self, plan, *, seed):
        return Image.new("L", (2, 2), seed % 251)


def run(prompts=PROMPTS, *, candidates=None, seed=0, batch_size=2, keep=None, synthesizer=None, critic=None):
    return list(
        aa.improve(
            prompts,
            synthesizer=synthesizer or Brightening(),
            critic=critic or FixedCritic(ADVICE),
            planner=aa.GreedyPlanner(),
            keep=FixedFilter(keep=True) if keep is None else keep,
            seed=seed,
            candidates=candidates,
            batch_size=batch_size,
            check="arguments",  # the scorer here reads grey pictures only
        )
    )


def prompt_of(attempt):
    return attempt.prompt if isinstance(attempt, aa.Skipped) else attempt.pair.prompt


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
def test_every_prompt_ends_exactly_once_whatever_its_candidates_did(seed, count, batch_size, prompts):
    expected = [f"a scene {number}" for number in range(prompts)]
    best = aa.BestOf(count, by=Listed())
    keep = aa.Floor(Listed(), 12)

    attempts = run(
        expected,
        candidates=best,
        seed=seed,
        batch_size=batch_size,
        keep=keep,
        synthesizer=Grained(),
        critic=AnswersBySeed(),
    )

    assert [prompt_of(attempt) for attempt in attempts] == expected
    funnel = aa.Funnel.of(attempts)
    assert funnel.steps[0].count == prompts
    assert all(isinstance(attempt, aa.Kept | aa.Dropped | aa.Skipped) for attempt in attempts)


@settings(max_examples=25)
@given(st.integers(0, 2**32))
def test_one_candidate_changes_nothing(seed):
    plain = run(seed=seed, synthesizer=Grained(), critic=AnswersBySeed())
    with_one = run(seed=seed, synthesizer=Grained(), critic=AnswersBySeed(), candidates=aa.BestOf(1, by=Listed()))

    for attempt, other in zip(plain, with_one, strict=True):
        if isinstance(attempt, aa.Skipped):
            assert attempt == other
        else:
            assert (attempt.pair.seed, attempt.verdict) == (other.pair.seed, other.verdict)


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_more_candidates_never_gain_less_and_the_best_is_the_best(seed, count):
    def gains(count):
        return [
            attempt.pair.after.convert("L").getpixel((0, 0))
            for attempt in run(seed=seed, candidates=aa.BestOf(count, by=Listed()))
        ]

    fewer, more = gains(count), gains(count + 1)
    assert all(gain <= best for gain, best in zip(fewer, more, strict=True))


def test_the_chunk_size_changes_nothing():
    best = aa.BestOf(3, by=Listed())
    seeds = [[attempt.pair.seed for attempt in run(candidates=best, batch_size=size)] for size in (1, 2, 5, 50)]
    assert seeds == [seeds[0]] * 4


def test_before_and_after_of_the_chosen_pair_share_one_seed():
    for attempt in run(candidates=aa.BestOf(3, by=Listed())):
        assert attempt.pair.after == Brightening().synthesize(attempt.pair.plan, seed=attempt.pair.seed)


def test_the_verdict_names_the_choice_and_the_filter_sees_only_the_best():
    judged = []

    class Recording(aa.PairFilter):
        def judge(self, pair):
            judged.append(pair)
            return aa.Verdict(keep=False, reason="no", scores={})

    attempts = run(candidates=aa.BestOf(3, by=Listed()), keep=Recording())

    assert len(judged) == len(PROMPTS)
    assert {attempt.verdict.reason for attempt in attempts} == {"no (best of 3 by Listed)"}


def test_a_prompt_without_a_pair_is_skipped_with_the_reason_of_the_candidate_that_came_furthest():
    class NeedsOdd(aa.Critic):
        def critique(self, image, prompt):
            return aa.Critique() if image.convert("L").getpixel((0, 0)) % 2 else aa.Abstention("an even picture")

    attempts = run(
        [f"{number}" for number in range(30)],
        candidates=aa.BestOf(3, by=Listed()),
        synthesizer=Grained(),
        critic=NeedsOdd(),
    )

    assert all(isinstance(attempt, aa.Skipped) for attempt in attempts)
    mixed = [attempt for attempt in attempts if attempt.reason.startswith("none of 3 candidates became a pair")]
    assert {(attempt.stage, attempt.reason.partition("furthest, ")[2]) for attempt in mixed} == {
        ("plan", "the critic suggested nothing")
    }
    assert {attempt.reason for attempt in attempts} - {attempt.reason for attempt in mixed} <= {
        "the critic suggested nothing",
        "the critic abstained: an even picture",
    }


def test_wrong_counts_are_refused():
    with pytest.raises(aa.InvalidValueError, match=r"BestOf\(count=0\): expected a whole number of at least 1"):
        aa.BestOf(0, by=Listed())
    with pytest.raises(aa.ContractError, match="received 1 outcomes for 2 prompts: need 2 each"):
        aa.BestOf(2, by=Listed()).choose([aa.Skipped("a", 0, "b")], prompts=2)


def test_it_names_the_scorer_it_chooses_by():
    assert aa.BestOf(2, by=Listed()).scorers == {"Listed"}
