import builtins
import json
import logging
import sys

import jsonschema
import pytest
import torch
import transformers
from PIL import Image

import artaug as aa
from artaug.critics import Conversation, Coordinates, VLMCritic
from artaug.critics.conversation import Message
from artaug.critics.dialogue import Question
from artaug.testing import check_critic
from support.tiny_llava import reply, tiny_idefics3, tiny_llava

SHORT = Conversation(system="", answer="{prompt}", max_suggestions=1)
TWO_STAGES = Conversation(system="", analyse="{prompt}", answer="Now.", max_suggestions=1)
RED = Image.new("RGB", (64, 48), "red")


@pytest.fixture(autouse=True)
def _quiet_transformers():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def critic(make=tiny_llava, *, conversation=SHORT, constrained=True, max_new_tokens=130, batch_size=25, **kwargs):
    model, processor = make(**kwargs)
    return VLMCritic(
        model=model,
        processor=processor,
        conversation=conversation,
        constrained=constrained,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )


def pictures(count):
    return [Image.new("RGB", (48 + 8 * (number % 5), 64), (number * 7 % 256, 99, number)) for number in range(count)]


def questions(asked, count):
    return [
        Question((Message("user", f"picture {number} " * (1 + number % 3), image),), asked.schema(image.size))
        for number, image in enumerate(pictures(count))
    ]


@pytest.mark.parametrize("make", [tiny_llava, tiny_idefics3])
def test_random_weights_keep_to_the_schema_in_200_of_200_replies(make):
    kept = 0
    for seed, unit in enumerate(["thousandths", "relative", "pixels", "percent"]):
        asked = Conversation(coordinates=Coordinates(unit), max_suggestions=2)
        one = critic(make, conversation=asked, seed=seed)
        put = questions(asked, 25)
        for question, said in zip(put, one._ask(put), strict=True):  # noqa: SLF001 - the raw replies
            jsonschema.validate(json.loads(said.text), question.schema)
            assert isinstance(asked.read(said.text, size=(64, 64)), aa.Critique | aa.Abstention)
            kept += 1
    assert kept == 100  # and as many of the other architecture


def test_a_critique_comes_out_of_what_the_model_says():
    said = critic(saying=reply(), constrained=False).critique(RED, "a wall")
    assert said == aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a sunlit window", "dark"),), "dull")


def test_free_prose_is_an_abstention_that_quotes_it():
    assert critic(saying="It is a fine wall.", constrained=False).critique(RED, "a wall") == aa.Abstention(
        "the reply holds no suggestions: 'It is a fine wall.'"
    )


def test_a_batch_says_what_its_pictures_get_alone_in_their_order():
    one = critic(max_new_tokens=110, batch_size=3)
    prompts = ["short", "quite a lot longer than short", "middling", "s", "the longest of all that are here by far"]
    together = one.critique_batch(pictures(5), prompts)
    assert together == [one.critique(image, prompt) for image, prompt in zip(pictures(5), prompts, strict=True)]
    assert len(set(together)) > 1
    assert together == one.critique_batch(pictures(5), prompts)


def test_the_model_is_shown_what_is_alike_in_length_together_and_longest_first(monkeypatch):
    one, seen = critic(batch_size=2), []
    plain = VLMCritic._reply  # noqa: SLF001 - what goes through the model together
    monkeypatch.setattr(
        VLMCritic,
        "_reply",
        lambda self, asked: seen.append([one.messages[0].text for one in asked]) or plain(self, asked),
    )
    one.critique_batch([RED] * 4, ["aa", "aaaaaaaa", "a", "aaaaaa"])
    assert seen == [["aaaaaaaa", "aaaaaa"], ["aa", "a"]]


def test_in_two_stages_the_model_thinks_freely_first_and_is_held_to_the_schema_then(monkeypatch):
    said, plain = [], VLMCritic._ask  # noqa: SLF001 - what the model is asked is what this is about
    monkeypatch.setattr(VLMCritic, "_ask", lambda self, put: said.append((put, plain(self, put))) or said[-1][1])
    one = critic(conversation=TWO_STAGES)
    assert isinstance(one.critique(RED, "a wall"), aa.Critique)
    ((first,), (thought,)), ((second,), (concluded,)) = said
    assert first.schema is None
    assert [message.role for message in second.messages] == ["user", "assistant", "user"]
    assert second.messages[2].text == "Now."
    jsonschema.validate(json.loads(concluded.text), second.schema)
    with pytest.raises(ValueError, match=r"Expecting|Extra"):
        json.loads(thought.text)


def test_the_critic_keeps_the_promises_of_its_seam():
    check_critic(critic(max_new_tokens=100))


def test_a_free_reply_that_is_cut_says_so():
    said = critic(constrained=False, max_new_tokens=3).critique(RED, "a wall")
    assert isinstance(said, aa.Abstention)
    assert said.reason.endswith("the reply was cut at 3 tokens")


