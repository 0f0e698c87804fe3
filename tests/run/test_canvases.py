"""Runs that redraw from the picture: canvases go through the loop, into stores and resumes, and into a training."""

from dataclasses import dataclass, replace

import pytest
from diffusers import FluxKontextPipeline
from PIL import Image

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer, EditingSynthesizer
from artaug.testing import FixedCritic, FixedFilter, SwatchSynthesizer
from support.tiny_flux import tiny_flux
from support.tiny_qwen_image import tiny_qwen_image_edit
from support.tiny_unet import tiny_sd15

PROMPTS = ["a kitchen", "a pond", "a harbour"]
ADVICE = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a bright window"),))


def parts(**others):
    return {
        "synthesizer": SwatchSynthesizer(),
        "critic": FixedCritic(ADVICE),
        "planner": aa.OnCanvas(aa.GreedyPlanner(), strength=0.5, masked=True),
        "keep": FixedFilter(keep=True),
        "seed": 0,
        "chunk_size": 1,
        **others,
    }


def test_a_run_redraws_from_the_picture_before(tmp_path):
    attempts = list(aa.improve(PROMPTS, **parts(store=tmp_path)))
    for attempt in attempts:
        pair = attempt.pair
        assert pair.plan.canvas.image.tobytes() == pair.before.tobytes()
        drawn = SwatchSynthesizer().synthesize(pair.plan, seed=pair.seed)
        assert pair.after.tobytes() == drawn.tobytes()
    in_memory = list(aa.improve(PROMPTS, **parts()))
    assert [attempt.pair for attempt in in_memory] == [attempt.pair for attempt in attempts]
    assert [attempt.pair for attempt in in_memory] == list(aa.Run.open(tmp_path).pairs())


def test_the_pictures_of_canvases_are_in_the_store_and_not_in_memory(tmp_path):
    (attempt, *_) = aa.improve(PROMPTS, **parts(store=tmp_path))
    (picture,) = attempt.pair.plan.canvas.pictures
    assert picture == attempt.pair.references[0]
    assert isinstance(picture, aa.ImageFile)


def test_a_canvas_that_is_no_picture_of_the_run_is_kept_too(tmp_path):
    @dataclass(frozen=True)
    class Collage(aa.RegionPlanner):
        color: str = "red"

        def plan(self, prompt, critique):
            return aa.Plan(f"{prompt}, lit")

        def plan_from(self, image, prompt, critique):
            canvas = aa.Canvas(Image.new("RGB", image.size, self.color), strength=0.5, references=[image])
            return replace(self.plan(prompt, critique), canvas=canvas)

    made = [attempt.pair for attempt in aa.improve(PROMPTS, **parts(planner=Collage(), store=tmp_path))]
    assert [pair.plan.canvas.image.getpixel((0, 0)) for pair in made] == [(255, 0, 0)] * 3
    assert list(aa.Run.open(tmp_path).pairs()) == made
    assert aa.pairs_from_folder(tmp_path) == made


def test_a_run_that_was_stopped_goes_on_to_the_same_pairs(tmp_path):
    class StopError(Exception):
        pass

    def stop(event):
        if isinstance(event, aa.StageEvent) and event.stage == "redraw" and stop.stops:
            stop.stops -= 1
            raise StopError

    stop.stops = 1
    whole = [attempt.pair for attempt in aa.improve(PROMPTS, **parts(chunk_size=3))]
    with pytest.raises(StopError):
        list(aa.improve(PROMPTS, **parts(chunk_size=3, store=tmp_path, on_event=stop)))
    assert [attempt.pair for attempt in aa.improve(PROMPTS, **parts(chunk_size=3, store=tmp_path))] == whole


def test_a_store_of_another_strength_is_another_run(tmp_path):
    list(aa.improve(PROMPTS, **parts(store=tmp_path)))
    other = aa.OnCanvas(aa.GreedyPlanner(), strength=0.6, masked=True)
    with pytest.raises(aa.StorageError, match=r"planner\.strength"):
        aa.improve(PROMPTS, **parts(store=tmp_path, planner=other))


class FromNoise(aa.Synthesizer):
    def synthesize(self, plan, *, seed):
        pytest.fail("something was drawn")


GUIDED = DiffusersSynthesizer(pipeline=tiny_sd15(), width=32, height=32, steps=4, guide=aa.RegionalAttention())


