"""VLMCritic: replies of tiny real models, batches, constrained decoding, and loading."""

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
from artaug.critique import stream_critic
from artaug.serving.chat import ChatRequest, Message
from artaug.testing import check_critic
from support.tiny_llava import suggestion_json, tiny_idefics3, tiny_llava

SHORT = Conversation(system_prompt="", answer_prompt="{prompt}", max_suggestions=1)
TWO_STAGES = Conversation(system_prompt="", analysis_prompt="{prompt}", answer_prompt="Now.", max_suggestions=1)
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


def requests(conversation, count):
    return [
        ChatRequest((Message("user", f"picture {number} " * (1 + number % 3), image),), conversation.schema(image.size))
        for number, image in enumerate(pictures(count))
    ]


@pytest.mark.parametrize("make", [tiny_llava, tiny_idefics3])
def test_random_weights_reply_on_the_schema_in_200_of_200_cases(make):
    valid = 0
    for seed, unit in enumerate(["thousandths", "relative", "pixels", "percent"]):
        conversation = Conversation(coordinates=Coordinates(unit), max_suggestions=2)
        vlm = critic(make, conversation=conversation, seed=seed)
        batch = requests(conversation, 25)
        for index, reply in vlm._generate(batch):  # noqa: SLF001 - the raw replies
            jsonschema.validate(json.loads(reply.text), batch[index].schema)
            assert isinstance(conversation.parse(reply.text, size=(64, 64)), aa.Critique | aa.Abstention)
            valid += 1
    assert valid == 100  # and as many of the other architecture


def test_the_models_reply_becomes_a_critique():
    answer = critic(fixed_reply=suggestion_json(), constrained=False).critique(RED, "a wall")
    assert answer == aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a sunlit window", "dark"),), "dull")


def test_free_prose_is_an_abstention_that_quotes_it():
    assert critic(fixed_reply="It is a fine wall.", constrained=False).critique(RED, "a wall") == aa.Abstention(
        "the reply holds no suggestions: 'It is a fine wall.'"
    )


def test_a_batch_gives_the_answers_of_its_pictures_alone_in_order():
    vlm = critic(max_new_tokens=110, batch_size=3)
    prompts = ["short", "quite a lot longer than short", "middling", "s", "the longest of all that are here by far"]
    together = vlm.critique_batch(pictures(5), prompts)
    assert together == [vlm.critique(image, prompt) for image, prompt in zip(pictures(5), prompts, strict=True)]
    assert len(set(together)) > 1
    assert together == vlm.critique_batch(pictures(5), prompts)


def test_requests_of_similar_length_share_a_batch_and_the_longest_come_first(monkeypatch):
    vlm, batches = critic(batch_size=2), []
    original = VLMCritic._generate_batch  # noqa: SLF001 - the batches show nowhere else

    def recorded(self, requests):
        batches.append([request.messages[0].text for request in requests])
        return original(self, requests)

    monkeypatch.setattr(VLMCritic, "_generate_batch", recorded)
    vlm.critique_batch([RED] * 4, ["aa", "aaaaaaaa", "a", "aaaaaa"])
    assert batches == [["aaaaaaaa", "aaaaaa"], ["aa", "a"]]


def test_each_batch_gives_its_answers_before_the_next_begins_and_before_one_fails(monkeypatch):
    vlm, events = critic(batch_size=2), []
    original = VLMCritic._generate_batch  # noqa: SLF001 - the batches show nowhere else

    def failing_later(self, requests):
        events.append("batch")
        if len(events) > 5:
            raise KeyError("pixel_values")
        return original(self, requests)

    monkeypatch.setattr(VLMCritic, "_generate_batch", failing_later)
    with pytest.raises(aa.CriticError, match="VLMCritic raised KeyError"):
        events.extend(
            index for index, _ in stream_critic(vlm, [RED] * 6, ["a" * length for length in (5, 2, 9, 7, 1, 1)])
        )
    assert events == ["batch", 2, 3, "batch", 0, 1, "batch"]


def test_a_batch_that_does_not_fit_is_halved_for_good_and_the_answers_are_the_same(monkeypatch, caplog):
    prompts = ["aa", "aaaaaaaa", "a", "aaaaaa"]
    expected = critic(batch_size=4).critique_batch([RED] * 4, prompts)
    sizes, original = [], VLMCritic._generate_batch  # noqa: SLF001 - the batches show nowhere else

    def limited(self, requests):
        sizes.append(len(requests))
        if len(requests) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, requests)

    monkeypatch.setattr(VLMCritic, "_generate_batch", limited)
    vlm = critic(batch_size=4)
    assert [vlm.critique_batch([RED] * 4, prompts) for _ in range(2)] == [expected, expected]
    assert sizes == [4, 2, 2, 2, 2]
    assert (
        sum("VLMCritic ran out of memory at 4 pictures together" in record.getMessage() for record in caplog.records)
        == 1
    )


