"""The path of a multimodal critic, from JSON to plans and attempts, with a model whose answers are known."""

from dataclasses import dataclass

import pytest
import torch
from PIL import Image

import artaug as aa
from artaug import playground
from artaug._internal.values import to_json
from artaug.critics import Conversation, Coordinates, PhotometricCritic
from artaug.critics.dialogue import MAX_CAPTION_CHARS, Reply, run_dialogue
from artaug.testing import FixedFilter, check_critic

UNITS = ["relative", "thousandths", "pixels", "percent"]
RED = Image.new("RGB", (64, 48), "red")


@dataclass(frozen=True)
class ScriptedCritic(aa.Critic):
    """A multimodal critic whose model sees what `PhotometricCritic` measures, and says it in JSON."""

    conversation: Conversation

    def critique(self, image, prompt):
        return self.critique_batch([image], [prompt])[0]

    def critique_batch(self, images, prompts):
        return run_dialogue(self.conversation, images, prompts, ask=lambda asked: [self._say(one) for one in asked])

    def _say(self, question):
        if question.schema is None:
            return Reply("Some of it is dull.")
        opening = next(message for message in question.messages if message.image)
        prompt = opening.text.split("----\n")[1].strip()
        seen = PhotometricCritic().critique(opening.image, prompt)
        if isinstance(seen, aa.Abstention):
            return seen
        written = [
            {
                "reason": one.reason,
                self.conversation.coordinates.key: self.conversation.coordinates.write(
                    one.box, size=opening.image.size
                ),
                "prompt": one.prompt,
            }
            for one in seen.suggestions
        ]
        return Reply(f"```json\n{to_json({'summary': seen.summary, 'suggestions': written})}\n```")


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
def test_the_loop_ends_alike_whether_the_advice_came_as_numbers_or_as_json(two_stages):
    prompts = playground.prompts(4, seed=0)
    begin = Conversation.in_two_stages if two_stages else Conversation
    scripted = ScriptedCritic(begin(coordinates=Coordinates("thousandths"), max_suggestions=8))
    measured, spoken = attempts(PhotometricCritic(), prompts), attempts(scripted, prompts)
    assert [type(one) for one in measured] == [type(one) for one in spoken] == [aa.Kept] * 4
    for one, other in zip(measured, spoken, strict=True):
        assert other.pair.plan.prompt == one.pair.plan.prompt
        assert other.pair.before.tobytes() == one.pair.before.tobytes()
        assert other.pair.after.tobytes() == one.pair.after.tobytes()
        assert [region.prompt for region in other.pair.plan.regions] == [
            region.prompt for region in one.pair.plan.regions
        ]
        for region, other_region in zip(one.pair.plan.regions, other.pair.plan.regions, strict=True):
            assert other_region.area.iou(region.area) > 0.999


def test_the_same_lora_is_learnt_from_either():
    def learnt(critic):
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

    spoken = learnt(ScriptedCritic(Conversation(max_suggestions=8)))
    measured = learnt(PhotometricCritic())
    assert spoken.layers.keys() == measured.layers.keys()
    assert all(torch.equal(layer.delta(), measured.layers[name].delta()) for name, layer in spoken.layers.items())
    assert any(layer.delta().any() for layer in spoken.layers.values())


@pytest.mark.parametrize("unit", UNITS)
def test_every_unit_gives_the_same_plans(unit):
    prompt = playground.prompts(1, seed=3)[0]
    image = playground.synthesizer(steps=2).synthesize(aa.Plan(prompt), seed=0)
    asked = Conversation(coordinates=Coordinates(unit), max_suggestions=8)
    planner = aa.GreedyPlanner()
    spoken = planner.plan(prompt, ScriptedCritic(asked).critique(image, prompt))
    measured = planner.plan(prompt, PhotometricCritic().critique(image, prompt))
    assert [region.prompt for region in spoken.regions] == [region.prompt for region in measured.regions]
    for one, other in zip(spoken.regions, measured.regions, strict=True):
        assert one.area.iou(other.area) > 0.999


def test_the_scripted_critic_keeps_the_promises_of_its_seam():
    check_critic(ScriptedCritic(Conversation()))


def test_a_long_prompt_is_cut_and_the_critique_says_so():
    told = []
    answers = run_dialogue(
        Conversation(),
        [RED],
        ["x" * 2001],
        ask=lambda asked: told.extend(asked) or [Reply('{"summary": "fine", "suggestions": []}', ("so it was",))],
    )
    assert "x" * MAX_CAPTION_CHARS in told[0].messages[-1].text
    assert "x" * (MAX_CAPTION_CHARS + 1) not in told[0].messages[-1].text
    said = f"told the model the first {MAX_CAPTION_CHARS:,} of 2,001 characters of the prompt"
    assert answers == [aa.Critique((), "fine", (said, "so it was"))]


def test_remarks_on_a_reply_that_says_nothing_go_into_the_reason():
    (answer,) = run_dialogue(
        Conversation(), [RED], ["a"], ask=lambda asked: [Reply("hm", ("it was cut",))] * len(asked)
    )
    assert answer == aa.Abstention("the reply holds no suggestions: 'hm'; it was cut")


def test_a_fault_in_the_first_stage_ends_that_picture_and_no_other():
    stages = []

    def ask(asked):
        stages.append(len(asked))
        if len(stages) == 1:
            return [aa.Abstention("gone"), Reply("dark")]
        return [Reply('{"summary": "", "suggestions": []}')]

    asked = Conversation.in_two_stages(coordinates=Coordinates("thousandths"))
    answers = run_dialogue(asked, [RED, RED], ["a", "b"], ask=ask)
    assert stages == [2, 1]
    assert answers == [aa.Abstention("gone"), aa.Critique()]


def test_pictures_that_cannot_be_shown_are_not_asked_about():
    def ask(_):
        raise AssertionError

    (answer,) = run_dialogue(Conversation(), [Image.new("F", (8, 8))], ["a"], ask=ask)
    assert isinstance(answer, aa.Abstention)
    assert "mode 'F'" in answer.reason