def test_global_randomness_and_the_model_are_left_alone():
    one = critic(max_new_tokens=100)
    state, config = torch.random.get_rng_state(), one.model.generation_config.to_dict()
    one.critique(RED, "a wall")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.model.generation_config.to_dict() == config


def test_a_checkpoint_that_would_sample_is_read_greedily_without_a_warning(caplog):
    model, processor = tiny_llava()
    model.generation_config.do_sample, model.generation_config.temperature = True, 1e-6
    one = VLMCritic(model=model, processor=processor, conversation=SHORT, max_new_tokens=100)
    with caplog.at_level(logging.WARNING):
        assert one.critique(RED, "a wall") == one.critique(RED, "a wall")
    assert not caplog.records


@pytest.mark.parametrize("image", [Image.new("RGB", (0, 4)), Image.new("F", (9, 9)), Image.new("RGB", (900, 2))])
def test_a_picture_that_cannot_be_shown_is_an_abstention(image):
    assert isinstance(critic().critique(image, "a wall"), aa.Abstention)


def test_the_repr_tells_models_and_conversations_apart_and_not_the_manners():
    one = critic(conversation=SHORT)
    assert " at 0x" not in repr(one)
    assert repr(one) != repr(critic(conversation=TWO_STAGES))
    assert repr(one) == repr(critic(conversation=SHORT, batch_size=1))


# --- loading ---------------------------------------------------------------------------------------------------------


def saved(make, folder):
    model, processor = make()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_a_known_family_brings_its_convention_fitted_to_the_processor(tmp_path):
    one = VLMCritic.from_pretrained(saved(tiny_llava, tmp_path), dtype=torch.bfloat16, attn_implementation="eager")
    assert one.conversation.coordinates == Coordinates("relative", frame="cropped")
    assert one.model.dtype is torch.bfloat16
    assert one.model.config._attn_implementation == "eager"  # noqa: SLF001 - transformers has no other way to ask
    assert one.name == str(tmp_path)
    assert one.conversation.system_role


def test_an_unknown_family_asks_for_its_convention_before_weights_are_read(tmp_path):
    source = saved(tiny_idefics3, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(aa.InvalidValueError, match=r"box convention of 'idefics3' is not known.*pass coordinates="):
        VLMCritic.from_pretrained(source)


def test_an_unknown_family_loads_with_a_convention_of_its_owner(tmp_path):
    one = VLMCritic.from_pretrained(
        saved(tiny_idefics3, tmp_path), coordinates=Coordinates("relative"), analyse_first=True, max_new_tokens=100
    )
    assert one.conversation.coordinates == Coordinates("relative")
    assert one.conversation.stages == 2


def test_what_is_no_model_says_what_was_expected(tmp_path):
    with pytest.raises(aa.ModelError, match=r"could not be loaded.*image-text-to-text model"):
        VLMCritic.from_pretrained(str(tmp_path))


def test_without_llguidance_the_extra_is_named_before_anything_is_loaded(monkeypatch, tmp_path):
    plain = builtins.__import__

    def without(name, *rest):
        if name.startswith("llguidance"):
            raise ImportError(name)
        return plain(name, *rest)

    monkeypatch.delitem(sys.modules, "llguidance", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(aa.MissingExtraError, match=r'constrained=True.*llguidance.*pip install "artaug\[vlm\]"'):
        VLMCritic.from_pretrained(str(tmp_path))


def test_a_template_without_system_role_is_noticed(tmp_path):
    source = saved(tiny_llava, tmp_path)
    template = tmp_path / "chat_template.jinja"
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template.write_text(refusing + template.read_text(encoding="utf-8"), encoding="utf-8")
    assert not VLMCritic.from_pretrained(source).conversation.system_role


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "need at least 1 of each"),
        ({"max_new_tokens": 20}, r"max_new_tokens=20 cannot hold a reply with one suggestion: need at least \d+"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(wrong, message):
    with pytest.raises(aa.InvalidValueError, match=message):
        critic(**wrong)


def test_a_model_in_training_mode_is_refused():
    model, processor = tiny_llava()
    with pytest.raises(aa.ModelError, match=r"training mode.*\.eval\(\)"):
        VLMCritic(model=model.train(), processor=processor, conversation=SHORT)


def test_a_processor_that_cannot_chat_is_refused():
    model, processor = tiny_llava()
    processor.chat_template = None
    with pytest.raises(aa.ModelError, match="has no chat template"):
        VLMCritic(model=model, processor=processor, conversation=SHORT)


def test_the_probe_of_a_model_that_sees_nothing_finds_nothing():
    found = critic(constrained=False, max_new_tokens=8).probe()
    assert not found.found
    assert not found.fits
    assert "No convention fits" in str(found)
