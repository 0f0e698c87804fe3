"""Same arguments, same picture, with every scheduler that diffusers ships: its noise comes from the pictures' generators."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer
from artaug.diffusion.seeding import seeded_scheduler
from support.tiny_chroma import tiny_chroma
from support.tiny_flux import tiny_flux
from support.tiny_flux2 import tiny_flux2
from support.tiny_qwen_image import tiny_qwen_image
from support.tiny_sd3 import tiny_sd3
from support.tiny_unet import tiny_sd15, tiny_sdxl
from support.tiny_z_image import tiny_z_image

pytestmark = pytest.mark.filterwarnings("ignore")  # some schedulers are deprecated, or call numpy in deprecated ways

BARN, LAKE = aa.Plan("a red barn"), aa.Plan("a still lake")
SIZE = {"width": 32, "height": 32}
SCHEDULERS = sorted(
    name
    for name in dir(diffusers)  # which loads lazily; those that need a package that is missing are no schedulers
    if name.endswith("Scheduler") and issubclass(getattr(diffusers, name), SchedulerMixin)
)
STOCHASTIC = [(FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}), (FlowMatchLCMScheduler, {})]
FLOW_PIPELINES = [tiny_flux, tiny_flux2, tiny_sd3, tiny_qwen_image, tiny_z_image, tiny_chroma]


def synthesizer_of(pipeline, *, steps=2, **options):
    return DiffusersSynthesizer(pipeline=pipeline, steps=steps, max_sequence_length=96, **SIZE, **options)


def identities_of(scheduler):
    return {name: id(value) for name, value in vars(scheduler).items()}


def levels(image):
    return np.asarray(image).astype(int)


def assert_same_arguments_draw_the_same_picture(synthesizer):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = levels(synthesizer.synthesize(BARN, seed=5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert (levels(synthesizer.synthesize(BARN, seed=5)) == first).all()
    in_a_batch = synthesizer.synthesize_batch([LAKE, BARN], seeds=[3, 5])[1]
    assert abs(levels(in_a_batch) - first).max() <= 1  # matrix products round by their size
    return first


def draws_with(pipeline, name, config, **options):
    """Whether diffusers' own pipeline draws with a scheduler, which is set if it does."""
    try:
        pipeline.scheduler = getattr(diffusers, name).from_config(config, **options)
        pipeline("a", num_inference_steps=2, output_type="latent", **SIZE)
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError):
        return False
    return True


AS_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
"""How people put a solver of noise-predicting models onto a flow model."""


@pytest.mark.parametrize(
    ("make", "least", "some"),
    [
        (tiny_flux, 3, {"FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "UniPCMultistepScheduler"}),
        (
            tiny_sd15,
            24,
            {"EulerAncestralDiscreteScheduler", "DDPMScheduler", "LCMScheduler", "KDPM2AncestralDiscreteScheduler"},
        ),
    ],
)
def test_every_scheduler_that_diffusers_draws_with_draws_the_same_picture_again(make, least, some):
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    original, drawn = pipeline.scheduler, set()
    for name in SCHEDULERS:
        if draws_with(pipeline, name, original.config) or draws_with(pipeline, name, original.config, **AS_FLOW):
            assert_same_arguments_draw_the_same_picture(synthesizer_of(pipeline))
            drawn.add(name)
    assert len(drawn) >= least
    assert drawn >= some


@pytest.mark.parametrize("make", FLOW_PIPELINES)
@pytest.mark.parametrize(("scheduler", "options"), STOCHASTIC)
def test_noise_of_a_flow_scheduler_is_the_pictures_own(make, scheduler, options):
    pipeline = make()
    plain = levels(synthesizer_of(pipeline).synthesize(BARN, seed=5))
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
    assert (assert_same_arguments_draw_the_same_picture(synthesizer_of(pipeline)) != plain).any()


@pytest.mark.parametrize("algorithm", ["sde-dpmsolver++", "sde-dpmsolver"])
def test_noise_of_a_stochastic_solver_is_the_pictures_own(algorithm):
    pipeline = tiny_sdxl()
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type=algorithm, final_sigmas_type="sigma_min"
    )
    assert_same_arguments_draw_the_same_picture(synthesizer_of(pipeline, steps=3))


def test_a_scheduler_that_gets_its_generator_from_the_pipeline_draws_what_the_pipeline_draws():
    pipeline = tiny_sd15()
    pipeline.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(5)]
    expected = pipeline("a red barn", num_inference_steps=2, generator=generators, **SIZE).images[0]
    assert (levels(synthesizer_of(pipeline).synthesize(BARN, seed=5)) == levels(expected)).all()


