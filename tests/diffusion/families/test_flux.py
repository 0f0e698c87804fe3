"""What artaug knows of FLUX.1, against what diffusers does."""

import math
import warnings

import pytest
import torch
from PIL import Image

import artaug as aa
from artaug.diffusion import Flux
from artaug.regional import Branches
from artaug.training.noise_schedule import FlowMatching
from support.tiny_flux import TINY_SIZE, tiny_flux


def flux_of(pipeline, **options):
    defaults = {"width": 24, "height": 32, "guidance_scale": None}
    defaults |= {"negative_prompt": None, "true_cfg_scale": 1.0, "max_sequence_length": 24}
    return Flux(pipeline=pipeline, **{**defaults, **options})


@pytest.fixture(scope="module", params=[False, True], ids=["schnell-like", "dev-like"])
def flux(request):
    return flux_of(tiny_flux(guidance_embeds=request.param))


def picture(seed=0, *, width=24, height=32):
    noise = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def first_call(flux, prompt):
    """The very call the pipeline makes at its first step, and what came of it."""
    calls = []
    watch = flux.module.register_forward_hook(
        lambda _module, _args, call, output: calls.append((dict(call), output[0])), with_kwargs=True
    )
    flux.pipeline.set_progress_bar_config(disable=True)
    with watch:
        flux.pipeline(
            prompt,
            width=flux.width,
            height=flux.height,
            num_inference_steps=2,
            max_sequence_length=flux.max_sequence_length,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
    return calls[0]


def test_prompts_are_encoded_as_the_pipeline_encodes_them(flux):
    call, _ = first_call(flux, ["a red barn", "a lake"])
    encoded = flux.encode_prompts(["a red barn", "a lake"])
    assert torch.equal(encoded["prompt_embeds"], call["encoder_hidden_states"])
    assert torch.equal(encoded["pooled_prompt_embeds"], call["pooled_projections"])
    assert not encoded["prompt_embeds"].requires_grad


def test_training_predicts_what_drawing_predicts_bit_for_bit(flux):
    call, velocity = first_call(flux, ["a red barn", "a lake"])
    with torch.no_grad():
        predicted = flux.predict(call["hidden_states"], call["timestep"], flux.encode_prompts(["a red barn", "a lake"]))
    assert torch.equal(predicted, velocity)


def test_a_prediction_has_the_type_of_the_latents_and_carries_gradient():
    flux = flux_of(tiny_flux().to(torch.bfloat16))
    predicted = flux.predict(torch.randn(1, 48, 16), torch.tensor([0.5]), flux.encode_prompts(["a red barn"]))
    assert predicted.dtype == torch.float32
    assert predicted.requires_grad


def test_latents_are_scaled_and_packed_so_that_the_pipeline_decodes_them(flux):
    images = [picture(1), picture(2)]
    latents = flux.encode_images(images)
    vae = flux.pipeline.vae
    spread = flux.pipeline._unpack_latents(latents, 32, 24, 2)  # noqa: SLF001 - what the pipeline decodes with
    pixels = flux.pipeline.image_processor.preprocess(images)
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mode()
    assert latents.shape == (2, 8 * 6, 16)
    torch.testing.assert_close(spread / vae.config.scaling_factor + vae.config.shift_factor, expected)


def test_encoding_a_picture_of_another_size_is_refused(flux):
    with pytest.raises(aa.ModelError, match="32 x 24 pixels cannot be encoded at 24 x 32"):
        flux.encode_images([picture(), picture(width=32, height=24)])


@pytest.mark.parametrize("dynamic_shift", [False, True])
def test_training_shifts_noise_levels_as_the_scheduler_does(dynamic_shift):
    flux = flux_of(tiny_flux(dynamic_shift=dynamic_shift), width=TINY_SIZE, height=TINY_SIZE)
    first_call(flux, "a")  # two steps, which the scheduler shifts from 1 and 1/2
    _, sampled, _ = flux.pipeline.scheduler.sigmas.tolist()
    shift = flux.noise_schedule.shift
    assert sampled == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), rel=1e-6)
    if not dynamic_shift:
        assert flux.noise_schedule == FlowMatching(shift=3.0)


