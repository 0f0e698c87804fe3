"""The dialogue with a multimodal model, from its JSON to plans and attempts, with a model whose replies are known."""

from dataclasses import dataclass

import pytest
import torch
from PIL import Image

import artaug as aa
from artaug import playground
from artaug._internal.values import to_json
from artaug.critics import Conversation, Coordinates, PhotometricCritic
from artaug.critics.dialogue import MAX_ANALYSIS_CHARS, MAX_CAPTION_CHARS, stream_dialogues
from artaug.critique import StreamingCritic
from artaug.serving.chat import ChatReply
from artaug.testing import FixedFilter, check_critic

UNITS = ["relative", "thousandths", "pixels", "percent"]
RED = Image.new("RGB", (64, 48), "red")


@dataclass(frozen=True)
class ScriptedCritic(StreamingCritic):
    """A multimodal critic whose model measures what `PhotometricCritic` measures, and replies in JSON."""

    conversation: Conversation

    def critique_stream(self, images, prompts):
        return stream_dialogues(
            self.conversation, images, prompts, generate=lambda requests: enumerate(map(self._reply, requests))
        )

    def _reply(self, request):
        if request.schema is None:
            return ChatReply("Some of it is dull.")
        opening = next(message for message in request.messages if message.image)
        prompt = opening.text.split("----\n")[1].strip()
        answer = PhotometricCritic().critique(opening.image, prompt)
        if isinstance(answer, aa.Abstention):
            return answer
        coordinates = self.conversation.coordinates
        suggestions = [
            {
                "reason": suggestion.reason,
                coordinates.key: coordinates.encode(suggestion.box, size=opening.image.size),
                "prompt": suggestion.prompt,
            }
            for suggestion in answer.suggestions
        ]
        return ChatReply(f"```json\n{to_json({'summary': answer.summary, 'suggestions': suggestions})}\n```")


def run_dialogues(conversation, images, prompts, *, generate):
    """The answers in order, of a model whose replies come in the opposite order."""

    def backwards(requests):
        return reversed(list(enumerate(generate(requests))))

    answers = dict(stream_dialogues(conversation, images, prompts, generate=backwards))
    return [answers[index] for index in range(len(prompts))]


def attempts(critic, prompts):
    return list(
        aa.improve(
            prompts,
            synthesizer=playground.synthesizer(guide=aa.OutputMix(), steps=2),
            critic=critic,
            planner=aa.GreedyPlanner(),
            keep=FixedFilter(keep=True),
            seed=0,
        )
    )


@pytest.mark.parametrize("two_stages", [False, True])
def test_the_loop_ends_the_same_whether_the_critique_came_as_an_object_or_as_json(two_stages):
    prompts = playground.prompts(4, seed=0)
    make_conversation = Conversation.in_two_stages if two_stages else Conversation
    scripted = ScriptedCritic(make_conversation(coordinates=Coordinates("thousandths"), max_suggestions=8))
    direct, parsed = attempts(PhotometricCritic(), prompts), attempts(scripted, prompts)
    assert [type(attempt) for attempt in direct] == [type(attempt) for attempt in parsed] == [aa.Kept] * 4
    for expected, actual in zip(direct, parsed, strict=True):
        assert actual.pair.plan.prompt == expected.pair.plan.prompt
        assert actual.pair.before.tobytes() == expected.pair.before.tobytes()
        assert actual.pair.after.tobytes() == expected.pair.after.tobytes()
        assert [region.prompt for region in actual.pair.plan.regions] == [
            region.prompt for region in expected.pair.plan.regions
        ]
        for region, expected_region in zip(actual.pair.plan.regions, expected.pair.plan.regions, strict=True):
            assert region.area.iou(expected_region.area) > 0.999


def test_training_on_either_gives_the_same_lora():
    def trained_lora(critic):
        return aa.enhance(
            playground.prompts(2, seed=0),
            synthesizer=playground.synthesizer(guide=aa.OutputMix(), steps=2),
            critic=critic,
            planner=aa.GreedyPlanner(),
            keep=FixedFilter(keep=True),
            trainer=aa.DifferentialLoRATrainer(rank=2, steps=2, batch_size=1),
            rounds=1,
            progress=False,
        ).lora

    parsed = trained_lora(ScriptedCritic(Conversation(max_suggestions=8)))
    direct = trained_lora(PhotometricCritic())
    assert parsed.layers.keys() == direct.layers.keys()
    assert all(torch.equal(layer.delta(), direct.layers[name].delta()) for name, layer in parsed.layers.items())
    assert any(layer.delta().any() for layer in parsed.layers.values())


