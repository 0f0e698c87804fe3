"""IRG: thoughts, reflections, guidance by several contexts, and conversations in six modes and back."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug import playground
from artaug.recipes import (
    ChatReflection,
    ChatThought,
    ContextGuidance,
    Reflection,
    ReflectionPlanner,
    ServedChat,
    irg,
    irgl_conversations,
    serial_guidance,
    trajectory_from_irgl,
)
from artaug.testing import SwatchSynthesizer, check_guide, check_planner
from support.faulty_server import faulty_server, says
from support.tiny_sd3 import tiny_sd3

SWATCHES = SwatchSynthesizer(width=8, height=8)
REPLY = """<think>hm</think>The cone is lost in the dark.

### Improvements:
more light on it

**Steps**:
1. add a lamp
- warm its color

**Final prompt:** "a red cone,
 lit by a warm lamp"
"""
FINAL = "a red cone, lit by a warm lamp"


def drawn(**fields):
    parts = {
        "synthesizer": SWATCHES,
        "think": ChatThought(lambda _: "<think>It is plain.</think>\na red cone"),
        "reflect": ChatReflection(lambda *_: REPLY),
        "progress": False,
    }
    (trajectory,) = irg(["a cone"], **(parts | fields))
    return trajectory


def test_a_model_thinks_draws_reflects_and_draws_again():
    trajectory = drawn()

    first, second = trajectory.turns
    assert (first.thought, first.plan.prompt, second.plan.prompt) == ("It is plain.", "a red cone", FINAL)
    assert second.image == SWATCHES.synthesize(aa.Plan(FINAL), seed=trajectory.seed)
    assert first.critique.suggestions == (aa.Suggestion(aa.Box(0, 0, 1, 1), FINAL, "more light on it"),)
    assert first.critique.summary.startswith("The cone is lost")
    (pair,) = trajectory.pairs()
    assert (pair.prompt, pair.plan.prompt) == ("a cone", FINAL)


def test_a_reflection_has_three_headed_parts_after_its_paragraph():
    assert Reflection.parse(REPLY.rpartition("</think>")[2]) == Reflection(
        shortcomings="The cone is lost in the dark.",
        improvements="more light on it",
        steps=("add a lamp", "warm its color"),
        prompt=FINAL,
    )


def test_a_model_that_has_nothing_to_improve_ends_the_turns():
    trajectory = drawn(reflect=ChatReflection(lambda *_: "Nothing to improve."))
    assert (len(trajectory.turns), trajectory.stop_reason) == (1, "the critic has nothing to improve")


@pytest.mark.parametrize(
    "reply",
    [
        f"It is dark.\n## Final prompt\n{FINAL}",
        f"There is nothing to improve in its color, but it is dark.\nFinal prompt: `{FINAL}`",
        f"<thinking>Final prompt: a draft</thinking>It is dark.\n- **Final prompt**: {FINAL}",
    ],
)
def test_a_final_prompt_is_found_however_its_heading_is_written(reply):
    (suggestion,) = ChatReflection(lambda *_: reply).critique(Image.new("RGB", (8, 8)), "a cone").suggestions
    assert suggestion.prompt == FINAL


def test_a_reply_that_ends_within_the_reasoning_is_no_reflection_and_no_thought():
    reply = "<think>Perhaps\nFinal prompt: a draft"
    assert isinstance(ChatReflection(lambda *_: reply).critique(Image.new("RGB", (8, 8)), "a cone"), aa.Abstention)
    assert ChatThought(lambda _: reply)("a cone").plan == aa.Plan("a cone")


def test_a_thought_that_the_server_keeps_to_itself_leaves_the_prompt_that_follows():
    assert ChatThought(lambda _: "a red cone")("a cone") == aa.Thought(text="", plan=aa.Plan("a red cone"))


@given(st.text(max_size=200) | st.from_regex(r"(?i)[#*]{0,3}(steps|final prompt|improvements)[*]{0,2}:.{0,20}\n?"))
def test_no_reply_of_a_model_is_an_error(reply):
    thought = ChatThought(lambda _: reply)("a cone")
    answer = ChatReflection(lambda *_: reply).critique(Image.new("RGB", (8, 8)), "a cone")

    assert thought.plan.prompt.strip()
    assert isinstance(answer, aa.Abstention | aa.Critique)


def test_a_reflection_planner_keeps_the_contract_of_planners():
    check_planner(ReflectionPlanner())
    check_planner(ReflectionPlanner(contexts=True))


@pytest.mark.loopback
def test_a_served_multimodal_model_thinks_and_reflects_on_the_picture():
    with faulty_server(says("<think>Plain.</think> a red cone"), says(REPLY)) as server:
        chat = ServedChat(base_url=server.url, model="tiny", timeout_s=5.0, max_attempts=1)
        trajectory = drawn(think=ChatThought(chat), reflect=ChatReflection(chat))

    assert trajectory.turns[1].plan.prompt == FINAL
    assert ChatReflection(chat).max_concurrency == chat.concurrency
    _, asked = server.requests
    kinds = [part["type"] for part in asked["messages"][0]["content"]]
    assert kinds == ["image_url", "text"]


# Guidance by several contexts -----------------------------------------------------------------------


def by_hand(full, text, image, text_scale, image_scale, least):
    """The three lines of the paper's code, for one place."""
    u = text + text_scale * (full - text)
    u = u * min(max(np.sqrt((full**2).sum()) / (np.sqrt((u**2).sum()) + 1e-8), least), 1.0)
    return u if image is None else image + image_scale * (u - image)


