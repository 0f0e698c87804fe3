"""The messages that are sent to a model, and the schema of its reply."""

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
    written = [round(edge) if edge > 1 else edge for edge in conversation.coordinates.encode(box, size=size)]
    suggestion = {"reason": "dark", conversation.coordinates.key: numbers or written, "prompt": "a lit window"}
    return {"summary": "fine", "suggestions": [suggestion], **changes}


# --- messages --------------------------------------------------------------------------------------------------------


def test_one_stage_shows_the_picture_and_asks_once():
    conversation = Conversation()

    system, user = conversation.messages(PICTURE, "a pear")

    assert (system.role, system.image, user.role, user.image) == ("system", None, "user", PICTURE)
    assert system.text == prompt_text("art-director-1-system")
    assert "----\na pear\n----" in user.text
    assert json.dumps(conversation.schema(PICTURE.size)) in user.text
    assert '"box": [left, top, right, bottom], tight around what should change' in user.text
    assert "at most 4 regions" in user.text
    assert conversation.stages == 1


def test_two_stages_ask_for_an_analysis_and_show_the_picture_once():
    conversation = Conversation.in_two_stages(coordinates=coordinates_for("qwen2_5_vl"), max_suggestions=3)

    opening = conversation.messages(PICTURE, "a pear")
    second = conversation.messages(PICTURE, "a pear", analysis="It is dark.")

    assert conversation.stages == 2
    assert second[: len(opening)] == opening
    assert [message.role for message in second] == ["system", "user", "assistant", "user"]
    assert "think aloud" in opening[1].text
    assert "JSON" not in opening[1].text
    assert second[2].text == "It is dark."
    assert "644 wide and 476 high" in second[3].text
    assert [message.image is not None for message in second] == [False, True, False, False]


def test_without_a_system_role_the_first_user_message_begins_with_the_system_prompt():
    (user,) = Conversation(system_role=False).messages(PICTURE, "a pear")
    assert user.role == "user"
    assert user.text.startswith(prompt_text("art-director-1-system"))


def test_the_system_prompt_may_be_empty():
    (user,) = Conversation(system_prompt="").messages(PICTURE, "a pear")
    assert not user.text.startswith("You are")


def test_custom_prompts_replace_those_of_the_package():
    conversation = Conversation(
        system_prompt="", answer_prompt="Improve {prompt} in {max_suggestions} places: {coordinates}. {schema}"
    )
    (user,) = conversation.messages(PICTURE, "a pear")
    assert user.text.startswith('Improve a pear in 4 places: "box": [left')


@given(prompts)
def test_placeholders_inside_a_picture_prompt_are_not_filled(prompt):
    (user,) = Conversation(system_prompt="", answer_prompt="<{prompt}>").messages(PICTURE, prompt + "{schema} {prompt}")
    assert user.text == f"<{prompt.replace('<', chr(0x2039)).replace('>', chr(0x203A))}{{schema}} {{prompt}}>"


@pytest.mark.parametrize("mark", ["<image>", "<|im_end|>", "<|image_pad|>", "<start_of_image>", "[INST]", "[/INST]"])
def test_tokens_of_a_chat_template_are_escaped(mark):
    conversation = Conversation.in_two_stages(coordinates=coordinates_for("llava"))
    messages = conversation.messages(PICTURE, f"a pear {mark}", analysis=f"It is {mark} dark.")
    assert not any(mark in message.text for message in messages)


def test_an_analysis_in_a_conversation_of_one_stage_is_refused():
    with pytest.raises(aa.InvalidValueError, match="has one stage and takes no analysis"):
        Conversation().messages(PICTURE, "a pear", analysis="It is dark.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_suggestions": 0}, "need at least 1"),
        ({"answer_prompt": "{prompt} {schemas}"}, r"unknown placeholders \{schemas\}: need some of \{prompt\}"),
        ({"answer_prompt": "Be an art director."}, r"no prompt of a Conversation has the placeholder \{prompt\}"),
    ],
)
def test_a_conversation_that_cannot_work_is_refused(options, message):
    with pytest.raises(aa.InvalidValueError, match=message):
        Conversation(**options)