def test_a_scheduler_is_the_same_object_and_as_before_after_a_drawing():
    pipeline = tiny_sd15()
    scheduler = pipeline.scheduler = diffusers.DPMSolverSinglestepScheduler.from_config(
        pipeline.scheduler.config, lower_order_final=False, final_sigmas_type="sigma_min"
    )
    before = identities_of(scheduler)
    in_four = levels(synthesizer_of(pipeline, steps=4).synthesize(BARN, seed=0))
    synthesizer_of(pipeline, steps=3).synthesize(BARN, seed=0)  # diffusers changes lower_order_final for good here
    assert pipeline.scheduler is scheduler
    assert identities_of(scheduler) == before
    assert (levels(synthesizer_of(pipeline, steps=4).synthesize(BARN, seed=0)) == in_four).all()


def test_a_scheduler_is_as_before_after_an_exception():
    pipeline = tiny_flux()
    before = identities_of(pipeline.scheduler)
    with pipeline.transformer.register_forward_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
        synthesizer_of(pipeline).synthesize(BARN, seed=0)
    assert identities_of(pipeline.scheduler) == before


class GloballyRandom(FlowMatchEulerDiscreteScheduler):
    def step(self, model_output, timestep, sample, return_dict=True):
        return super().step(model_output + torch.randn_like(sample), timestep, sample, return_dict=return_dict)


class IgnoresItsGenerator(FlowMatchEulerDiscreteScheduler):
    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        return super().step(torch.normal(model_output, 1.0), timestep, sample, return_dict=return_dict)


@pytest.mark.parametrize("scheduler", [GloballyRandom, IgnoresItsGenerator])
def test_a_scheduler_that_draws_from_the_global_state_is_refused_by_name(scheduler):
    pipeline = tiny_flux()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    state = torch.get_rng_state()
    with pytest.raises(aa.ModelError, match=rf"{scheduler.__name__}\.step draws noise from torch's global state"):
        synthesizer_of(pipeline).synthesize(BARN, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_scheduler_whose_noise_no_seed_decides_is_refused_before_anything_is_drawn():
    class DPMSolverSDEScheduler(DDIMScheduler):  # the original needs torchsde
        pass

    pipeline = tiny_sd15()
    synthesizer = synthesizer_of(pipeline)
    pipeline.scheduler = DPMSolverSDEScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(aa.ModelError, match=r"DPMSolverSDEScheduler draws noise that depends on no picture's seed"):
        synthesizer_of(pipeline)
    with pytest.raises(aa.ModelError, match="DPMSolverMultistepScheduler"):
        synthesizer.synthesize(BARN, seed=0)


def test_a_part_put_in_training_mode_later_is_refused_before_anything_is_drawn():
    pipeline = tiny_flux()
    synthesizer = synthesizer_of(pipeline)
    pipeline.text_encoder_2.train()
    with pytest.raises(aa.ModelError, match=r"\['text_encoder_2'\] of the pipeline are in training mode"):
        synthesizer.synthesize(BARN, seed=0)
    pipeline.text_encoder_2.eval()
    next(m for m in pipeline.text_encoder_2.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0).train()
    with pytest.raises(aa.ModelError, match="training mode"):
        synthesizer.synthesize(BARN, seed=0)


def test_a_seeded_step_keeps_the_signature_by_which_pipelines_decide_what_to_pass():
    for scheduler in (UniPCMultistepScheduler(), DDIMScheduler()):
        names = list(inspect.signature(scheduler.step).parameters)
        with seeded_scheduler(scheduler, [torch.Generator()]):
            assert list(inspect.signature(scheduler.step).parameters) == names
        assert "step" not in vars(scheduler)
