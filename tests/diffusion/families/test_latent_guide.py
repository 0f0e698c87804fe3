"""Latents that guides move, on the tiny model of every family: what moves reaches the next step, and what does not changes nothing."""

import copy
import functools
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

import artaug as aa
from artaug.diffusion.families.chroma.family import Chroma1
from artaug.diffusion.families.flux.family import Flux
from artaug.diffusion.families.qwen_image.family import QwenImage
from artaug.diffusion.families.sd3.family import StableDiffusion3
from artaug.diffusion.families.unet.family import StableDiffusion, StableDiffusionXL
from artaug.diffusion.families.z_image.family import ZImage
from artaug.regional.denoiser import bind_forward_args
from artaug.regional.guide import steer
from support.family_laws import family_of, synthesizer_of
from support.family_pipelines import PIPELINES, tiny_family

PROMPTS = ["a red barn by the lake", "a lake, and in it a red boat at night"]
PLANS = [aa.Plan(prompt) for prompt in PROMPTS]
LEFT = aa.Box(0, 0, 0.5, 1)

NUMPY_IN_DIFFUSERS = pytest.mark.filterwarnings(
    "ignore:__array_wrap__ must accept:DeprecationWarning"
)  # its schedulers


def name_of(kind):
    return kind.__name__


@pytest.fixture(scope="module", params=PIPELINES, ids=name_of)
def family(request):
    return tiny_family(request.param)


@pytest.fixture(scope="module", params=[Flux, StableDiffusion3, StableDiffusionXL, ZImage], ids=name_of)
def kind_of_call(request):
    """One of each way to call a denoiser: branch by branch, in one batch, scaled, as lists."""
    return tiny_family(request.param)


class Moves(aa.LatentGuide):
    """Moves by a function, and notes what it was given."""

    def __init__(self, move):
        self.move, self.steps, self.latents = move, [], []

    def moved(self, latents, step, predict):
        self.steps.append((step.number, step.count))
        self.latents.append(latents.clone())
        return self.move(latents, step, predict)


def draw(family, guide, plans=PLANS, *, steps=3, seeds=None):
    images = synthesizer_of(family, guide=guide, steps=steps).synthesize_batch(plans, seeds=seeds or range(len(plans)))
    return np.stack([np.asarray(image) for image in images]).astype(int)


def still(latents, _step, _predict):
    return latents


def tried(latents, _step, predict):
    wanted = latents.clone().requires_grad_()
    maps = []
    predict(wanted, aa.AttentionProbe(phrases=["lake"], receive=maps.append))
    loss = sum(layer.maps.square().sum() for layer in maps[0].layers)
    (gradient,) = torch.autograd.grad(loss, wanted)
    assert gradient.shape == latents.shape
    assert gradient.flatten(1).abs().amax(dim=1).min() > 0
    return latents


def test_a_guide_that_moves_nothing_draws_the_plain_picture_bit_for_bit(family):
    guide = Moves(lambda latents, step, predict: latents + 0.0 if step.number else tried(latents, step, predict))
    assert (draw(family, guide) == draw(family, None)).all()
    assert guide.steps == [(0, 3), (1, 3), (2, 3)]


def test_the_latents_that_it_gets_are_those_of_the_pipeline(family):
    guide = Moves(still)
    draw(family, guide)
    noise = family.initial_noise([0, 1], family.encode_prompts(PROMPTS))
    scale = float(getattr(family.pipeline.scheduler, "init_noise_sigma", 1.0))
    torch.testing.assert_close(guide.latents[0], noise * scale, rtol=1e-6, atol=1e-6)
    assert [latents.dtype for latents in guide.latents] == [torch.float32] * 3
    assert len(guide.latents[0]) == len(PLANS)


@contextmanager
def recorded_steps(family):
    """What the scheduler steps from, and the step's prediction."""
    scheduler, steps = family.pipeline.scheduler, []
    step = scheduler.step

    @functools.wraps(step)  # with its signature: whether it takes generators
    def recording(prediction, timestep, sample, *args, **kwargs):
        steps.append((sample.clone(), prediction.clone()))
        return step(prediction, timestep, sample, *args, **kwargs)

    scheduler.step = recording
    try:
        yield steps
    finally:
        del scheduler.step


