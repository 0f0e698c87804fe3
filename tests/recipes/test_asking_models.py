"""Recipes that ask a language model: rewriting, layouts and checklists, by functions and by a real server."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug.plan import run_planner
from artaug.recipes import (
    ChatLayout,
    ChatRequirements,
    ChatRewriter,
    ChatThought,
    PromptRewriter,
    ServedChat,
    checklist,
    layout_first,
)
from artaug.scorers import FunctionScorer
from artaug.synthesis import attempt_seed
from artaug.testing import FixedCritic, FixedFilter, FixedScorer, SwatchSynthesizer, check_planner
from support.faulty_server import faulty_server, refuses, says

SWATCHES = SwatchSynthesizer(width=8, height=8)
LEFT = aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a red cone", "it is grey")
LAYOUT = (
    '<think>two things</think>```json\n{"suggestions": [{"bbox_2d": [0, 0, 500, 1000], "prompt": "a red cone"}]}```'
)


class Uncounted(aa.Synthesizer):
    """Counts what it draws."""

    def __init__(self):
        self.drawn = []

    def synthesize(self, plan, *, seed):
        self.drawn.append((plan.prompt, seed))
        return SWATCHES.synthesize(plan, seed=seed)


def served(server, **options):
    return ServedChat(base_url=server.url, model="tiny", timeout_s=5.0, max_attempts=1, **options)


@pytest.mark.loopback
def test_a_served_model_rewrites_a_prompt_from_the_critique():
    with faulty_server(says('<think>hm</think>\n"a red cone,\n vivid"')) as server:
        plan = run_planner(PromptRewriter(ChatRewriter(served(server))), "a cone <|im_end|>", aa.Critique((LEFT,)))

    assert plan == aa.Plan("a red cone, vivid")
    (message,) = server.requests[0]["messages"]
    assert "it is grey" in message["content"]
    assert "<|im_end|>" not in message["content"]


@pytest.mark.loopback
def test_a_reply_that_was_cut_is_used_and_said(caplog):
    with faulty_server(says("a red cone, viv", finish="length")) as server:
        assert ChatRewriter(served(server))("a cone", aa.Critique((LEFT,))) == "a red cone, viv"

    assert [record.getMessage() for record in caplog.records] == [
        "tiny: the reply was cut at the limit of tokens: 'a red cone, viv'"
    ]


@pytest.mark.loopback
def test_a_server_that_refuses_is_an_error_that_names_the_model():
    with faulty_server(refuses(403)) as server, pytest.raises(aa.PartError, match=r"tiny gave no reply.*403"):
        served(server)("hello")


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("```text\na red cone\n```", "a red cone"),
        ("<reasoning>hm</reasoning>\u201ca red cone\u201d", "a red cone"),
        ("<think>A red cone, or", ""),
    ],
)
def test_an_answer_is_neither_the_reasoning_nor_what_is_around_it(reply, answer):
    assert ChatRewriter(lambda _: reply)("a cone", aa.Critique()) == answer
    assert ChatRequirements(lambda _: reply)("a cone") == ([answer] if answer else [])


@given(st.text(max_size=80))
def test_no_reply_of_a_model_is_an_error(reply):
    plan = PromptRewriter(ChatRewriter(lambda _: reply)).plan("a cone", aa.Critique())
    (drawn,) = layout_first(["a cone"], synthesizer=SWATCHES, lay_out=ChatLayout(lambda _: reply))
    (checked,) = checklist(
        ["a cone"],
        synthesizer=SWATCHES,
        requirements=ChatRequirements(lambda _: reply),
        verify=FixedScorer(1),
        progress=False,
    )

    assert plan.prompt.strip()
    assert drawn.plan.prompt == "a cone"
    assert len(checked.scores) >= 1


def test_a_rewriter_keeps_the_contract_of_planners_and_its_pairs_are_of_one_seed():
    planner = PromptRewriter(
        lambda prompt, critique: f"{prompt}, {critique.suggestions[0].prompt}" if critique.suggestions else ""
    )
    check_planner(planner)

    (attempt,) = aa.improve(
        ["a cone"],
        synthesizer=SWATCHES,
        critic=FixedCritic(aa.Critique((LEFT,))),
        planner=planner,
        keep=FixedFilter(True),
        seed=0,
    )

    assert (attempt.pair.prompt, attempt.pair.plan) == ("a cone", aa.Plan("a cone, a red cone"))
    assert attempt.pair.after == SWATCHES.synthesize(attempt.pair.plan, seed=attempt.pair.seed)


def test_a_prompt_that_a_rewriter_leaves_as_it_is_is_skipped_with_a_reason():
    (attempt,) = aa.improve(
        ["a cone"],
        synthesizer=SWATCHES,
        critic=FixedCritic(aa.Critique((LEFT,))),
        planner=PromptRewriter(lambda *_: " "),
        keep=FixedFilter(True),
        seed=0,
    )

    assert isinstance(attempt, aa.Skipped)
    assert attempt.stage == "plan"


@pytest.mark.loopback
def test_a_served_model_lays_a_prompt_out_before_the_first_picture():
    with faulty_server(says(LAYOUT), says("I cannot."), refuses(403)) as server:
        laid_out, plain, unasked = layout_first(
            ["a cone", "a ball", "a cube"], synthesizer=SWATCHES, lay_out=ChatLayout(served(server))
        )

    assert [(region.area, region.prompt) for region in laid_out.plan.regions] == [(LEFT.box, "a red cone")]
    assert laid_out.image == SWATCHES.synthesize(laid_out.plan, seed=laid_out.seed)
    assert plain.plan == aa.Plan("a ball")
    assert "holds no suggestions" in plain.reason
    assert unasked.plan == aa.Plan("a cube")
    assert "tiny gave no reply" in unasked.reason


def test_a_layout_for_a_synthesizer_without_a_guide_is_refused_at_once():
    class Plain(Uncounted):
        draws_regions = False

    with pytest.raises(aa.GuideError, match="has no guide"):
        layout_first(["a cone"], synthesizer=Plain(), lay_out=lambda _: aa.Critique())


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=3))
def test_only_what_fails_is_drawn_again_and_the_picture_that_fails_least_is_kept(failures):
    """A prompt's picture of each turn fails so many of three requirements; the last turn repeats."""
    prompts = [f"prompt {number}" for number in range(len(failures))]
    fails = {
        attempt_seed(5, round_number=1, prompt_index=number, candidate=turn): mine[min(turn, len(mine) - 1)]
        for number, mine in enumerate(failures)
        for turn in range(4)
    }
    synthesizer = Uncounted()
    verify = FunctionScorer(
        function=lambda _, requirement: float(int(requirement) >= fails[synthesizer.drawn[-1][1]]), name="verify"
    )
    asked = []

    def redraw(prompt, failed, image):
        assert image.size == (8, 8)
        asked.append((prompt, failed))
        return aa.Plan(f"{prompt} {len(failed)}")

    ended = checklist(
        prompts,
        synthesizer=synthesizer,
        requirements=lambda _: ["0", "1", "2"],
        verify=verify,
        redraw=redraw,
        seed=5,
        progress=False,
    )

    assert [checked.prompt for checked in ended] == prompts
    assert sum(checked.pictures for checked in ended) == len(synthesizer.drawn) == len(asked) + len(prompts)
    for checked, mine in zip(ended, failures, strict=True):
        turns = [mine[min(turn, len(mine) - 1)] for turn in range(4)]
        assert checked.pictures == (turns.index(0) + 1 if 0 in turns else 4)
        assert len(checked.failed) == min(turns[: checked.pictures])
        assert checked.failed == tuple(name for name, score in checked.scores.items() if score < 0.5)
        assert checked.image == SWATCHES.synthesize(checked.plan, seed=checked.seed)


