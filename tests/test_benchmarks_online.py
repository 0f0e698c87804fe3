"""Learning online: what several draws of a prompt become to learn from, and budgets that are the same for all arms."""

from dataclasses import replace

import numpy as np
import pytest
from benchmarks import _online_arms as arms
from benchmarks import _online_bench as bench
from benchmarks import _online_cells as axes
from benchmarks import _online_draws as online_draws
from benchmarks import _online_summary as summary
from benchmarks import online
from benchmarks._ablation_statistics import Bootstrap
from benchmarks._online_plot import plot

import artaug as aa
from artaug import playground

PROMPT = "a red cone on the left at night"
WORDS = ("", ", vivid", ", vivid, glowing")
DULL, GOOD, BETTER = (playground.render(PROMPT + words, seed=0) for words in WORDS)
WRONG = playground.render("a blue ball at night, vivid, glowing, sharp", seed=0)
CHOOSERS = [online_draws.ByScorer(), online_draws.ByJudge(online_draws.NoticeableDifference())]


def draws_of(*images, prompt=PROMPT):
    return online_draws.Draws(prompts=[prompt], images=[images])


@pytest.mark.parametrize("chooser", CHOOSERS)
def test_the_best_of_k_is_the_best_of_those_that_show_what_was_requested(chooser):
    (pair,) = online_draws.extremes(draws_of(GOOD, WRONG, BETTER, DULL), chooser)

    assert (pair.before, pair.after, pair.prompt) == (DULL, BETTER, PROMPT)
    assert online_draws.extremes(draws_of(WRONG, WRONG), chooser) == []


@pytest.mark.parametrize("chooser", CHOOSERS)
def test_draws_that_are_all_alike_have_no_best_one_and_a_reward_of_a_half(chooser):
    alike = draws_of(DULL, DULL, DULL)

    assert online_draws.extremes(alike, chooser) == []
    assert [pair.rewards for pair in online_draws.packed(alike, chooser)] == [(0.5, 0.5)] * 2


def test_all_draws_are_packed_two_by_two_with_their_rewards_and_the_wrong_ones_with_none():
    draws = draws_of(DULL, WRONG, BETTER, GOOD)
    rewards = online_draws.ByScorer().rewards(draws)[0]

    first, second = online_draws.packed(draws, online_draws.ByScorer())

    assert (first.before, first.after, second.before, second.after) == (DULL, WRONG, BETTER, GOOD)
    assert first.rewards == (rewards[0], 0)
    assert second.rewards == (rewards[2], rewards[3])
    assert rewards[0] < 0.5 < rewards[2]


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_every_draw_is_in_a_pair(count):
    images = [playground.render(PROMPT, seed=seed) for seed in range(count)]

    pairs = online_draws.packed(draws_of(*images), online_draws.ByScorer())

    assert len(pairs) == -(-count // 2)
    assert all(any(image in (pair.before, pair.after) for pair in pairs) for image in images)


def test_a_judge_rewards_a_picture_by_how_often_it_is_preferred():
    rewards = CHOOSERS[1].rewards(draws_of(BETTER, DULL, DULL))

    assert rewards.tolist() == [[1, 0.25, 0.25]]


def test_a_prompt_is_drawn_with_more_words_the_wider_the_spread_and_learned_without_them():
    counts = [
        [online_draws.drawn_as(PROMPT, spread=spread, key=f"{key}").count(",") for key in range(400)]
        for spread in (0, 0.25, 1)
    ]
    pair = aa.ImagePair(prompt=PROMPT + ", vivid, sharp", before=DULL, after=GOOD)

    assert (set(counts[0]), set(counts[2])) == ({0}, {4})
    assert np.mean(counts[1]) == pytest.approx(1, abs=0.15)
    assert online_draws.as_learned(pair) == aa.ImagePair(
        prompt=PROMPT, before=DULL, after=GOOD, plan=aa.Plan(PROMPT + ", vivid, sharp")
    )


def all_cells(settings, seed=0):
    return list(dict.fromkeys(axes.cells(settings, seed, axes.Selected())))


def test_every_cell_has_a_file_of_its_own_and_draws_as_many_pictures_as_the_budget_says():
    settings = axes.Settings()
    cells = all_cells(settings)

    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.arm for cell in cells} == {axes.BASE, *arms.ARMS}
    assert all(settings.pictures % cell.draws == 0 for cell in cells)
    assert {cell.draws for cell in cells if cell.arm in arms.ON_THE_CURVE} == set(settings.draws)