@pytest.mark.parametrize("number", [0, 2])
def test_what_a_guide_makes_of_latents_reaches_the_denoiser_and_the_scheduler(family, number):
    def by_one(latents, step, _predict):
        return latents + 1 if step.number == number else latents

    with recorded_steps(family) as plain:
        draw(family, Moves(still))
    with recorded_steps(family) as moved:
        draw(family, Moves(by_one))
    torch.testing.assert_close(moved[number][0], plain[number][0] + 1, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(moved[number][1], plain[number][1])  # the prediction is that of the moved latents
    for before in range(number):
        assert torch.equal(moved[before][1], plain[before][1])


@pytest.mark.parametrize("kind", [Chroma1, Flux, QwenImage, StableDiffusion3, ZImage], ids=name_of)
def test_a_move_of_the_start_latents_is_what_the_pipeline_draws_from_them(kind):
    family = tiny_family(kind)
    conditioning = family.encode_prompts(PROMPTS)
    start = family.initial_noise([0, 1], conditioning) * 0.5
    negative = None if family.negative is None else family.encode_prompts([family.negative] * 2)
    with torch.no_grad():
        expected = family.pipeline(
            **family.pipeline_kwargs(conditioning, negative),
            width=family.width,
            height=family.height,
            num_inference_steps=3,
            latents=start,
        ).images
    halved = draw(family, Moves(lambda latents, step, _: latents * 0.5 if step.number == 0 else latents))
    assert (halved == np.stack([np.asarray(image) for image in expected]).astype(int)).all()


def test_the_prediction_is_that_of_the_step_for_the_plans_prompts(family):
    seen, predictions = [], []

    class Watch(aa.Guide):
        reads_regions = False

        @contextmanager
        def applied(self, run):
            def note(_module, _args, output):
                if run.call is not None and run.call.trial is None and run.call.branches.cond:
                    rows = run.call.branches.cond
                    seen.append(run.denoiser.prediction(output)[rows.start : rows.stop].clone())

            with run.denoiser.module.register_forward_hook(note):
                yield

    def predict_only(latents, _step, predict):
        predictions.append(predict(latents))
        assert not predictions[-1].requires_grad
        return latents

    draw(family, aa.Together((Watch(), Moves(predict_only))), steps=2)
    assert len(seen) == len(predictions) == 2
    for prediction, expected in zip(predictions, seen, strict=True):
        torch.testing.assert_close(prediction, expected.reshape(prediction.shape), rtol=2e-4, atol=2e-5)


def test_the_gradient_through_the_denoiser_is_that_of_finite_differences(family):
    errors = []

    def check(latents, step, predict):
        if step.number:
            return latents
        generator = torch.Generator().manual_seed(5)
        direction = torch.randn(latents.shape, generator=generator)
        direction = direction / direction.norm()
        target = torch.randn(latents.shape, generator=generator)

        def loss(at):
            return (predict(at).double() * target.double()).sum()

        wanted = latents.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(wanted), wanted)
        reach = 0.02
        difference = (loss(latents + reach * direction) - loss(latents - reach * direction)) / (2 * reach)
        along = (gradient.double() * direction.double()).sum()
        errors.append(float((difference - along).abs() / gradient.norm()))
        return latents

    draw(family, Moves(check), PLANS[:1], steps=1)
    assert errors[0] < 5e-3


def test_a_picture_of_a_batch_is_moved_as_it_is_alone(kind_of_call):
    def follow(latents, _step, predict):
        wanted = latents.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(predict(wanted).square().flatten(1).mean(dim=1).sum(), wanted)
        return latents - 0.3 * gradient / gradient.flatten(1).abs().amax(dim=1).reshape(-1, *[1] * (latents.ndim - 1))

    together = draw(kind_of_call, Moves(follow), steps=2)
    alone = [draw(kind_of_call, Moves(follow), [plan], steps=2, seeds=[seed])[0] for seed, plan in enumerate(PLANS)]
    assert np.abs(together - np.stack(alone)).max() <= 2
    assert np.abs(together - draw(kind_of_call, None, steps=2)).max() > 2


class Hook(aa.Guide):
    """Replaces the latents in the first call of one step, by a hook of its own."""

    reads_regions = False

    def __init__(self, by):
        self.by, self.count = by, 0

    @contextmanager
    def applied(self, run):
        def replace(module, args, kwargs):
            call = bind_forward_args(module, args, kwargs)
            self.count += 1
            if self.count > 1:
                return None
            return (), run.denoiser.with_latents(call, run.denoiser.latents_in(call) + self.by)

        with run.denoiser.module.register_forward_pre_hook(replace, with_kwargs=True):
            yield


def test_latents_that_a_hook_replaces_are_those_that_the_step_is_made_from(kind_of_call):
    with recorded_steps(kind_of_call) as plain:
        draw(kind_of_call, Hook(0.0))
    with recorded_steps(kind_of_call) as moved:
        draw(kind_of_call, aa.Together((aa.RegionalAttention(), Hook(1.0))))
    torch.testing.assert_close(moved[0][0], plain[0][0] + 1, rtol=1e-5, atol=1e-5)
    change = (moved[1][0] - plain[1][0]).mean().item()
    assert change > 0.7  # the shift itself, and not its effect on the prediction alone