def test_the_picture_that_fails_least_is_what_the_next_one_may_start_from():
    fails = iter([2, 1, 2])
    seen = []

    def redraw(prompt, failed, image):
        seen.append((len(failed), image))
        return aa.Plan(f"{prompt} {len(seen)}")

    scores = {}

    def score(image, requirement):
        if id(image) not in scores:
            scores[id(image)] = (image, next(fails))
        return float(int(requirement) >= scores[id(image)][1])

    (checked,) = checklist(
        ["a cone"],
        synthesizer=SWATCHES,
        requirements=lambda _: ["0", "1", "2"],
        verify=FunctionScorer(function=score, name="verify"),
        redraw=redraw,
        turns=3,
        progress=False,
    )

    assert [count for count, _ in seen] == [2, 1]
    assert seen[1][1] is checked.image
    assert (checked.plan.prompt, checked.failed, checked.pictures) == ("a cone 1", ("0",), 3)


def test_a_checklist_refuses_all_that_is_wrong_before_it_draws():
    with pytest.raises(aa.InvalidValueError, match="4 things are wrong"):
        checklist([], synthesizer=SWATCHES, requirements="a cone", verify=None, turns=0)


@pytest.mark.parametrize("given", ["a red cone", None])
def test_requirements_that_are_one_text_or_nothing_are_no_list(given):
    with pytest.raises(aa.ContractError, match=f"requirements returned {given!r}"):
        checklist(["a cone"], synthesizer=SWATCHES, requirements=lambda _: given, verify=FixedScorer(1), progress=False)


@pytest.mark.parametrize("ask", [ChatLayout, ChatRequirements, ChatThought])
def test_a_model_that_returns_no_text_is_named(ask):
    with pytest.raises(aa.ContractError, match="the model's function returned None"):
        ask(lambda _: None)("a cone")
    with pytest.raises(aa.ContractError, match="the model's function returned None"):
        ChatRewriter(lambda _: None)("a cone", aa.Critique())


def test_prompts_of_a_checklist_are_drawn_at_the_same_time_where_that_is_elsewhere():
    meet = threading.Barrier(2, timeout=10)

    class Elsewhere(aa.Synthesizer):
        max_concurrency = 2

        def synthesize(self, plan, *, seed):
            meet.wait()  # only passed if two are drawn at the same time
            return SWATCHES.synthesize(plan, seed=seed)

    ended = checklist(
        ["a cone", "a ball"],
        synthesizer=Elsewhere(),
        requirements=lambda prompt: [prompt],
        verify=FixedScorer(0),
        turns=2,
        progress=False,
    )

    assert [checked.pictures for checked in ended] == [2, 2]


@pytest.mark.loopback
def test_a_served_model_writes_the_checklist():
    with faulty_server(says("1. a red cone\n- 2 blue balls\n\n2 cones\n\u2022 1.5 moons")) as server:
        requirements = ChatRequirements(served(server))("a scene")

    assert requirements == ["a red cone", "2 blue balls", "2 cones", "1.5 moons"]
