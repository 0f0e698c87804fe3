"""`refine`: turns at inference, when they end, what they cost, and that one turn is plain drawing."""

import threading
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic
from artaug.scorers import Chroma, FunctionScorer
from artaug.synthesis import attempt_seed
from artaug.testing import FixedCritic, FixedScorer, SwatchSynthesizer

SWATCHES = SwatchSynthesizer(width=8, height=8)
LEFT = aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a red cone")
RIGHT = aa.Suggestion(aa.Box(0.5, 0, 1, 1), "a blue ball")
ALWAYS = FixedCritic(aa.Critique((LEFT,)))


@dataclass(frozen=True)
class Listed(aa.Critic):
    """Gives one answer after the other."""

    answers: tuple
    asked: list = field(default_factory=list)

    def critique(self, image, prompt):
        self.asked.append((image, prompt))
        return self.answers[len(self.asked) - 1]


class Numbering(aa.RegionPlanner):
    """Makes a plan that is new every time."""

    def __init__(self):
        self.given = []

    def plan(self, prompt, critique):
        self.given.append((prompt, critique))
        return aa.Plan(f"{prompt} {len(self.given)}")


def by_order(scores):
    """A scorer that gives one score after the other."""
    following = iter(scores)
    return FunctionScorer(function=lambda *_: next(following), name="by order")


def refined(prompt="a cone", **fields):
    parts = {"synthesizer": SWATCHES, "critic": ALWAYS, "planner": Numbering(), "progress": False}
    return aa.refine(prompt, **(parts | fields))


@given(st.integers(0, 2**40))
def test_one_turn_is_plain_drawing_bit_for_bit(seed):
    critic = Listed(())

    trajectory = refined(turns=1, seed=seed, critic=critic)

    assert trajectory.image == SWATCHES.synthesize(aa.Plan("a cone"), seed=seed)
    assert [turn.plan for turn in trajectory.turns] == [aa.Plan("a cone")]
    assert critic.asked == []
    assert trajectory.stop_reason == "the one turn ran"


def test_one_turn_of_a_real_model_is_plain_drawing_and_the_next_is_that_of_improve():
    guided = playground.synthesizer(guide=aa.RegionalAttention(), steps=2)
    prompt, critic, planner = "a red cone on the left at night", PhotometricCritic(), aa.GreedyPlanner()
    (attempt,) = aa.improve(
        [prompt], synthesizer=guided, critic=critic, planner=planner, keep=aa.Gain(Chroma(), at_least=-1), seed=0
    )

    (trajectory,) = aa.refine_each(
        [prompt], synthesizer=guided, critic=critic, planner=planner, turns=2, progress=False
    )
    alone = refined(prompt, synthesizer=guided, turns=1, seed=trajectory.seed)

    assert alone.image.tobytes() == guided.synthesize(aa.Plan(prompt), seed=trajectory.seed).tobytes()
    assert trajectory.pairs() == [attempt.pair]


def test_the_planner_gets_all_that_was_said_the_newest_first_and_the_prompt_as_it_was():
    planner, first, second = Numbering(), aa.Critique((LEFT,), "dark"), aa.Critique((RIGHT, LEFT), "better")
    critic = Listed((first, second))

    trajectory = refined(planner=planner, critic=critic, seed=3)

    assert planner.given == [("a cone", first), ("a cone", aa.Critique((RIGHT, LEFT), "better"))]
    assert [turn.plan.prompt for turn in trajectory.turns] == ["a cone", "a cone 1", "a cone 2"]
    assert [turn.critique for turn in trajectory.turns] == [first, second, None]
    assert [turn.image for turn in trajectory.turns] == [
        SWATCHES.synthesize(turn.plan, seed=3) for turn in trajectory.turns
    ]
    assert critic.asked == [(turn.image, "a cone") for turn in trajectory.turns[:2]]
    assert trajectory.stop_reason == "all 3 turns ran"


def test_regions_of_earlier_turns_stay_while_the_picture_is_drawn_from_its_seed():
    critic = Listed((aa.Critique((LEFT,)), aa.Critique((RIGHT,)), aa.Critique((LEFT,))))

    trajectory = refined(critic=critic, planner=aa.GreedyPlanner(), turns=4)

    prompts = [{region.prompt for region in turn.plan.regions} for turn in trajectory.turns]
    assert prompts == [set(), {"a red cone"}, {"a red cone", "a blue ball"}, {"a red cone", "a blue ball"}]


@pytest.mark.parametrize(
    ("fields", "turns", "reason"),
    [
        ({"critic": FixedCritic(aa.Abstention("too dark"))}, 1, "the critic abstained: too dark"),
        ({"planner": aa.GreedyPlanner()}, 2, "the plan of turn 3 changes nothing"),
        ({"stop": aa.TurnRule(scorer=FixedScorer(0.9), enough=0.8)}, 1, "turn 1 is good enough: 0.9, at least 0.8"),
        ({"stop": aa.TurnRule(scorer=FixedScorer(0.9))}, 2, "turn 2 did not raise the score of 0.9"),
        (
            {"stop": aa.TurnRule(scorer=FixedScorer(0.9), patience=2)},
            3,
            "turns 2 to 3 did not raise the score of 0.9",
        ),
        ({"budget": aa.Budget(at_most=2.5)}, 2, "turn 3 would cost 1 beside 2, with a budget of 2.5"),
        ({"turns": 5}, 5, "all 5 turns ran"),
    ],
)
def test_turns_end_with_a_reason(fields, turns, reason):
    trajectory = refined(**({"turns": 4} | fields))
    assert (len(trajectory.turns), trajectory.stop_reason) == (turns, reason)