@pytest.mark.parametrize(
    ("synthesizer", "strength", "message"),
    [
        (FromNoise(), 0.5, "FromNoise draws from noise alone"),
        (GUIDED, None, "expected a strength"),
        (GUIDED, 0.2, "draws 0 of 4 steps"),
    ],
)
def test_a_canvas_that_cannot_be_drawn_from_is_refused_at_the_door(synthesizer, strength, message):
    planner = aa.OnCanvas(aa.GreedyPlanner(weight=1), strength=strength)
    with pytest.raises(aa.ArtAugError, match=message):
        aa.improve(PROMPTS, **parts(synthesizer=synthesizer, planner=planner))


@dataclass(frozen=True)
class EditPlan(aa.Plan):
    picture: object = None


class Carries(aa.RegionPlanner):
    def plan(self, prompt, critique):
        return EditPlan(prompt, picture=Image.new("RGB", (64, 64), "red"))


def test_a_model_that_only_edits_and_a_guide_over_what_is_edited_are_refused_at_the_door():
    only_edits = DiffusersSynthesizer(pipeline=tiny_qwen_image_edit(), width=64, height=64, steps=2)
    with pytest.raises(aa.ModelError, match="QwenImageEdit only edits pictures, and the plan of 'a picture' has no"):
        aa.improve(PROMPTS, **parts(synthesizer=only_edits, planner=Carries()))
    with pytest.raises(aa.ModelError, match="QwenImageEdit only edits"):
        EditingSynthesizer(base=only_edits, editor=only_edits)
    kontext = FluxKontextPipeline(**tiny_flux(guidance_embeds=True).components)
    guided = DiffusersSynthesizer(pipeline=kontext, width=32, height=32, steps=2, guide=aa.RegionalAttention())
    with pytest.raises(aa.GuideError, match="reads the pictures of canvases beside what it draws"):
        aa.improve(PROMPTS, **parts(synthesizer=guided, planner=aa.OnCanvas(aa.GreedyPlanner())))
    guided.check_plan(aa.Plan("a pond", canvas=aa.Canvas(Image.new("RGB", (32, 32)))))  # regions are what cannot be


def test_a_plan_with_fields_of_its_own_is_refused_by_a_store_before_it_is_redrawn(tmp_path):
    assert len(list(aa.improve(PROMPTS, **parts(planner=Carries())))) == len(PROMPTS)
    with pytest.raises(aa.InvalidValueError, match="is a EditPlan with picture, and files keep what"):
        list(aa.improve(PROMPTS, **parts(planner=Carries(), store=tmp_path)))


@pytest.mark.parametrize("planner", [parts()["planner"], Carries()])
def test_pairs_that_started_from_pictures_are_learned_from_with_a_cache_and_checkpoints(planner, tmp_path):
    synthesizer = DiffusersSynthesizer(pipeline=tiny_flux(), width=64, height=64, steps=2)
    pairs = [attempt.pair for attempt in aa.improve(PROMPTS[:2], **parts(planner=planner))]
    trainer = aa.DifferentialLoRATrainer(
        rank=1, steps=2, batch_size=1, objective=aa.PairedDifference(outside_weight=0.5)
    )
    plain = trainer.train(pairs, synthesizer, seed=0, progress=False)
    kept = trainer.train(
        pairs,
        synthesizer,
        seed=0,
        progress=False,
        cache=tmp_path / "cache",
        checkpoints=aa.Checkpoints(folder=tmp_path / "checkpoints"),
    )
    assert kept.lora.digest == plain.lora.digest


def test_the_mask_of_a_canvas_says_where_a_pair_changed():
    synthesizer = DiffusersSynthesizer(pipeline=tiny_flux(), width=64, height=64, steps=2)
    before, after = (Image.new("RGB", (64, 64), color) for color in ("grey", "red"))

    def learned(plan):
        pair = aa.ImagePair(prompt="a pond", before=before, after=after, plan=plan)
        objective = aa.PairedDifference(outside_weight=0.5)
        trainer = aa.DifferentialLoRATrainer(rank=1, steps=2, batch_size=1, objective=objective)
        return trainer.train([pair], synthesizer, seed=0, progress=False).lora.digest

    box = aa.Box(0, 0, 0.5, 1)
    by_region = learned(aa.Plan("a pond", (aa.Region(box, "red"),)))
    by_mask = learned(aa.Plan("a pond", canvas=aa.Canvas(before, mask=box, strength=0.5)))
    assert by_mask == by_region
    assert by_mask != learned(aa.Plan("a pond"))