def test_all_arms_spend_the_same_passes_on_learning():
    settings = axes.Settings()

    for arm in arms.ARMS.values():
        steps = arm.steps(settings.passes, batch_size=settings.batch_size)
        spent = steps * settings.batch_size * arms.passes_a_step(arm.learning)
        assert spent == pytest.approx(settings.passes, rel=0.02)


QUICK = replace(axes.QUICK, pictures=8, strengths=(1.0,))
BEST = "best and worst, PairedPreference"
CELLS = [
    axes.Cell(arm=axes.BASE, seed=0, spread=0.5, draws=2),
    axes.Cell(arm=arms.LOOP, seed=0, spread=0.5),
    axes.Cell(arm=BEST, seed=0, spread=0.5, draws=4),
    axes.Cell(arm=BEST, seed=0, spread=0.5, draws=4, rounds=2),
    axes.Cell(arm=arms.NO_CHOICE, seed=0, spread=0.5),
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Rows of some cells, and the bench they were measured on."""
    folder = tmp_path_factory.mktemp("online")
    measuring = bench.OnlineBench(QUICK, seed=0, loras=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks._ablation_pairs.CHUNK", 8)
        return [measuring.row(cell) for cell in CELLS], measuring


def test_arms_draw_the_pictures_of_the_budget_in_every_round_and_no_more(measured):
    (base, loop, best, two_rounds, no_choice), _ = measured

    assert [row["images"] for row in (best, two_rounds, no_choice)] == [8, 16, 8]
    assert 8 - 1 <= loop["images"] <= 8
    assert two_rounds["passes"] - two_rounds["learning_passes"] == 16 * QUICK.sampling_steps
    assert base["deviation"] > 0
    assert [online.measured_cell(row) for row in (base, loop, best)] == CELLS[:3]


def test_the_second_round_does_not_depend_on_what_was_measured_before(measured):
    (*_, two_rounds, _), measuring = measured

    alone = bench.OnlineBench(QUICK, seed=0, loras=measuring.folder / "alone").row(CELLS[3])

    assert {**alone, "seconds": 0} == {**two_rounds, "seconds": 0}


def test_the_results_have_every_arm_at_strength_1_beside_the_critic(measured):
    rows, _ = measured

    content = {
        "environment": {"settings": {"usual_draws": 4}},
        "bases": summary.bases(rows),
        "estimates": list(summary.estimates(rows, Bootstrap(20))),
    }

    at_1 = [row for row in content["estimates"] if row["at_drift"] is None]
    assert [(row["arm"], row["rounds"], len(row["beside_critic"])) for row in at_1] == [
        (arms.LOOP, 1, 1),
        (BEST, 1, 1),
        (BEST, 2, 0),
        (arms.NO_CHOICE, 1, 1),
    ]
    assert at_1[0]["beside_critic"] == [[0, 0, 0]]
    assert len(list(summary.flat_rows(rows))) == len(CELLS) - 1
    assert len(plot(content).axes) == 6


def test_a_row_of_an_arm_that_has_changed_is_measured_again(measured, monkeypatch):
    (_, loop, *_), _ = measured
    changed = arms.OnlineArm(arms.Advice(), replace(arms.PAIRED, learning_rate=0.5))

    monkeypatch.setattr(arms, "ARMS", {**arms.ARMS, arms.LOOP: changed})

    assert online.measured_cell(loop) is None