@given(
    st.lists(st.integers(0, 4), min_size=6, max_size=6),
    st.sampled_from([None, 3.0]),
    st.integers(0, 1),
    st.integers(1, 3),
)
def test_a_rule_ends_turns_where_the_score_no_longer_rises_and_the_best_is_kept(scores, enough, least_gain, patience):
    rule = aa.TurnRule(scorer=by_order(scores), enough=enough, least_gain=least_gain, patience=patience)

    trajectory = refined(turns=6, stop=rule)

    count = len(trajectory.turns)
    assert [turn.score for turn in trajectory.turns] == scores[:count]
    assert trajectory.best is trajectory.turns[scores.index(max(scores[:count]))]

    def rose(number):
        return scores[number] > max(scores[:number]) + least_gain

    def ends(number):
        reached = enough is not None and scores[number] >= enough
        return reached or (number >= patience and not any(map(rose, range(number - patience + 1, number + 1))))

    assert count == next((number + 1 for number in range(5) if ends(number)), 6)


@given(
    at_most=st.floats(1.5, 12),
    prices=st.fixed_dictionaries({name: st.sampled_from([0.0, 0.3, 1.0]) for name in ("region", "critique", "score")}),
    scored=st.booleans(),
)
def test_no_prompt_costs_more_than_its_budget_and_what_fits_is_drawn(at_most, prices, scored):
    answers = tuple(aa.Critique((LEFT,) if number % 2 else (LEFT, RIGHT), str(number)) for number in range(20))
    budget = aa.Budget(at_most=at_most, picture=0.5, **prices)
    stop = aa.TurnRule(scorer=FixedScorer(), patience=20) if scored else None

    class Fresh(aa.RegionPlanner):
        def plan(self, prompt, critique):
            return replace(aa.GreedyPlanner().plan(prompt, critique), prompt=f"{prompt} {critique.summary}")

    trajectory = refined(critic=Listed(answers), planner=Fresh(), turns=20, budget=budget, stop=stop)

    spent = budget.cost(trajectory.turns)
    assert spent <= at_most * (1 + 1e-6)
    if len(trajectory.turns) < 20:
        asked = budget.critique * (trajectory.turns[-1].critique is None)
        assert spent + asked + budget.picture + 2 * budget.region + budget.score * scored > at_most


def test_a_thought_comes_before_the_first_picture():
    thought = aa.Thought(text="It is night.", plan=aa.Plan("a glowing cone"))

    trajectory = refined(think=lambda _: thought, turns=2)

    assert (trajectory.turns[0].thought, trajectory.turns[0].plan) == ("It is night.", aa.Plan("a glowing cone"))
    assert trajectory.turns[1].thought == ""
    assert trajectory.turns[1].plan.prompt == "a cone 1"


def test_each_prompt_has_the_trajectory_that_it_has_alone():
    prompts = ["a cone", "a ball", "a ring"]
    parts = {"synthesizer": SWATCHES, "critic": ALWAYS, "planner": aa.GreedyPlanner(), "progress": False}

    together = list(aa.refine_each(prompts, seed=5, **parts))

    for index, (prompt, one) in enumerate(zip(prompts, together, strict=True)):
        alone = aa.refine(prompt, seed=attempt_seed(5, round_number=1, prompt_index=index), **parts)
        assert one.pairs("each-next") == alone.pairs("each-next")
        assert (one.prompt, one.seed, one.stop_reason) == (prompt, alone.seed, alone.stop_reason)


def test_what_computes_elsewhere_works_on_several_prompts_at_a_time_and_changes_nothing():
    meet = threading.Barrier(2, timeout=10)

    @dataclass(frozen=True)
    class Elsewhere(aa.Synthesizer):
        max_concurrency = 2

        def synthesize(self, plan, *, seed):
            meet.wait()  # only passed if two are drawn at the same time
            return SWATCHES.synthesize(plan, seed=seed)

    parts = {"critic": ALWAYS, "planner": aa.GreedyPlanner(), "progress": False}
    prompts = ["a cone", "a ball"]

    there = list(aa.refine_each(prompts, synthesizer=Elsewhere(), **parts))
    here = list(aa.refine_each(prompts, synthesizer=SWATCHES, **parts))

    assert [one.pairs() for one in there] == [one.pairs() for one in here]