def test_the_first_of_two_stages_is_free_text_and_the_second_is_constrained(monkeypatch):
    stages, original = [], VLMCritic._generate  # noqa: SLF001 - the requests show nowhere else

    def recorded(self, requests):
        replies = list(original(self, requests))
        stages.append((requests, replies))
        return replies

    monkeypatch.setattr(VLMCritic, "_generate", recorded)
    vlm = critic(conversation=TWO_STAGES)
    assert isinstance(vlm.critique(RED, "a wall"), aa.Critique)
    ((first,), ((_, analysis),)), ((second,), ((_, reply),)) = stages
    assert first.schema is None
    assert [message.role for message in second.messages] == ["user", "assistant", "user"]
    assert second.messages[2].text == "Now."
    jsonschema.validate(json.loads(reply.text), second.schema)
    with pytest.raises(ValueError, match=r"Expecting|Extra"):
        json.loads(analysis.text)


def test_it_passes_check_critic():
    check_critic(critic(max_new_tokens=100))


def test_a_free_reply_cut_at_the_token_limit_is_noted():
    answer = critic(constrained=False, max_new_tokens=3).critique(RED, "a wall")
    assert isinstance(answer, aa.Abstention)
    assert answer.reason.endswith("the reply was cut at 3 tokens")


def test_the_global_random_state_and_the_model_are_unchanged():
    vlm = critic(max_new_tokens=100)
    state, config = torch.random.get_rng_state(), vlm.model.generation_config.to_dict()
    vlm.critique(RED, "a wall")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert vlm.model.generation_config.to_dict() == config


def test_a_checkpoint_configured_to_sample_is_decoded_greedily_without_a_warning(caplog):
    model, processor = tiny_llava()
    model.generation_config.do_sample, model.generation_config.temperature = True, 1e-6
    vlm = VLMCritic(model=model, processor=processor, conversation=SHORT, max_new_tokens=100)
    with caplog.at_level(logging.WARNING):
        assert vlm.critique(RED, "a wall") == vlm.critique(RED, "a wall")
    assert not caplog.records


@pytest.mark.parametrize("image", [Image.new("RGB", (0, 4)), Image.new("F", (9, 9)), Image.new("RGB", (900, 2))])
def test_a_picture_that_cannot_be_shown_is_an_abstention(image):
    assert isinstance(critic().critique(image, "a wall"), aa.Abstention)


def test_the_repr_differs_by_model_and_conversation_and_not_by_batch_size():
    vlm = critic(conversation=SHORT)
    assert " at 0x" not in repr(vlm)
    assert repr(vlm) != repr(critic(conversation=TWO_STAGES))
    assert repr(vlm) == repr(critic(conversation=SHORT, batch_size=1))


# --- loading ---------------------------------------------------------------------------------------------------------


def saved(make, folder):
    model, processor = make()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_a_known_family_sets_the_convention_fitted_to_the_processor(tmp_path):
    vlm = VLMCritic.from_pretrained(saved(tiny_llava, tmp_path), dtype=torch.bfloat16, attn_implementation="eager")
    assert vlm.conversation.coordinates == Coordinates("relative", frame="cropped")
    assert vlm.model.dtype is torch.bfloat16
    assert vlm.model.config._attn_implementation == "eager"  # noqa: SLF001 - transformers has no other way to ask
    assert vlm.name == str(tmp_path)
    assert vlm.conversation.system_role


@pytest.mark.parametrize(
    ("stored", "loaded"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)], ids=str
)
def test_a_model_keeps_the_precision_of_its_checkpoint(tmp_path, stored, loaded):
    folder = saved(lambda: (tiny_llava()[0].to(stored), tiny_llava()[1]), tmp_path)
    assert VLMCritic.from_pretrained(folder, device="cpu").model.dtype is loaded


def test_an_unknown_family_needs_a_convention_before_weights_are_read(tmp_path):
    source = saved(tiny_idefics3, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(aa.InvalidValueError, match=r"box convention of 'idefics3' is not known.*pass coordinates="):
        VLMCritic.from_pretrained(source)


def test_an_unknown_family_loads_with_a_given_convention(tmp_path):
    vlm = VLMCritic.from_pretrained(
        saved(tiny_idefics3, tmp_path), coordinates=Coordinates("relative"), analyze_first=True, max_new_tokens=100
    )
    assert vlm.conversation.coordinates == Coordinates("relative")
    assert vlm.conversation.stages == 2


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(aa.ModelError, match=r"could not be loaded.*image-text-to-text model"):
        VLMCritic.from_pretrained(str(tmp_path))


def test_without_llguidance_the_extra_is_named_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "llguidance", None)
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
def test_invalid_options_are_refused_at_construction(wrong, message):
    with pytest.raises(aa.InvalidValueError, match=message):
        critic(**wrong)


def test_a_model_in_training_mode_is_refused():
    model, processor = tiny_llava()
    with pytest.raises(aa.ModelError, match=r"training mode.*\.eval\(\)"):
        VLMCritic(model=model.train(), processor=processor, conversation=SHORT)


def test_a_processor_without_chat_template_is_refused():
    model, processor = tiny_llava()
    processor.chat_template = None
    with pytest.raises(aa.ModelError, match="has no chat template"):
        VLMCritic(model=model, processor=processor, conversation=SHORT)


def test_the_probe_of_random_weights_is_inconclusive():
    result = critic(constrained=False, max_new_tokens=8).probe()
    assert not result.conclusive
    assert not result.fits
    assert "No convention fits" in str(result)