@given(st.integers(0, 2**31), st.floats(0, 8), st.floats(0, 4), st.floats(0, 1), st.booleans(), st.booleans())
def test_serial_guidance_is_that_of_the_paper_at_every_place(seed, text_scale, image_scale, least, has_image, first):
    full, text, image = np.random.default_rng(seed).normal(size=(3, 5, 4))
    combined = serial_guidance(
        *(torch.tensor(one.T if first else one) for one in (full, text)),
        torch.tensor(image.T if first else image) if has_image else None,
        text_scale=text_scale,
        image_scale=image_scale,
        least_norm=least,
        channel_dim=0 if first else -1,
    )
    rows = [
        by_hand(full[i], text[i], image[i] if has_image else None, text_scale, image_scale, least) for i in range(5)
    ]
    np.testing.assert_allclose((combined.T if first else combined).numpy(), np.stack(rows), rtol=1e-9, atol=1e-12)


def test_scales_of_one_are_the_whole_context():
    full, text, image = torch.randn(3, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(serial_guidance(full, text, image, text_scale=1.0, image_scale=1.0), full)


def test_context_guidance_keeps_the_contract_of_guides():
    check_guide(ContextGuidance())


@pytest.mark.parametrize("model", ["tokens", "channels first"])
def test_a_scale_of_zero_draws_the_prompt_and_of_one_the_reflection(model):
    def synthesizer(guide):
        if model == "tokens":
            return playground.synthesizer(guide=guide, steps=2)
        return aa.diffusion.DiffusersSynthesizer(
            pipeline=tiny_sd3(), guide=guide, steps=2, width=32, height=32, guidance_scale=1.0
        )

    reflected = ReflectionPlanner(contexts=True).plan(
        "a red cone on the left", aa.Critique((aa.Suggestion(aa.Box(0, 0, 1, 1), "a blue ball on the right"),))
    )

    def picture(guide, plan):
        return np.asarray(synthesizer(guide).synthesize(plan, seed=0), dtype=int)

    plain, final = (picture(None, aa.Plan(text)) for text in ("a red cone on the left", "a blue ball on the right"))
    assert np.abs(picture(ContextGuidance(text_scale=0.0, least_norm=1.0), reflected) - plain).max() <= 1
    assert np.abs(picture(ContextGuidance(text_scale=1.0), reflected) - final).max() <= 1
    assert np.abs(picture(ContextGuidance(text_scale=3.0), reflected) - final).max() > 1
    never = ContextGuidance(text_scale=3.0, interval=(0.0, 1e-3))
    assert np.abs(picture(never, reflected) - final).max() <= 1


@pytest.mark.parametrize(
    ("name", "value"), [("interval", (0.5, 0.5)), ("least_norm", 2.0), ("text_scale", float("nan"))]
)
def test_context_guidance_refuses_what_it_cannot_mean(name, value):
    with pytest.raises(aa.InvalidValueError, match=name):
        ContextGuidance(**{name: value})


# Conversations ---------------------------------------------------------------------------------------

FLAGS = {  # (type, need_loss, need_vae, need_vit) of every part, turn by turn; None for a user's turn
    "initial_thinking_understanding": [None, ["image 0 1 1"], None, ["text 1 0 0"]],
    "initial_thinking_generation": [None, ["text 1 0 0"]],
    "initial_full": [None, ["text 1 0 0", "image 1 0 0"]],
    "improving_thinking_understanding": [None, ["image 0 1 1", "image 0 1 1"], None, ["text 1 0 0"]],
    "improving_thinking_generation": [None, ["text 0 0 0", "image 0 1 1", "text 1 0 0"]],
    "improving_full": [None, ["text 0 0 0", "image 0 1 1", "text 1 0 0", "image 1 0 0"]],
}


def flags(part):
    return f"{part['type']} {part['need_loss']:d} {part['need_vae']:d} {part['need_vit']:d}"


def test_a_trajectory_makes_the_six_modes_with_the_loss_flags_of_each():
    trajectory = drawn()
    written = {mode: json.loads(json.dumps(said)) for mode, said in irgl_conversations(trajectory)}

    assert list(written) == list(FLAGS)
    for mode, said in written.items():
        assert [None if isinstance(one, str) else [flags(part) for part in one] for one in said] == FLAGS[mode], mode
        assert said[0] == "a cone"
    parts = written["improving_full"][1]
    assert parts[0]["content"] == "<think>It is plain.</think>"
    assert parts[2]["content"] == trajectory.turns[0].critique.summary
    png = Image.open(io.BytesIO(base64.b64decode(parts[3]["content"]))).convert("RGB")
    assert png == trajectory.turns[1].image


def test_a_conversation_comes_back_as_the_trajectory_that_it_was():
    trajectory = drawn()
    ((_, said),) = irgl_conversations(trajectory, ["improving_full"])

    back = trajectory_from_irgl(json.loads(json.dumps(said)), seed=trajectory.seed)

    assert back.pairs() == trajectory.pairs()
    assert back.turns[0].thought == "It is plain."
    assert back.turns[0].critique == trajectory.turns[0].critique


@pytest.mark.parametrize("mode", [mode for mode in FLAGS if mode != "initial_thinking_generation"])
def test_every_mode_with_pictures_comes_back_with_each_text_where_it_belongs(mode):
    trajectory = drawn()
    ((_, said),) = irgl_conversations(trajectory, [mode])

    back = trajectory_from_irgl(said)

    first, *further = back.turns
    if mode.startswith("initial"):
        assert (first.thought, first.critique, further) == ("It is plain.", None, [])
    else:
        assert first.critique == trajectory.turns[0].critique
        assert [(turn.plan, turn.critique) for turn in further] == [(aa.Plan(FINAL), None)][: len(further)]
        assert len(further) == (mode != "improving_thinking_generation")


def test_what_a_trajectory_cannot_fill_is_left_out():
    thoughtless = aa.Trajectory(prompt="a cone", turns=[*drawn().turns[1:], *drawn().turns[1:]])
    assert list(irgl_conversations(thoughtless)) == []
    suggested = aa.Turn(
        plan=aa.Plan("a cone"),
        image=Image.new("RGB", (8, 8)),
        critique=aa.Critique((aa.Suggestion(aa.Box(0, 0, 1, 1), "a lit cone", "dark"),)),
    )
    made = dict(irgl_conversations(aa.Trajectory(prompt="a cone", turns=[suggested, suggested])))
    assert set(made) == {mode for mode in FLAGS if mode.startswith("improving")}
    assert made["improving_full"][1][1]["content"] == "- a lit cone (dark)"
    with pytest.raises(aa.InvalidValueError, match="modes"):
        list(irgl_conversations(thoughtless, ["thinking"]))


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.sampled_from(["image", "text"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["type", "content", "x"]), inner),
    max_leaves=12,
)


@given(JSON | st.lists(JSON).map(lambda rest: ["a cone", *rest]))
def test_a_conversation_of_others_is_read_or_refused(conversation):
    try:
        trajectory = trajectory_from_irgl(conversation)
    except aa.InvalidValueError:
        return
    assert trajectory.turns


def test_a_picture_that_cannot_be_read_is_named():
    for content in ("%%%", base64.b64encode(b"GIF89a").decode(), "aGVsbG8"):
        with pytest.raises(aa.InvalidValueError, match="cannot be read"):
            trajectory_from_irgl(["a cone", [{"type": "image", "content": content}]])
