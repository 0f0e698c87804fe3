"""What a model is asked, in which words, and the schema its reply has to meet."""

import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug.critics import FAMILIES, Conversation, Coordinates, coordinates_for, prompt_text
from support.strategies import prompts

PICTURE = Image.new("RGB", (640, 480))
conventions = st.sampled_from(list(FAMILIES.values()))
sizes = st.tuples(st.integers(32, 2000), st.integers(32, 2000))


def all_objects(schema):
    """Every part of a schema that describes an object."""
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for part in schema.values():
            yield from all_objects(part)


def reply_of(conversation, size, *, numbers=None, **changes):
    box = aa.Box(0.25, 0.25, 0.75, 0.75)
    written = [round(one) if one > 1 else one for one in conversation.coordinates.write(box, size=size)]
    suggestion = {"reason": "dark", conversation.coordinates.key: numbers or written, "prompt": "a lit window"}
    return {"summary": "fine", "suggestions": [suggestion], **changes}


# --- messages --------------------------------------------------------------------------------------------------------


def test_one_stage_shows_the_picture_and_asks_once():
    asked = Conversation()

    system, user = asked.messages(PICTURE, "a pear")

    assert (system.role, system.image, user.role, user.image) == ("system", None, "user", PICTURE)
    assert system.text == prompt_text("art-director-1-system")
    assert "----\na pear\n----" in user.text
    assert json.dumps(asked.schema(PICTURE.size)) in user.text
    assert '"box": [left, top, right, bottom], tight around what should change' in user.text
    assert "at most 4 regions" in user.text
    assert asked.stages == 1


def test_two_stages_ask_for_an_analysis_and_show_the_picture_once():
    asked = Conversation.in_two_stages(coordinates=coordinates_for("qwen2_5_vl"), max_suggestions=3)

    opening = asked.messages(PICTURE, "a pear")
    whole = asked.messages(PICTURE, "a pear", analysis="It is dark.")

    assert asked.stages == 2
    assert whole[: len(opening)] == opening
    assert [message.role for message in whole] == ["system", "user", "assistant", "user"]
    assert "think aloud" in opening[1].text
    assert "JSON" not in opening[1].text
    assert whole[2].text == "It is dark."
    assert "644 wide and 476 high" in whole[3].text
    assert [message.image is not None for message in whole] == [False, True, False, False]


def test_a_template_without_a_system_role_hears_it_from_the_user():
    (user,) = Conversation(system_role=False).messages(PICTURE, "a pear")
    assert user.role == "user"
    assert user.text.startswith(prompt_text("art-director-1-system"))


def test_the_system_text_may_be_left_out():
    (user,) = Conversation(system="").messages(PICTURE, "a pear")
    assert not user.text.startswith("You are")


def test_texts_of_ones_own_take_the_places_of_the_packages():
    asked = Conversation(system="", answer="Improve {prompt} in {max_suggestions} places: {coordinates}. {schema}")
    (user,) = asked.messages(PICTURE, "a pear")
    assert user.text.startswith('Improve a pear in 4 places: "box": [left')


@given(prompts)
def test_a_prompt_is_put_in_once_and_never_filled(prompt):
    (user,) = Conversation(system="", answer="<{prompt}>").messages(PICTURE, prompt + "{schema} {prompt}")
    assert user.text == f"<{prompt.replace('<', chr(0x2039)).replace('>', chr(0x203A))}{{schema}} {{prompt}}>"


@pytest.mark.parametrize("mark", ["<image>", "<|im_end|>", "<|image_pad|>", "<start_of_image>", "[INST]", "[/INST]"])
def test_what_a_chat_template_would_read_as_its_own_is_only_words(mark):
    asked = Conversation.in_two_stages(coordinates=coordinates_for("llava"))
    said = asked.messages(PICTURE, f"a pear {mark}", analysis=f"It is {mark} dark.")
    assert not any(mark in message.text for message in said)


def test_an_analysis_nobody_asked_for_is_refused():
    with pytest.raises(aa.InvalidValueError, match="has one stage and takes no analysis"):
        Conversation().messages(PICTURE, "a pear", analysis="It is dark.")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"max_suggestions": 0}, "need at least 1"),
        ({"answer": "{prompt} {schemas}"}, r"placeholders \{schemas\}, which nothing fills: known are \{prompt\}"),
        ({"answer": "Be an art director."}, r"never say \{prompt\}"),
    ],
)
def test_a_conversation_that_cannot_work_is_refused(options, fault):
    with pytest.raises(aa.InvalidValueError, match=fault):
        Conversation(**options)