def test_two_guides_act_in_order_beside_regions_and_a_probe(kind_of_call):
    plans = [aa.Plan(PROMPTS[0], (aa.Region(LEFT, "ivy"),)), PLANS[1]]
    first, second = Moves(lambda latents, *_: latents + 1), Moves(lambda latents, *_: latents * 2)
    maps = []
    probe = aa.AttentionProbe(phrases=["lake"], receive=maps.append)
    regions = aa.RegionalAttention()
    with recorded_steps(kind_of_call) as plain:
        draw(kind_of_call, regions, plans, steps=1)
    with recorded_steps(kind_of_call) as moved:
        draw(kind_of_call, aa.Together((probe, first, regions, Moves(tried), second)), plans, steps=1)
    assert torch.equal(second.latents[0], first.latents[0] + 1)
    torch.testing.assert_close(moved[0][0], (plain[0][0] + 1) * 2, rtol=1e-5, atol=1e-5)
    assert [call.call for call in maps] == [0]  # of the call that draws, not of those that try
    assert not maps[0].layers[0].maps.requires_grad


def test_regions_act_on_what_a_guide_tries(kind_of_call):
    plan = aa.Plan(PROMPTS[0], (aa.Region(LEFT, "ivy"),))
    predictions = {}
    for guide in (aa.RegionalAttention(), aa.OutputMix(), None):

        def keep(latents, _step, predict, name=guide):
            predictions[name] = predict(latents)
            return latents

        guides = [Moves(keep)] if guide is None else [guide, Moves(keep)]
        draw(kind_of_call, aa.Together(guides), [PLANS[0] if guide is None else plan], steps=1)
    plain = predictions.pop(None)
    assert all(not torch.allclose(prediction, plain) for prediction in predictions.values())


def test_it_leaves_no_trace_also_after_an_exception(kind_of_call):
    module, scheduler = kind_of_call.module, kind_of_call.pipeline.scheduler
    module.requires_grad_(True)
    before = dict(vars(scheduler)), [len(part._forward_pre_hooks) for part in module.modules()]  # noqa: SLF001

    def fail(latents, step, predict):
        tried(latents, step, predict)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        draw(kind_of_call, Moves(fail))
    after = dict(vars(scheduler)), [len(part._forward_pre_hooks) for part in module.modules()]  # noqa: SLF001
    assert before[0].keys() == after[0].keys()
    assert before[1] == after[1]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())
    assert (draw(kind_of_call, None) == draw(kind_of_call, Moves(still))).all()


@pytest.mark.parametrize("kind", [StableDiffusion3, StableDiffusion], ids=name_of)
def test_without_classifier_free_guidance_it_moves_as_well(kind):
    guided = tiny_family(kind)
    plain = family_of(kind, guided.pipeline, width=32, height=32, max_sequence_length=96, guidance_scale=1.0)
    guide = Moves(tried)
    assert (draw(plain, guide) == draw(plain, None)).all()
    assert np.abs(draw(plain, Moves(lambda latents, *_: latents + 1)) - draw(plain, None)).max() > 0


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda _: None, aa.ContractError, r"Moves.moved returned None for step 1"),
        (
            lambda latents: latents[:1],
            aa.ContractError,
            r"Moves.moved returned latents of shape \(1, .* Expected the shape",
        ),
        (lambda latents: latents * torch.nan, aa.NonFiniteError, r"moved the latents to NaN or infinity before step 1"),
    ],
)
def test_what_is_no_move_is_an_error(answer, error, message):
    with pytest.raises(error, match=message):
        draw(tiny_family(StableDiffusion3), Moves(lambda latents, *_: answer(latents)))


@pytest.mark.parametrize("has_regions", [False, True])
def test_gradient_checkpointing_saves_memory_in_what_is_tried_and_changes_nothing(family, has_regions):
    tried = []

    def keep(latents, _step, predict):
        wanted, maps = latents.clone().requires_grad_(), []
        prediction = predict(wanted, aa.AttentionProbe(phrases=["lake"], receive=maps.append))
        losses = (prediction.square().sum(), sum(layer.maps.sum() for layer in maps[0].layers))
        gradients = [torch.autograd.grad(loss, wanted, retain_graph=True)[0] for loss in losses]
        tried.append([prediction.detach(), *gradients])
        return latents

    outer = aa.AttentionProbe(phrases=["red"], receive=[].append)
    guides = (outer, Moves(keep), *((aa.RegionalAttention(),) if has_regions else ()))
    regions = (aa.Region(LEFT, "a dog with a hat"),) if has_regions else ()
    plans = [aa.Plan(prompt, regions) for prompt in PROMPTS]
    draw(family, aa.Together(guides), plans, steps=1)
    family.module.enable_gradient_checkpointing()
    try:
        draw(family, aa.Together(guides), plans, steps=1)
    finally:
        family.module.disable_gradient_checkpointing()
    torch.testing.assert_close(tried[1], tried[0])