def test_the_guidance_of_training_is_that_of_drawing():
    pipeline = tiny_flux(guidance_embeds=True)
    weak, strong = flux_of(pipeline, guidance_scale=1.0), flux_of(pipeline, guidance_scale=8.0)
    noisy, sigmas, prompt = torch.ones(1, 48, 16), torch.tensor([0.5]), weak.encode_prompts(["a red barn"])
    assert not torch.equal(weak.predict(noisy, sigmas, prompt), strong.predict(noisy, sigmas, prompt))
    assert weak.pipeline_kwargs(prompt, None)["guidance_scale"] == 1.0


def test_only_the_plans_own_branch_is_guided(flux):
    conditioning = flux.encode_prompts(["a red barn"])
    denoiser = flux.denoiser(conditioning)
    assert denoiser.grid == (8, 6)
    call = {"hidden_states": torch.zeros(1, 48, 16), "encoder_hidden_states": conditioning["prompt_embeds"]}
    assert denoiser.branches(call) == Branches(cond=range(1))
    twin = {**call, "encoder_hidden_states": conditioning["prompt_embeds"].clone()}
    assert denoiser.branches(twin) == Branches(cond=range(0), uncond=range(1))


def test_reconditioning_takes_rows_and_leaves_the_call_as_it_was(flux):
    call, _ = first_call(flux, ["a", "b", "c"])
    kept = dict(call)
    texts = flux.encode_separately(["x", "y"])
    other = flux.encode_prompts(["x", "y"])
    denoiser = flux.denoiser(flux.encode_prompts(["a"]))
    changed = denoiser.with_prompt_embeds(call, [2, 0], texts)
    assert torch.equal(changed["hidden_states"], call["hidden_states"][[2, 0]])
    torch.testing.assert_close(changed["encoder_hidden_states"], other["prompt_embeds"])
    torch.testing.assert_close(changed["pooled_projections"], other["pooled_prompt_embeds"])
    assert changed["timestep"].shape == (2,)
    assert changed["img_ids"] is call["img_ids"]
    assert call == kept


def test_a_prompt_longer_than_t5_reads_is_warned_of_with_the_words_cut():
    flux = flux_of(tiny_flux(), max_sequence_length=12)
    warned = (
        "T5 reads 12 tokens and the prompt 'a red barn by night' has 21: cut off is 'by night'. Shorten it, or raise"
    )
    with pytest.warns(UserWarning, match=warned):
        flux.encode_prompts(["a red barn by night"])


def test_a_prompt_longer_than_clip_reads_is_warned_of_too():
    with pytest.warns(UserWarning, match=r"CLIP reads 32 tokens and the prompt .* has 33: cut off is 't'"):
        flux_of(tiny_flux(), max_sequence_length=512).encode_prompts(["a barn and a house in deep deep snow, at"])


def test_what_is_warned_of_is_exactly_what_the_encoders_do_not_see():
    flux = flux_of(tiny_flux(), max_sequence_length=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        long, other = flux.encode_prompts(["a red barn by night"]), flux.encode_prompts(["a red barn at dawn"])
    fits = flux.encode_prompts(["a red barn"])
    assert torch.equal(long["prompt_embeds"], other["prompt_embeds"])
    assert torch.equal(long["prompt_embeds"], fits["prompt_embeds"])


def test_a_pipeline_without_an_encoder_is_refused():
    pipeline = tiny_flux()
    pipeline.text_encoder_2 = None
    with pytest.raises(aa.ModelError, match=r"loaded without \['text_encoder_2'\]"):
        flux_of(pipeline)


def test_dynamic_shift_grows_with_the_picture():
    small, large = (flux_of(tiny_flux(dynamic_shift=True), width=side, height=side) for side in (32, 256))
    assert math.log(small.noise_schedule.shift) == pytest.approx(0.5 + 0.65 * (64 - 256) / 3840)
    assert math.log(large.noise_schedule.shift) == pytest.approx(1.15)