def test_braces_of_json_are_no_placeholders():
    asked = Conversation(system="", answer='{prompt}: answer like {"suggestions": []}')
    assert asked.messages(PICTURE, "a pear")[0].text == 'a pear: answer like {"suggestions": []}'


def test_an_unknown_text_is_named():
    with pytest.raises(
        aa.InvalidValueError, match="no prompt called 'art-director-9'; there are art-director-1-analyse"
    ):
        prompt_text("art-director-9")


@pytest.mark.parametrize("name", ["system", "answer", "analyse", "conclude"])
def test_the_texts_of_the_package_are_whole(name):
    text = prompt_text(f"art-director-1-{name}")
    assert text == text.strip()
    assert len(text) > 200


def test_conversations_are_told_apart_by_their_repr():
    assert repr(Conversation()) == repr(Conversation())
    assert repr(Conversation()) != repr(Conversation(answer="{prompt}?"))


# --- the schema ------------------------------------------------------------------------------------------------------


@given(conventions, sizes, st.integers(1, 9))
def test_the_schema_is_strict(convention, size, at_most):
    schema = Conversation(coordinates=convention, max_suggestions=at_most).schema(size)

    jsonschema.Draft202012Validator.check_schema(schema)
    objects = list(all_objects(schema))
    assert len(objects) == 2
    for one in objects:
        assert one["additionalProperties"] is False
        assert one["required"] == list(one["properties"])
    assert schema["properties"]["suggestions"]["maxItems"] == at_most
    assert "$ref" not in json.dumps(schema)


@given(conventions, sizes)
def test_a_reply_on_the_schema_is_read_without_a_repair(convention, size):
    asked = Conversation(coordinates=convention)
    reply = reply_of(asked, size)

    jsonschema.validate(reply, asked.schema(size))
    critique = asked.read(json.dumps(reply), size=size)

    assert critique.repairs == ()
    assert critique.summary == "fine"
    (only,) = critique.suggestions
    assert (only.prompt, only.reason) == ("a lit window", "dark")
    tolerance = 0.13 if convention.order == "points" else 0.02
    assert only.box.center == pytest.approx((0.5, 0.5), abs=0.02)
    assert only.box.left == pytest.approx(0.25, abs=tolerance)


@pytest.mark.parametrize(
    "broken",
    [
        {"extra": 1},
        {"suggestions": [{}]},
        {"suggestions": [{"reason": "", "box": [0, 0, 1, 1], "prompt": ""}]},
        {"suggestions": None},
        {"summary": 7},
    ],
    ids=["more", "an empty suggestion", "an empty prompt", "no listing", "a number for words"],
)
def test_a_reply_off_the_schema_is_told(broken):
    asked = Conversation()
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(reply_of(asked, (640, 480), **broken), asked.schema((640, 480)))


@pytest.mark.parametrize(
    ("family", "numbers"),
    [
        ("qwen3_vl", [0, 0, 1001, 1000]),
        ("qwen3_vl", [0, 0, 10.5, 20]),
        ("qwen3_vl", [0, 0, 10]),
        ("qwen2_5_vl", [0, 0, 645, 480]),
        ("llava", [0, 0, 1.5, 1]),
        ("molmo", [50, 50, 60, 60]),
        ("gemma3", [-1, 0, 10, 10]),
    ],
)
def test_numbers_off_the_convention_are_told(family, numbers):
    asked = Conversation(coordinates=coordinates_for(family))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(reply_of(asked, (640, 480), numbers=numbers), asked.schema((640, 480)))


def test_no_more_is_read_than_was_asked_for():
    asked = Conversation(coordinates=Coordinates("thousandths"), max_suggestions=2)
    reply = reply_of(asked, (640, 480))
    reply["suggestions"] *= 5
    critique = asked.read(json.dumps(reply), size=(640, 480))
    assert len(critique.suggestions) == 2
    assert critique.repairs == ("read the first 2 of 5 suggestions",)