def test_a_drawing_in_inference_mode_is_moved_too():
    family = tiny_family(StableDiffusion3)
    expected = draw(family, Moves(tried))
    with torch.inference_mode():
        assert (draw(family, Moves(tried)) == expected).all()


def test_a_scheduler_that_adds_noise_steps_from_the_moved_latents():
    family = tiny_family(StableDiffusion)
    pipeline = family.pipeline
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    assert (draw(family, Moves(tried)) == draw(family, None)).all()
    guide = Moves(lambda latents, step, _: latents + 1 if step.number == 1 else latents)
    with recorded_steps(family) as plain:
        draw(family, None)
    with recorded_steps(family) as moved:
        draw(family, guide)
    torch.testing.assert_close(moved[1][0], plain[1][0] + 1, rtol=1e-5, atol=1e-5)


KEEPING = [HeunDiscreteScheduler, KDPM2DiscreteScheduler, PNDMScheduler, UniPCMultistepScheduler]
STEPPING = [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler]


@NUMPY_IN_DIFFUSERS
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers with numpy 2
@pytest.mark.parametrize("scheduler", [*KEEPING, *STEPPING])
def test_a_scheduler_that_steps_from_latents_which_it_kept_is_refused_and_no_other(scheduler):
    family = tiny_family(StableDiffusion)
    pipeline = family.pipeline
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    plain = draw(family, None)

    def by_one(latents, step, _predict):
        return latents + 1 if step.number == 1 else latents

    if scheduler in KEEPING:
        with pytest.raises(aa.GuideError, match=rf"{scheduler.__name__} makes some steps from latents that it kept"):
            draw(family, Moves(by_one))
    else:
        assert np.abs(draw(family, Moves(by_one)) - plain).max() > 0
    assert (draw(family, None) == plain).all()


@NUMPY_IN_DIFFUSERS
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers with numpy 2
def test_diffusers_schedulers_that_keep_latents_do_lose_a_move():
    latents, prediction = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    for kind in set(KEEPING) - {UniPCMultistepScheduler}:  # which keeps a part of it
        scheduler = kind.from_config(tiny_family(StableDiffusion).pipeline.scheduler.config, skip_prk_steps=True)
        scheduler.set_timesteps(4)
        after = scheduler.step(prediction, scheduler.timesteps[0], latents).prev_sample
        twin = copy.deepcopy(scheduler)
        stepped, moved = (
            each.step(prediction, scheduler.timesteps[1], start).prev_sample
            for each, start in ((scheduler, after), (twin, after + 1))
        )
        torch.testing.assert_close(moved, stepped, rtol=1e-4, atol=1e-4)


def test_a_pipeline_that_makes_its_steps_without_its_scheduler_is_refused():
    family = tiny_family(StableDiffusion3)
    synthesizer = synthesizer_of(family, guide=Moves(lambda latents, *_: latents + 1))
    pipeline = family.pipeline

    class Own(type(pipeline)):
        def __call__(self, *, callback_on_step_end, **options):
            self.scheduler.step = lambda *_args, **_kwargs: None
            with torch.no_grad():
                embeds = options["prompt_embeds"]
                latents = torch.zeros(2 * len(embeds), 4, 16, 16)
                self.transformer(
                    hidden_states=latents,
                    timestep=torch.ones(len(latents)),
                    encoder_hidden_states=embeds.repeat(2, 1, 1),
                    pooled_projections=options["pooled_prompt_embeds"].repeat(2, 1),
                )
            callback_on_step_end(self, 0, torch.tensor(1.0), {"latents": latents[: len(embeds)]})

    pipeline.__class__ = Own
    with pytest.raises(aa.GuideError, match=r"moved before step 1 are lost: the pipeline has made the step without"):
        synthesizer.synthesize_batch(PLANS, seeds=[0, 1])


def test_a_prediction_without_a_drawing_is_refused():
    family = tiny_family(StableDiffusion3)
    conditioning = family.encode_prompts(PROMPTS)
    noise = family.initial_noise([0, 1], conditioning)
    with (
        steer(Moves(still), family.guided_run(PLANS, conditioning)),
        pytest.raises(aa.GuideError, match=r"1 guide\(s\) of this run move latents before a step, and it has no steps"),
    ):
        family.predict(noise, torch.tensor([0.7, 0.7]), conditioning)