def test_braces_of_json_are_not_placeholders():
    conversation = Conversation(system_prompt="", answer_prompt='{prompt}: answer like {"suggestions": []}')
    assert conversation.messages(PICTURE, "a pear")[0].text == 'a pear: answer like {"suggestions": []}'


def test_an_unknown_prompt_name_is_refused():
    with pytest.raises(
        aa.InvalidValueError, match="no prompt called 'art-director-9'; there are art-director-1-analyse"
    ):
        prompt_text("art-director-9")


@pytest.mark.parametrize("name", ["system", "answer", "analyse", "conclude"])
def test_the_prompts_of_the_package_are_complete(name):
    text = prompt_text(f"art-director-1-{name}")
    assert text == text.strip()
    assert len(text) > 200


def test_different_conversations_have_different_reprs():
    assert repr(Conversation()) == repr(Conversation())
    assert repr(Conversation()) != repr(Conversation(answer_prompt="{prompt}?"))


# --- the schema ------------------------------------------------------------------------------------------------------


@given(conventions, sizes, st.integers(1, 9))
def test_the_schema_is_strict(convention, size, max_suggestions):
    schema = Conversation(coordinates=convention, max_suggestions=max_suggestions).schema(size)

    jsonschema.Draft202012Validator.check_schema(schema)
    objects = list(all_objects(schema))
    assert len(objects) == 2
    for schema_object in objects:
        assert schema_object["additionalProperties"] is False
        assert schema_object["required"] == list(schema_object["properties"])
    assert schema["properties"]["suggestions"]["maxItems"] == max_suggestions
    assert "$ref" not in json.dumps(schema)


@given(conventions, sizes)
def test_a_reply_on_the_schema_is_parsed_without_a_repair(convention, size):
    conversation = Conversation(coordinates=convention)
    reply = reply_of(conversation, size)

    jsonschema.validate(reply, conversation.schema(size))
    critique = conversation.parse(json.dumps(reply), size=size)

    assert critique.repairs == ()
    assert critique.summary == "fine"
    (suggestion,) = critique.suggestions
    assert (suggestion.prompt, suggestion.reason) == ("a lit window", "dark")
    tolerance = 0.13 if convention.order == "points" else 0.02
    assert suggestion.box.center == pytest.approx((0.5, 0.5), abs=0.02)
    assert suggestion.box.left == pytest.approx(0.25, abs=tolerance)


@pytest.mark.parametrize(
    "broken",
    [
        {"extra": 1},
        {"suggestions": [{}]},
        {"suggestions": [{"reason": "", "box": [0, 0, 1, 1], "prompt": ""}]},
        {"suggestions": None},
        {"summary": 7},
    ],
    ids=["extra key", "empty suggestion", "empty prompt", "null for a list", "number for a string"],
)
def test_the_schema_rejects_another_structure(broken):
    conversation = Conversation()
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(reply_of(conversation, (640, 480), **broken), conversation.schema((640, 480)))


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
def test_the_schema_rejects_numbers_outside_the_convention(family, numbers):
    conversation = Conversation(coordinates=coordinates_for(family))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(reply_of(conversation, (640, 480), numbers=numbers), conversation.schema((640, 480)))


def test_more_suggestions_than_requested_are_ignored():
    conversation = Conversation(coordinates=Coordinates("thousandths"), max_suggestions=2)
    reply = reply_of(conversation, (640, 480))
    reply["suggestions"] *= 5
    critique = conversation.parse(json.dumps(reply), size=(640, 480))
    assert len(critique.suggestions) == 2
    assert critique.repairs == ("read the first 2 of 5 suggestions",)
