"""Trajectories: pairs of their turns, attempts, strips, and what notebooks show."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug.testing import FixedFilter, FixedScorer, SwatchSynthesizer

SWATCHES = SwatchSynthesizer(width=8, height=8)
LEFT = aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a <b>red</b> cone")


def turn(text, **fields):
    plan = aa.Plan(text)
    return aa.Turn(plan=plan, image=SWATCHES.synthesize(plan, seed=0), **fields)


def trajectory(*turns, **fields):
    return aa.Trajectory(prompt="a cone", turns=turns, seed=7, **fields)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_pairs_are_of_the_turns_that_the_contrast_names(scores):
    turns = [turn(f"cone {number}", score=float(score)) for number, score in enumerate(scores)]
    made = trajectory(*turns)
    best = scores.index(max(scores))
    expected = {
        "first-last": [(0, len(turns) - 1)] if len(turns) > 1 else [],
        "first-best": [(0, best)] if best else [],
        "each-next": [(number, number + 1) for number in range(len(turns) - 1)],
    }

    assert made.best is turns[best]
    assert made.image == turns[best].image
    for contrast, numbers in expected.items():
        pairs = made.pairs(contrast)
        assert [(pair.before, pair.after) for pair in pairs] == [(turns[i].image, turns[j].image) for i, j in numbers]
        assert [pair.plan for pair in pairs] == [turns[j].plan for _, j in numbers]
        assert {(pair.prompt, pair.seed) for pair in pairs} <= {("a cone", 7)}


def test_without_a_score_for_every_turn_the_best_is_the_last():
    assert trajectory(turn("one", score=1.0), turn("two")).best.plan.prompt == "two"


def test_attempts_account_for_every_trajectory():
    several = trajectory(turn("one", score=1.0), turn("two", score=0.0))
    alone = trajectory(turn("one", critique=aa.Critique()), stop_reason="the plan of turn 2 changes nothing")

    (kept,) = several.attempts(FixedFilter(True))
    (dropped,) = several.attempts(aa.Gain(FixedScorer(), at_least=1.0), "each-next")
    (worse,) = several.attempts(FixedFilter(True), "first-best")
    (skipped,) = alone.attempts(FixedFilter(True))

    assert (type(kept), kept.pair) == (aa.Kept, several.pairs()[0])
    assert isinstance(dropped, aa.Dropped)
    assert worse == aa.Skipped("a cone", 7, "no turn is better than the first one", "critique")
    assert skipped == aa.Skipped("a cone", 7, "the plan of turn 2 changes nothing", "plan")


def test_a_trajectory_with_neither_a_pair_nor_a_seed_makes_no_attempt():
    with pytest.raises(aa.InvalidValueError, match="give it a seed"):
        aa.Trajectory(prompt="a cone", turns=[turn("one")]).attempts(FixedFilter(True))


def test_the_pictures_of_a_trajectory_may_be_files_that_are_read_when_they_are_looked_at(tmp_path):
    plain = turn("one")
    stored = aa.Turn(plan=plain.plan, image=aa.ImageFolder(tmp_path).add(plain.image))
    made = pickle.loads(pickle.dumps(trajectory(stored, turn("two"))))

    assert isinstance(made.turns[0].reference, aa.ImageFile)
    assert made.turns[0].image == plain.image
    assert isinstance(made.pairs()[0].references[0], aa.ImageFile)


def test_a_notebook_shows_every_turn_and_takes_nothing_for_html():
    made = trajectory(
        turn("one", thought="what <i>is</i> a cone", critique=aa.Critique((LEFT,), "too dark"), score=0.25),
        turn("two", critique=aa.Abstention("no light"), score=0.5),
        stop_reason="that is <enough>",
    )

    html = made._repr_html_()

    assert html.count("<img ") == 2
    assert "turn 2, 0.5</b> (best)" in html
    assert "what &lt;i&gt;is&lt;/i&gt; a cone" in html
    assert "too dark; a &lt;b&gt;red&lt;/b&gt; cone" in html
    assert "abstained, no light" in html
    assert "that is &lt;enough&gt;" in html
    assert made.strip(scale=2).size[0] == 2 * 16 + 8
    assert repr(made) == "Trajectory('a cone', seed=7, 2 turns, 'that is <enough>')"
    assert repr(made.turns[0]) == "Turn('one', 0 regions, score 0.25)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (trajectory, "has no turns"),
        (lambda: trajectory("a picture"), r"turns\[0\]"),
        (lambda: turn("one", score=float("nan")), "finite"),
        (lambda: turn("one", critique="too dark"), r"artaug\.Critique"),
        (lambda: turn("one", thought=None), "thought"),
        (lambda: aa.Turn(plan="a cone", image=Image.new("RGB", (8, 8))), "Turn.plan="),
        (lambda: aa.Turn(plan=aa.Plan("a cone"), image="cone.png"), "PIL"),
        (lambda: aa.Thought(text="a cone", plan="a cone"), "Thought.plan="),
        (lambda: trajectory(turn("one")).pairs("last-first"), "'each-next'"),
        (lambda: trajectory(turn("one")).attempts("all"), "keep"),
    ],
)
def test_what_is_wrong_is_refused_with_its_name(make, message):
    with pytest.raises(aa.InvalidValueError, match=message):
        make()
