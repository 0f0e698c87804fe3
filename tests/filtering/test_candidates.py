"""Several candidates a prompt: the best one stands for it, and every prompt still ends exactly once."""

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
class Lit(aa.Synthesizer):
    """Before is black; after is as bright as the seed says."""

    def synthesize(self, plan, *, seed):
        return Image.new("L", (2, 2), seed % 251 if plan.regions else 0)


@dataclass(frozen=True)
class BySeed(aa.Critic):
    """Answers by the picture of the seed: abstains, wants nothing or gives advice."""

    def critique(self, image, prompt):
        level = image.getpixel((0, 0))
        return (aa.Abstention(f"it is {level}"), aa.Critique(), ADVICE)[level % 3]


@dataclass(frozen=True)
class Grained(aa.Synthesizer):
    def synthesize(self, plan, *, seed):
        return Image.new("L", (2, 2), seed % 251)


def ends(prompts=PROMPTS, *, candidates=None, seed=0, batch_size=2, keep=None, draw=None, critic=None):
    return list(
        aa.improve(
            prompts,
            synthesizer=draw or Lit(),
            critic=critic or FixedCritic(ADVICE),
            planner=aa.GreedyPlanner(),
            keep=FixedFilter(keep=True) if keep is None else keep,
            seed=seed,
            candidates=candidates,
            batch_size=batch_size,
        )
    )


def asked(end):
    return end.prompt if isinstance(end, aa.Skipped) else end.pair.prompt


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
def test_every_prompt_ends_exactly_once_whatever_its_candidates_did(seed, count, batch_size, prompts):
    asking = [f"a scene {number}" for number in range(prompts)]
    best = aa.BestOf(count, by=Listed())
    keep = aa.Floor(Listed(), 12)

    found = ends(asking, candidates=best, seed=seed, batch_size=batch_size, keep=keep, draw=Grained(), critic=BySeed())

    assert [asked(end) for end in found] == asking
    funnel = aa.Funnel.of(found)
    assert funnel.steps[0].count == prompts
    assert all(isinstance(end, aa.Kept | aa.Dropped | aa.Skipped) for end in found)


@settings(max_examples=25)
@given(st.integers(0, 2**32))
def test_one_candidate_changes_nothing(seed):
    alone = ends(seed=seed, draw=Grained(), critic=BySeed())
    one = ends(seed=seed, draw=Grained(), critic=BySeed(), candidates=aa.BestOf(1, by=Listed()))

    for end, other in zip(alone, one, strict=True):
        if isinstance(end, aa.Skipped):
            assert end == other
        else:
            assert (end.pair.seed, end.verdict) == (other.pair.seed, other.verdict)


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_more_candidates_never_gain_less_and_the_best_is_the_best(seed, count):
    def gains(count):
        return [end.pair.after.getpixel((0, 0)) for end in ends(seed=seed, candidates=aa.BestOf(count, by=Listed()))]

    fewer, more = gains(count), gains(count + 1)
    assert all(one <= other for one, other in zip(fewer, more, strict=True))


def test_the_chunk_size_changes_nothing():
    best = aa.BestOf(3, by=Listed())
    seeds = [[end.pair.seed for end in ends(candidates=best, batch_size=size)] for size in (1, 2, 5, 50)]
    assert seeds == [seeds[0]] * 4


def test_before_and_after_of_the_chosen_pair_share_one_seed():
    for end in ends(candidates=aa.BestOf(3, by=Listed())):
        assert end.pair.after == Lit().synthesize(end.pair.plan, seed=end.pair.seed)


def test_the_verdict_says_what_it_was_chosen_from_and_the_filter_sees_the_best_alone():
    seen = []

    class Watching(aa.PairFilter):
        def judge(self, pair):
            seen.append(pair)
            return aa.Verdict(keep=False, reason="no", scores={})

    found = ends(candidates=aa.BestOf(3, by=Listed()), keep=Watching())

    assert len(seen) == len(PROMPTS)
    assert {end.verdict.reason for end in found} == {"no (best of 3 by Listed)"}


def test_a_prompt_of_which_no_candidate_became_a_pair_is_skipped_with_the_reason_of_the_one_that_came_furthest():
    class Sulky(aa.Critic):
        def critique(self, image, prompt):
            return aa.Critique() if image.getpixel((0, 0)) % 2 else aa.Abstention("an even picture")

    found = ends([f"{at}" for at in range(30)], candidates=aa.BestOf(3, by=Listed()), draw=Grained(), critic=Sulky())

    assert all(isinstance(end, aa.Skipped) for end in found)
    mixed = [end for end in found if end.reason.startswith("none of 3 candidates became a pair")]
    assert {(end.stage, end.reason.partition("furthest, ")[2]) for end in mixed} == {
        ("plan", "the critic suggested nothing")
    }
    assert {end.reason for end in found} - {end.reason for end in mixed} <= {
        "the critic suggested nothing",
        "the critic abstained: an even picture",
    }


def test_counts_that_do_not_fit_are_refused():
    with pytest.raises(aa.InvalidValueError, match="need at least 1 candidate"):
        aa.BestOf(0, by=Listed())
    with pytest.raises(aa.ContractError, match="received 1 outcomes for 2 prompts: need 2 each"):
        aa.BestOf(2, by=Listed()).choose([aa.Skipped("a", 0, "b")], prompts=2)


def test_it_names_the_scorer_it_rests_on():
    assert aa.BestOf(2, by=Listed()).scorers == {"Listed"}