@pytest.mark.parametrize("unit", UNITS)
def test_every_unit_gives_the_same_plan(unit):
    prompt = playground.prompts(1, seed=3)[0]
    image = playground.synthesizer(steps=2).synthesize(aa.Plan(prompt), seed=0)
    conversation = Conversation(coordinates=Coordinates(unit), max_suggestions=8)
    planner = aa.GreedyPlanner()
    parsed = planner.plan(prompt, ScriptedCritic(conversation).critique(image, prompt))
    direct = planner.plan(prompt, PhotometricCritic().critique(image, prompt))
    assert [region.prompt for region in parsed.regions] == [region.prompt for region in direct.regions]
    for region, expected in zip(parsed.regions, direct.regions, strict=True):
        assert region.area.iou(expected.area) > 0.999


def test_the_scripted_critic_passes_check_critic():
    check_critic(ScriptedCritic(Conversation()))


def test_a_long_prompt_is_truncated_and_the_critique_notes_it():
    sent = []

    def generate(requests):
        sent.extend(requests)
        return [ChatReply('{"summary": "fine", "suggestions": []}', ("a note",))]

    answers = run_dialogues(Conversation(), [RED], ["x" * 2001], generate=generate)
    assert "x" * MAX_CAPTION_CHARS in sent[0].messages[-1].text
    assert "x" * (MAX_CAPTION_CHARS + 1) not in sent[0].messages[-1].text
    note = f"sent the model the first {MAX_CAPTION_CHARS:,} of 2,001 characters of the prompt"
    assert answers == [aa.Critique((), "fine", (note, "a note"))]


def test_a_prompt_of_the_greatest_length_is_sent_whole():
    (answer,) = run_dialogues(
        Conversation(),
        [RED],
        ["x" * MAX_CAPTION_CHARS],
        generate=lambda requests: [ChatReply('{"summary": "fine", "suggestions": []}')] * len(requests),
    )
    assert answer.repairs == ()


@pytest.mark.parametrize("excess", [0, 1, 10_000_000])
def test_of_a_long_analysis_a_bounded_part_is_sent_back_and_the_critique_notes_it(excess):
    sent = []

    def generate(requests):
        sent.extend(requests)
        if requests[0].schema is None:
            return [ChatReply("x" * (MAX_ANALYSIS_CHARS + excess))]
        return [ChatReply('{"summary": "fine", "suggestions": []}')]

    two_stages = Conversation.in_two_stages(coordinates=Coordinates("thousandths"))
    (answer,) = run_dialogues(two_stages, [RED], ["a pear"], generate=generate)
    (analysis,) = (message.text for message in sent[1].messages if message.role == "assistant")
    assert analysis == "x" * MAX_ANALYSIS_CHARS
    total = f"{MAX_ANALYSIS_CHARS + excess:,}"
    note = f"sent the model the first {MAX_ANALYSIS_CHARS:,} of {total} characters of its analysis"
    assert answer.repairs == ((note,) if excess else ())


def test_notes_on_a_reply_without_suggestions_go_into_the_reason():
    (answer,) = run_dialogues(
        Conversation(), [RED], ["a"], generate=lambda requests: [ChatReply("hm", ("it was cut",))] * len(requests)
    )
    assert answer == aa.Abstention("the reply holds no suggestions: 'hm'; it was cut")


def test_a_failure_in_the_first_stage_ends_only_the_dialogue_about_that_picture():
    batch_sizes = []

    def generate(requests):
        batch_sizes.append(len(requests))
        if len(batch_sizes) == 1:
            return [aa.Abstention("gone"), ChatReply("dark")]
        return [ChatReply('{"summary": "", "suggestions": []}')]

    conversation = Conversation.in_two_stages(coordinates=Coordinates("thousandths"))
    answers = run_dialogues(conversation, [RED, RED], ["a", "b"], generate=generate)
    assert batch_sizes == [2, 1]
    assert answers == [aa.Abstention("gone"), aa.Critique()]


def test_each_answer_is_given_before_the_next_reply_comes_and_before_a_failure():
    events = []

    def generate(_requests):
        for index in (2, 0):
            events.append(f"reply {index}")
            yield index, ChatReply('{"summary": "", "suggestions": []}')
        raise KeyError("boxes")

    def listen():
        for index, _ in stream_dialogues(Conversation(), [RED] * 3, ["a", "b", "c"], generate=generate):
            events.append(f"answer {index}")

    with pytest.raises(KeyError):
        listen()
    assert events == ["reply 2", "answer 2", "reply 0", "answer 0"]


def test_no_request_is_sent_for_a_picture_that_cannot_be_shown():
    def generate(_):
        raise AssertionError

    (answer,) = run_dialogues(Conversation(), [Image.new("F", (8, 8))], ["a"], generate=generate)
    assert isinstance(answer, aa.Abstention)
    assert "mode 'F'" in answer.reason
