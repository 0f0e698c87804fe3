"""GraPE: a first picture, edits planned by a multimodal model, and each of them in turn."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug import playground
from artaug.recipes import ChatEdits, EditPlanner, ServedChat, grape
from artaug.scorers import FunctionScorer
from artaug.synthesis import attempt_seed
from artaug.testing import FixedCritic, SwatchSynthesizer
from support.faulty_server import faulty_server, refuses, says

SWATCHES = SwatchSynthesizer(width=8, height=8)
PICTURE = Image.new("RGB", (8, 8))
REPLY = """<think>hm</think>1. Prompt: a red cone (St. Ives). 2. Picture: a grey cone.
**Feedback**:
1. Make the cone red, as in St. Ives.
- Add a ball on the right.
"""
EDITS = ["Make the cone red, as in St. Ives.", "Add a ball on the right."]


def graped(prompt="a red cone", **fields):
    parts = {"synthesizer": SWATCHES, "plan_edits": ChatEdits(lambda *_: REPLY), "progress": False}
    (trajectory,) = grape([prompt], **(parts | fields))
    return trajectory


def test_every_edit_is_made_on_the_picture_before():
    trajectory = graped(planner=EditPlanner(strength=0.5))

    first, *edited = trajectory.turns
    assert first.image == SWATCHES.synthesize(aa.Plan("a red cone"), seed=trajectory.seed)
    assert [turn.plan.prompt for turn in edited] == EDITS
    for before, turn in zip(trajectory.turns, edited, strict=False):
        assert turn.plan.canvas == aa.Canvas(before.image, strength=0.5)
        assert turn.image == SWATCHES.synthesize(turn.plan, seed=trajectory.seed)
    assert trajectory.stop_reason == "2 of 2 edits made"
    assert len(trajectory.pairs("each-next")) == 2


def test_edits_keep_their_words_and_their_dots():
    critique = ChatEdits(lambda *_: REPLY).critique(PICTURE, "a red cone")
    assert [suggestion.prompt for suggestion in critique.suggestions] == EDITS
    assert critique.summary.startswith("1. Prompt:")


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("All is well.\nFeedback: none", aa.Critique(summary="All is well.\nFeedback: none")),
        ("Feedback:\n<REGENERATE>", "cannot be saved"),
        ("It is wrong from end to end. <REGENERATE>", "cannot be saved"),
        ("The cone is grey.", "has no feedback"),
        ("Feedback:", "has no feedback"),
        ("<think>The cone is grey. Feedback: make it red", "ends before its answer begins"),
    ],
)
def test_no_edits_no_hope_and_no_sense_are_told_apart(reply, answer):
    given = ChatEdits(lambda *_: reply).critique(PICTURE, "a red cone")
    assert given == answer if isinstance(answer, aa.Critique) else answer in given.reason


@pytest.mark.parametrize(
    "feedback",
    [
        "none.",
        "- none needed",
        "No edits are needed.",
        "No further changes",
        "Nothing is wrong.",
        "There are no mistakes.",
    ],
)
def test_words_for_no_edits_are_no_edit(feedback):
    assert ChatEdits(lambda *_: f"## Feedback\n{feedback}").critique(PICTURE, "a red cone").suggestions == ()


@pytest.mark.parametrize(
    "feedback",
    [
        "## Feedback\n- make it red",
        "Feedback:\n```text\nmake it red\n```",
        "Feedback:\n**1.** make it red",
        "Feedback:\n\u2022 make it red",
    ],
)
def test_an_edit_is_read_without_what_markdown_puts_around_it(feedback):
    (suggestion,) = ChatEdits(lambda *_: feedback).critique(PICTURE, "a red cone").suggestions
    assert suggestion.prompt == "make it red"


def test_at_most_eight_edits_are_used_and_the_rest_is_noted():
    critique = ChatEdits(lambda *_: "Feedback:\n" + "- add a ball\n" * 9).critique(PICTURE, "a red cone")
    assert len(critique.suggestions) == 8
    assert critique.repairs == ("used 8 of 9 edits",)


@given(st.text(max_size=200) | st.from_regex(r"(?i)[*#]{0,3}feedback[*]{0,2}:(\n?.{0,20}){0,3}"))
def test_no_reply_of_a_model_is_an_error(reply):
    trajectory = graped(plan_edits=ChatEdits(lambda *_: reply))
    assert trajectory.turns


@dataclass(frozen=True)
class HopelessAt(aa.Critic):
    """Gives up the first few pictures."""

    pictures: int
    seen: list = field(default_factory=list)

    def critique(self, image, prompt):
        self.seen.append(image)
        return aa.Abstention("hopeless") if len(self.seen) <= self.pictures else aa.Critique()


@given(st.integers(0, 3), st.integers(0, 2))
def test_what_cannot_be_saved_is_drawn_again_from_another_seed(hopeless, regenerations):
    critic = HopelessAt(hopeless)

    trajectory = graped(plan_edits=critic, regenerations=regenerations, seed=3)

    number = min(hopeless, regenerations)
    assert trajectory.seed == attempt_seed(3, round_number=1, prompt_index=0, candidate=number)
    assert len(critic.seen) == number + 1
    assert trajectory.image == SWATCHES.synthesize(aa.Plan("a red cone"), seed=trajectory.seed)
    given_up = f"no edits were planned for {regenerations + 1} first pictures, of the last: hopeless"
    assert trajectory.stop_reason == (given_up if hopeless > regenerations else "nothing is to be edited")


def test_an_edit_with_a_place_is_inpainted_by_the_model_that_draws_and_the_rest_stays():
    guided = playground.synthesizer(guide=aa.RegionalAttention(), steps=3)
    right = aa.Suggestion(aa.Box(0.5, 0, 1, 1), "a glowing blue ball on the right")
    planner = aa.OnCanvas(aa.GreedyPlanner(), strength=0.7, masked=True)

    trajectory = graped(
        "a red cone on the left at night",
        synthesizer=guided,
        plan_edits=FixedCritic(aa.Critique((right,))),
        planner=planner,
        scorer=FunctionScorer(function=lambda image, _: float(image.width), name="width"),
    )

    before, after = trajectory.turns
    assert after.plan.canvas.mask == right.box
    assert [region.prompt for region in after.plan.regions] == [right.prompt]
    assert after.image == guided.synthesize(after.plan, seed=trajectory.seed)
    assert [turn.score for turn in trajectory.turns] == [64.0, 64.0]
    assert before.image != after.image


@pytest.mark.loopback
def test_a_served_multimodal_model_plans_the_edits():
    with faulty_server(says(REPLY)) as server:
        chat = ServedChat(base_url=server.url, model="tiny", timeout_s=5.0, max_attempts=1)
        trajectory = graped(plan_edits=ChatEdits(chat))

    assert [turn.plan.prompt for turn in trajectory.turns[1:]] == EDITS
    assert server.requests[0]["messages"][0]["content"][0]["type"] == "image_url"


@pytest.mark.loopback
def test_a_server_without_a_reply_is_an_abstention_that_says_why():
    with faulty_server(refuses(404)) as server:
        chat = ServedChat(base_url=server.url, model="tiny", timeout_s=5.0, max_attempts=1)
        answer = ChatEdits(chat).critique(PICTURE, "a red cone")

    assert isinstance(answer, aa.Abstention)
    assert "tiny gave no reply" in answer.reason


def test_all_that_is_wrong_is_said_before_anything_is_drawn():
    with pytest.raises(aa.InvalidValueError, match="4 things are wrong") as caught:
        graped(" ", plan_edits=None, regenerations=-1, scorer="none")
    assert all(name in str(caught.value) for name in ("prompts[0]", "plan_edits", "regenerations", "scorer"))
    with pytest.raises(aa.InvalidValueError, match="no picture to edit"):
        EditPlanner().plan("a red cone", aa.Critique())

    class Plain(aa.Synthesizer):
        def synthesize(self, plan, *, seed):
            raise AssertionError

    with pytest.raises(aa.ModelError, match="canvas"):
        graped(synthesizer=Plain())
