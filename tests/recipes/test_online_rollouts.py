"""Rollouts: rewards of several draws, prompts that say nothing, and rounds that give the same LoRA however they are run."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import artaug as aa
from artaug import playground
from artaug.diffusion import DiffusersSynthesizer
from artaug.recipes import draw_pairs, normalized_rewards, rollouts
from artaug.recipes.draws import PromptDraws, RecipeFolder
from artaug.recipes.online_rollouts import _score
from artaug.scorers import Chroma, FunctionScorer, Photometric
from support.recording_trainer import same_lora, tiny_trainer

PROMPTS = playground.prompts(3, seed=0)
HELD_OUT = playground.prompts(2, seed=1, held_out=True)
BASE = playground.synthesizer(steps=1)
LIGHT = FunctionScorer(function=lambda image, _: image.getpixel((0, 0))[0] / 10, name="light")


def run(trainer=None, **options):
    arguments = {
        "prompts": PROMPTS,
        "synthesizer": BASE,
        "scorer": Chroma(),
        "unseen": playground.Accuracy("color"),
        "held_out": HELD_OUT,
        "trainer": trainer or tiny_trainer(),
        "draws": 2,
        "rounds": 2,
        "progress": False,
    }
    return rollouts(**{**arguments, **options})


@pytest.fixture(scope="module")
def trainer():
    """Notes what the whole run has learned from."""
    return tiny_trainer()


@pytest.fixture(scope="module")
def whole(trainer):
    """A run that is not interrupted."""
    return run(trainer)


scores = st.integers(2, 5).flatmap(
    lambda draws: st.lists(st.lists(st.integers(0, 9), min_size=draws, max_size=draws), min_size=1, max_size=4)
)


@given(scores, st.sampled_from([0.0, 0.2]))
def test_every_prompt_is_accounted_for_and_only_one_whose_draws_differ_is_learned_from(scores, least_spread):
    draws = [
        PromptDraws(
            prompt=f"prompt {number}",
            seeds=tuple(range(len(mine))),
            images=tuple(Image.new("RGB", (4, 4), (score, number, place)) for place, score in enumerate(mine)),
        )
        for number, mine in enumerate(scores)
    ]

    outcomes, pairs = _score(iter(draws), LIGHT, least_spread, RecipeFolder(None))

    rewards = normalized_rewards(np.array(scores) / 10)
    assert [outcome.prompt for outcome in outcomes] == [several.prompt for several in draws]
    for number, (outcome, mine) in enumerate(zip(outcomes, scores, strict=True)):
        learned = [pair for pair in pairs if pair.prompt == outcome.prompt]
        assert outcome.scores == tuple(score / 10 for score in mine)
        assert outcome.skipped == (max(mine) / 10 - min(mine) / 10 <= least_spread)
        assert len(learned) == (0 if outcome.skipped else -(-len(mine) // 2))
        for pair in learned:
            places = [image.getpixel((0, 0))[2] for image in (pair.before, pair.after)]
            assert pair.rewards == tuple(rewards[number, places])
        if learned:
            shown = {image.getpixel((0, 0))[2] for pair in learned for image in (pair.before, pair.after)}
            assert shown == set(range(len(mine)))


@given(scores)
def test_rewards_rank_the_draws_of_a_prompt_as_the_scores_do_around_a_half(scores):
    rewards = normalized_rewards(np.array(scores, dtype=float))

    assert ((rewards >= 0) & (rewards <= 1)).all()
    for mine, given_scores in zip(rewards, scores, strict=True):
        assert (np.diff(mine[np.argsort(given_scores, kind="stable")]) >= 0).all()
        above = np.array(given_scores) > np.mean(given_scores) + 1e-9
        assert (mine[above] > 0.5).all()
        assert (mine[~above] <= 0.5).all()


@given(arrays(np.int8, (3, 4)))
def test_rewards_are_normalized_as_the_paper_says(numbers):
    scores = numbers.astype(float)
    centred = [[number - Fraction(int(sum(map(int, row))), 4) for number in map(int, row)] for row in numbers]
    size = float(sum(number**2 for row in centred for number in row) / 12) ** 0.5
    expected = [[0.5 + 0.5 * min(1, max(-1, float(x) / size)) if size else 0.5 for x in row] for row in centred]

    rewards = normalized_rewards(scores)

    np.testing.assert_allclose(rewards, expected, atol=1e-9)


@given(st.sampled_from([0.001, 3.0, 1e4]), st.floats(-100, 100))
def test_rewards_do_not_know_the_unit_of_a_score_nor_how_good_a_prompt_is(unit, offset):
    scores = np.random.default_rng(0).normal(size=(3, 4))
    moved = scores * unit + np.array([[0.0], [offset], [0.0]]) * unit

    np.testing.assert_allclose(normalized_rewards(moved), normalized_rewards(scores), atol=1e-6)


@pytest.mark.parametrize("scores", [[0.1, 0.2], [[0.1, np.nan]], [[0.1, np.inf]]])
def test_scores_without_prompts_or_that_are_not_finite_are_no_rewards(scores):
    with pytest.raises(aa.InvalidValueError, match="expected finite numbers of shape"):
        normalized_rewards(np.array(scores))


@pytest.mark.parametrize(("count", "rewards"), [(1, [0.5]), (3, [0.5])])
def test_draws_that_make_no_pair_are_refused(count, rewards):
    with pytest.raises(aa.InvalidValueError, match=f"there are {count}"):
        draw_pairs("a hill", [Image.new("RGB", (4, 4))] * count, rewards)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_all_draws_are_in_pairs_with_their_rewards(count):
    images = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in range(count)]

    pairs = draw_pairs("a hill", images, [number / 10 for number in range(count)])

    assert len(pairs) == -(-count // 2)
    for pair in pairs:
        assert pair.rewards == tuple(image.getpixel((0, 0))[0] / 10 for image in (pair.before, pair.after))
    assert {image.getpixel((0, 0))[0] for pair in pairs for image in (pair.before, pair.after)} == set(range(count))


def test_a_round_learns_from_all_draws_of_the_model_that_the_rounds_before_have_made(whole, trainer):
    for model, finished, learned in zip(
        (BASE, BASE.with_lora(whole.rounds[0].lora)), whole.rounds, trainer.given, strict=True
    ):
        seeds = [seed for outcome in finished.rollouts for seed in outcome.seeds]
        assert len(set(seeds)) == 6
        pictures = [image for pair in learned for image in (pair.before, pair.after)]
        drawn = model.synthesize_batch([aa.Plan(PROMPTS[0])] * 2, seeds=seeds[:2])
        assert pictures[:2] == drawn
        assert finished.training.pairs == len(learned) == 3
    assert whole.lora is whole.rounds[-1].lora
    assert {layer.rank for layer in whole.lora.layers.values()} == {4}


def test_the_result_shows_a_scorer_that_was_not_trained_on_for_every_round(whole):
    rows = {(row.candidate, row.scorer): row for row in whole.comparison.rows}

    assert set(rows) == {(f"round {number}", name) for number in (1, 2) for name in ("Chroma", "color")}
    assert whole.comparison.prompts == tuple(HELD_OUT)
    assert {name: rows["round 1", name].filtered_by for name in ("Chroma", "color")} == {
        "Chroma": True,
        "color": False,
    }


def test_the_same_arguments_give_the_same_lora_with_and_without_a_folder(whole, tmp_path):
    assert same_lora(whole.lora, run(folder=tmp_path).lora)
    assert not same_lora(whole.rounds[0].lora, run(seed=1, rounds=1).lora)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_lora_and_draws_nothing_twice(whole, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(tiny_trainer(fails_at=2), folder=tmp_path)
    drawn = []
    draw = DiffusersSynthesizer.synthesize_batch

    def noted(self, plans, *, seeds):
        drawn.extend(plan.prompt for plan in plans)
        return draw(self, plans, seeds=seeds)

    monkeypatch.setattr(DiffusersSynthesizer, "synthesize_batch", noted)

    resumed = run(folder=tmp_path)

    assert set(drawn) == set(HELD_OUT)
    assert same_lora(resumed.lora, whole.lora)
    assert [finished.rollouts for finished in resumed.rounds] == [finished.rollouts for finished in whole.rounds]


def test_a_first_round_whose_draws_all_score_the_same_is_an_error():
    with pytest.raises(aa.NothingToLearnError, match="each of the 3 prompts of round 1 score the same"):
        run(scorer=FunctionScorer(function=lambda *_: 0.5, name="indifferent"))


def test_a_later_round_whose_draws_all_score_the_same_is_the_end():
    seen = []

    def indifferent_later(image, _):
        seen.append(image)
        return float(len(seen) % 2) if len(seen) <= 6 else 0.5

    result = run(scorer=FunctionScorer(function=indifferent_later))

    assert len(result.rounds) == 1
    assert result.rounds[0].skipped == 0
    assert "of round 2 score the same" in result.stop_reason


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"prompts": []}, "no prompts"),
        ({"held_out": PROMPTS}, "held_out has 3 prompts that are learned from"),
        ({"draws": 1}, "draws=1"),
        ({"rounds": 0}, "rounds=0"),
        ({"least_spread": float("nan")}, "least_spread"),
        ({"unseen": Photometric(), "scorer": Photometric()}, "both depend on"),
        ({"objective": aa.SupervisedFineTuning()}, "objective"),
        ({"scorer": aa.Floor(Chroma(), at_least=0)}, "scorer"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_refused_before_the_first_picture(wrong, named, monkeypatch):
    monkeypatch.setattr(aa.diffusion.DiffusersSynthesizer, "synthesize_batch", None)
    with pytest.raises(aa.ArtAugError, match=named):
        run(**wrong)