def test_a_folder_keeps_pictures_so_that_the_same_call_draws_none_again(tmp_path):
    drawn = []

    class Counting(aa.Synthesizer):
        identity = "counting"

        def synthesize(self, plan, *, seed):
            drawn.append(seed)
            return SWATCHES.synthesize(plan, seed=seed)

    def call():
        parts = {"critic": ALWAYS, "planner": aa.GreedyPlanner(), "progress": False, "folder": tmp_path}
        return list(aa.refine_each(["a cone", "a ball"], synthesizer=Counting(), **parts))

    first, count = call(), len(drawn)
    again = call()

    assert len(drawn) == count == 4
    assert [one.pairs() for one in first] == [one.pairs() for one in again]
    assert isinstance(again[0].turns[0].reference, aa.ImageFile)


def test_all_that_is_wrong_is_said_before_anything_is_drawn():
    class Plain(aa.Synthesizer):
        draws_regions = False

        def synthesize(self, plan, *, seed):
            raise AssertionError

    with pytest.raises(aa.InvalidValueError, match="5 things are wrong") as caught:
        refined(" ", synthesizer=Plain(), critic=None, planner=aa.GreedyPlanner(), turns=0, think="hard")
    assert all(name in str(caught.value) for name in ("prompts[0]", "critic", "turns=0", "think", "no guide"))
    with pytest.raises(aa.PromptError):
        aa.refine_each([], synthesizer=SWATCHES, critic=ALWAYS, planner=Numbering())
    with pytest.raises(aa.InvalidValueError, match="stop"):
        refined(stop=FixedScorer())
    with pytest.raises(aa.ContractError, match="think"):
        refined(think=lambda prompt: prompt)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: aa.TurnRule(scorer=0.5), "scorer"),
        (lambda: aa.TurnRule(scorer=FixedScorer(), least_gain=-1), "least_gain"),
        (lambda: aa.TurnRule(scorer=FixedScorer(), enough=float("inf")), "enough"),
        (lambda: aa.TurnRule(scorer=FixedScorer(), patience=0), "patience"),
        (lambda: aa.Budget(at_most=0.5), "price of the first picture"),
        (lambda: aa.Budget(at_most=5, region=-1), "region"),
    ],
)
def test_rules_and_budgets_refuse_what_they_cannot_mean(make, message):
    with pytest.raises(aa.InvalidValueError, match=message):
        make()


def test_a_planner_that_starts_from_the_picture_gets_what_was_said_of_it_alone():
    critic = Listed((aa.Critique((LEFT,)), aa.Critique((RIGHT,)), aa.Critique((LEFT,))))
    planner = aa.OnCanvas(aa.GreedyPlanner(), strength=0.5, masked=True)

    trajectory = refined(critic=critic, planner=planner, turns=4)

    assert len(trajectory.turns) == 4
    for before, turn, suggestion in zip(trajectory.turns, trajectory.turns[1:], (LEFT, RIGHT, LEFT), strict=False):
        assert [region.prompt for region in turn.plan.regions] == [suggestion.prompt]
        assert turn.plan.canvas == aa.Canvas(before.image, mask=suggestion.box, strength=0.5)
        assert turn.image == SWATCHES.synthesize(turn.plan, seed=trajectory.seed)


def test_a_plan_that_an_earlier_turn_had_is_not_drawn_again():
    critic = Listed((aa.Critique((LEFT,)), aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.05, 0.05), "a dot"),))))
    planner = aa.OnCanvas(
        aa.GreedyPlanner(), strength=0.5, masked=True
    )  # a box too small makes no region, and no canvas

    trajectory = refined(critic=critic, planner=planner, turns=4)

    assert (len(trajectory.turns), trajectory.stop_reason) == (2, "the plan of turn 3 is that of turn 1")


def test_a_picture_from_a_canvas_costs_the_part_of_it_that_is_drawn():
    planner = aa.OnCanvas(aa.GreedyPlanner(), strength=0.25)
    answers = tuple(aa.Critique((aa.Suggestion(LEFT.box, f"cone {number}"),)) for number in range(9))

    trajectory = refined(critic=Listed(answers), planner=planner, turns=9, budget=aa.Budget(at_most=1.8))

    assert len(trajectory.turns) == 4
    assert trajectory.stop_reason == "turn 5 would cost 0.25 beside 1.75, with a budget of 1.8"


def test_a_folder_keeps_the_pictures_that_turns_start_from(tmp_path):
    parts = {"critic": ALWAYS, "planner": aa.OnCanvas(aa.GreedyPlanner(), strength=0.5), "progress": False}

    (stored,) = aa.refine_each(["a cone"], synthesizer=SWATCHES, folder=tmp_path, **parts)
    (plain,) = aa.refine_each(["a cone"], synthesizer=SWATCHES, **parts)

    assert [turn.plan for turn in stored.turns] == [turn.plan for turn in plain.turns]
    assert [turn.image.tobytes() for turn in stored.turns] == [turn.image.tobytes() for turn in plain.turns]
    assert all(isinstance(turn.plan.canvas.pictures[0], aa.ImageFile) for turn in stored.turns[1:])


def test_a_progress_line_says_how_far_it_is_and_why_it_ended(capsys):
    refined(planner=aa.GreedyPlanner(), progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "refine: 0/3 turns (0%)"
    assert lines[-1].startswith("refine: 2/2 turns (100%)")
    assert lines[-1].endswith("the plan of turn 3 changes nothing")
