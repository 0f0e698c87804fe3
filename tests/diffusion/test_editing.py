"""Models that edit: FLUX.1 Kontext behind the synthesizer, and beside the one that draws."""

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as upstream
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer, EditingSynthesizer, measure_shift
from artaug.testing import FixedCritic, FixedFilter
from support.tiny_flux import tiny_flux
from support.tiny_qwen_image import tiny_qwen_image_edit

WIDTH, HEIGHT, STEPS = 48, 32, 3


def tiny_kontext(seed=1):
    kontext = FluxKontextPipeline(**tiny_flux(guidance_embeds=True, seed=seed).components)
    kontext.set_progress_bar_config(disable=True)
    return kontext


def synthesizer_of(pipeline, **options):
    return DiffusersSynthesizer(pipeline=pipeline, **{"width": WIDTH, "height": HEIGHT, "steps": STEPS, **options})


def noise_picture(seed, size=(WIDTH, HEIGHT)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


CANVAS = aa.Canvas(noise_picture(1))


@pytest.mark.parametrize("canvas", [None, CANVAS])
def test_kontext_draws_what_its_pipeline_draws_without_bringing_the_picture_to_another_size(canvas):
    kontext = tiny_kontext()
    drawn = synthesizer_of(kontext).synthesize(aa.Plan("a red cone", canvas=canvas), seed=5)
    expected = kontext(
        prompt="a red cone",
        image=None if canvas is None else canvas.image,
        width=WIDTH,
        height=HEIGHT,
        max_area=WIDTH * HEIGHT,
        _auto_resize=False,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert drawn.tobytes() == expected.tobytes()
    assert drawn.size == (WIDTH, HEIGHT)


def test_the_picture_of_a_canvas_decides_what_kontext_draws():
    synthesizer = synthesizer_of(tiny_kontext())
    plans = [
        aa.Plan("a red cone"),
        aa.Plan("a red cone", canvas=CANVAS),
        aa.Plan("a red cone", canvas=aa.Canvas(noise_picture(2))),
    ]
    together = synthesizer.synthesize_batch(plans, seeds=[5, 5, 5])
    alone = [synthesizer.synthesize(plan, seed=5) for plan in plans]
    assert len({picture.tobytes() for picture in alone}) == 3
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_the_initial_noise_of_kontext_is_what_it_draws_from():
    synthesizer = synthesizer_of(tiny_kontext())
    seen = []

    def remember(_module, _args, kwargs):
        seen.append(kwargs["hidden_states"])

    with synthesizer.pipeline.transformer.register_forward_pre_hook(remember, with_kwargs=True):
        synthesizer.synthesize(aa.Plan("a red cone", canvas=CANVAS), seed=5)
    family = synthesizer._bound_family  # noqa: SLF001 - which no public method gives for a model that is not trained
    noise = family.initial_noise([5], family.encode_prompts(["a red cone"]))
    assert torch.equal(seen[0][:, : noise.shape[1]], noise)
    assert seen[0].shape[1] == 2 * noise.shape[1], "the tokens of the picture follow"


@pytest.mark.parametrize(
    ("canvas", "message"),
    [
        (aa.Canvas(noise_picture(1), strength=0.5), "would ignore the strength"),
        (aa.Canvas(noise_picture(1), mask=aa.Box(0, 0, 0.5, 1)), "would ignore the mask"),
        (aa.Canvas(noise_picture(1), references=[noise_picture(2)]), "would ignore the references"),
        (aa.Canvas(noise_picture(1, (32, 32))), "is of 32 x 32 pixels"),
    ],
)
def test_what_an_editing_model_would_ignore_is_refused(canvas, message):
    synthesizer = synthesizer_of(tiny_kontext())
    with pytest.raises(aa.ModelError, match=message):
        synthesizer.synthesize(aa.Plan("a red cone", canvas=canvas), seed=0)


def test_an_editing_model_has_no_guide_where_it_edits_and_is_not_trained():
    region = aa.Region(aa.Box(0, 0, 0.5, 1), "a door")
    synthesizer = synthesizer_of(tiny_kontext(), guide=aa.RegionalAttention())
    assert synthesizer.canvas_steps(CANVAS) == STEPS
    synthesizer.synthesize(aa.Plan("a red cone", (region,)), seed=0)
    with pytest.raises(aa.GuideError, match="reads the pictures of canvases beside what it draws"):
        synthesizer.synthesize(aa.Plan("a red cone", (region,), canvas=CANVAS), seed=0)
    with pytest.raises(aa.ModelError, match="edits pictures, and trainings here show it none"), synthesizer.training():
        pass


# --- Qwen-Image-Edit ---


@pytest.fixture
def qwen_reads_small_pictures(monkeypatch):
    """Let the pipeline bring pictures to the area of the tests in place of a megapixel."""
    calculate = upstream.calculate_dimensions
    monkeypatch.setattr(upstream, "calculate_dimensions", lambda _, ratio: calculate(64 * 64, ratio))


@pytest.mark.usefixtures("qwen_reads_small_pictures")
@pytest.mark.parametrize("options", [{}, {"negative_prompt": " ", "true_cfg_scale": 4.0}])
def test_qwen_image_edit_draws_what_its_pipeline_draws(options):
    pipeline = tiny_qwen_image_edit()
    synthesizer = synthesizer_of(pipeline, width=64, height=64, **options)
    picture = noise_picture(1, (64, 64))
    drawn = synthesizer.synthesize(aa.Plan("make it red", canvas=aa.Canvas(picture)), seed=5)
    expected = pipeline(
        prompt="make it red",
        image=picture,
        width=64,
        height=64,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(5),
        **{"true_cfg_scale": 1.0, **options},
    ).images[0]
    assert drawn.tobytes() == expected.tobytes()
    other = synthesizer.synthesize(aa.Plan("make it red", canvas=aa.Canvas(noise_picture(2, (64, 64)))), seed=5)
    assert other.tobytes() != drawn.tobytes()


@pytest.mark.usefixtures("qwen_reads_small_pictures")
def test_pictures_edited_together_are_those_edited_alone():
    synthesizer = synthesizer_of(tiny_qwen_image_edit(), width=64, height=64)
    plans = [aa.Plan("red" * number, canvas=aa.Canvas(noise_picture(number, (64, 64)))) for number in (1, 2)]
    together = synthesizer.synthesize_batch(plans, seeds=[5, 6])
    alone = [synthesizer.synthesize(plan, seed=seed) for plan, seed in zip(plans, (5, 6), strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_qwen_image_edit_takes_no_picture_that_it_would_resize_and_no_plan_without_one():
    synthesizer = synthesizer_of(tiny_qwen_image_edit(), width=64, height=64)
    with pytest.raises(aa.ModelError, match="would bring it to 1024 x 1024"):
        synthesizer.canvas_steps(aa.Canvas(noise_picture(1, (64, 64))))
    with pytest.raises(aa.ModelError, match="only edits pictures, and the plan of 'a cone' has no canvas"):
        synthesizer.synthesize(aa.Plan("a cone"), seed=0)


# --- two models ---


def two_models():
    return EditingSynthesizer(base=synthesizer_of(tiny_flux()), editor=synthesizer_of(tiny_kontext()))


def test_one_model_draws_and_the_other_one_edits():
    synthesizer = two_models()
    plans = [aa.Plan("a red cone", canvas=CANVAS), aa.Plan("a red cone")]
    edited, drawn = synthesizer.synthesize_batch(plans, seeds=[5, 5])
    assert edited.tobytes() == synthesizer.editor.synthesize(plans[0], seed=5).tobytes()
    assert drawn.tobytes() == synthesizer.base.synthesize(plans[1], seed=5).tobytes()
    assert synthesizer.synthesize_batch([], seeds=[]) == []


def test_a_loop_learns_what_the_editor_makes_of_the_pictures_of_the_base():
    synthesizer = two_models()
    advice = aa.Critique((aa.Suggestion(aa.Box(0, 0, 1, 1), "a blue cone"),))

    class Instruct(aa.RegionPlanner):
        def plan(self, prompt, critique):
            return aa.Plan(critique.suggestions[0].prompt)

    attempts = aa.improve(
        ["a red cone", "a pond"],
        synthesizer=synthesizer,
        critic=FixedCritic(advice),
        planner=aa.OnCanvas(Instruct()),
        keep=FixedFilter(keep=True),
        seed=0,
    )
    pairs = [attempt.pair for attempt in attempts]
    trained = aa.DifferentialLoRATrainer(rank=1, steps=1, batch_size=1).train(
        pairs, synthesizer, seed=0, progress=False
    )
    tuned = synthesizer.with_lora(trained.lora)
    assert tuned.base.loras
    assert tuned.editor is synthesizer.editor


def test_two_models_of_other_sizes_are_refused():
    with pytest.raises(aa.InvalidValueError, match="Set both to one width and height"):
        EditingSynthesizer(base=synthesizer_of(tiny_flux()), editor=synthesizer_of(tiny_kontext(), width=32))


@given(st.integers(-8, 8), st.integers(-8, 8))
def test_an_edit_that_is_to_change_nothing_measures_how_far_an_editor_shifts(right, down):
    class Shifts(aa.Synthesizer):
        def canvas_steps(self, canvas):
            return 1

        def synthesize(self, plan, *, seed):
            pixels = np.roll(np.asarray(plan.canvas.image, int), (down, right), axis=(0, 1))
            grain = np.random.default_rng(seed).integers(-20, 21, pixels.shape)
            return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))

    assert measure_shift(Shifts(), noise_picture(3)) == (right, down)
