"""What artaug knows of Stable Diffusion and SDXL, against what diffusers does."""

import inspect
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, PNDMScheduler
from torch.nn.functional import scaled_dot_product_attention

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer
from artaug.diffusion.families.unet.family import StableDiffusion, StableDiffusionXL
from artaug.regional import Branches, EncodedRegion, OutputMix, Span
from artaug.training import EpsilonPrediction, VPrediction
from support.family_laws import synthesizer_of
from support.family_runs import (
    attending,
    calls_of,
    drawn_by_artaug,
    drawn_by_pipeline,
    picture,
    pixels,
    predicted,
    tokens_into_layers,
)
from support.guiding import under
from support.tiny_clip import LONGEST
from support.tiny_unet import ddim, tiny_sd15, tiny_sdxl
from support.traces import hooks_of

WIDTH, HEIGHT = 40, 56
GRID = (7, 5)
BARN, LAKE, DUSK = "a red barn", "a lake", "at dusk"
LEFT, FULL = aa.Box(0, 0, 0.4, 1), aa.Box(0, 0, 1, 1)
APART = aa.Isolation(base_weight=0.0)
FAMILIES = {"sd15": (StableDiffusion, tiny_sd15), "sdxl": (StableDiffusionXL, tiny_sdxl)}


def unet_of(name, pipeline=None, **options):
    family_class, tiny = FAMILIES[name]
    defaults = {"width": WIDTH, "height": HEIGHT, "guidance_scale": None}
    defaults |= {"negative_prompt": None, "true_cfg_scale": 1.0, "max_sequence_length": 77}
    return family_class(pipeline=pipeline or tiny(), **{**defaults, **options})


@pytest.fixture(scope="module", params=list(FAMILIES))
def unet(request):
    return unet_of(request.param)


def regions_of(unet, *pictures):
    return [
        [EncodedRegion(region, *unet.encode_separately([region.prompt])) for region in regions] for regions in pictures
    ]


def steered(unet, guide, call, prompts, *pictures):
    """The prediction of one call with a guide at work."""
    denoiser = unet.denoiser(unet.encode_prompts(prompts))
    with under(guide, denoiser, regions_of(unet, *pictures)):
        return predicted(denoiser, call)


def rows_of(call, rows):
    """The same call for some of its rows."""
    selected = {name: call[name][rows] for name in ("sample", "encoder_hidden_states")}
    if call["added_cond_kwargs"] is not None:
        selected["added_cond_kwargs"] = {name: value[rows] for name, value in call["added_cond_kwargs"].items()}
    return {**call, **selected}


# Drawing and encoding


def test_prompts_are_encoded_as_the_pipeline_encodes_them(unet):
    call, _ = calls_of(unet, [BARN, LAKE], guidance_scale=1.0)[0]
    encoded = unet.encode_prompts([BARN, LAKE])
    assert torch.equal(encoded["prompt_embeds"], call["encoder_hidden_states"])
    if call["added_cond_kwargs"] is not None:
        assert torch.equal(encoded["pooled_prompt_embeds"], call["added_cond_kwargs"]["text_embeds"])
    assert not any(tensor.requires_grad for tensor in encoded.values())


@pytest.mark.parametrize("prompts", [[BARN], [BARN, LAKE]], ids=["one", "two"])
@pytest.mark.parametrize(
    ("scale", "negative"), [(None, None), (4.0, "fog"), (1.0, None)], ids=["default", "negative", "without"]
)
def test_artaug_draws_what_the_pipeline_draws_bit_for_bit(unet, prompts, scale, negative):
    guidance = {} if negative is None else {"negative_prompt": [negative] * len(prompts)}
    guidance |= {} if scale is None else {"guidance_scale": scale}
    size = {"width": WIDTH, "height": HEIGHT}
    expected = drawn_by_pipeline(unet.pipeline, prompts, **guidance, **size)
    plans = [aa.Plan(prompt) for prompt in prompts]
    drawn = drawn_by_artaug(
        type(unet), unet.pipeline, plans, guidance_scale=scale, negative_prompt=negative, max_sequence_length=77, **size
    )
    assert np.array_equal(drawn, expected)


def test_an_sdxl_that_reads_the_empty_prompt_as_such_draws_likewise():
    pipeline = tiny_sdxl(force_zeros=False)
    size = {"width": WIDTH, "height": HEIGHT}
    drawn = drawn_by_artaug(StableDiffusionXL, pipeline, [aa.Plan(BARN)], **size)
    assert np.array_equal(drawn, drawn_by_pipeline(pipeline, [BARN], **size))
    assert not np.array_equal(drawn, drawn_by_pipeline(tiny_sdxl(), [BARN], **size))


def test_a_unet_distilled_to_take_its_guidance_draws_and_predicts_without_a_second_branch():
    unet = unet_of("sd15", tiny_sd15(guidance_width=8), guidance_scale=6.0)
    size = {"width": WIDTH, "height": HEIGHT, "guidance_scale": 6.0}
    assert unet.negative is None
    drawn = drawn_by_artaug(StableDiffusion, unet.pipeline, [aa.Plan(BARN)], **size)
    assert np.array_equal(drawn, drawn_by_pipeline(unet.pipeline, [BARN], **size))
    call, noise = calls_of(unet, [BARN, LAKE], guidance_scale=6.0)[0]
    level = (1 - unet.pipeline.scheduler.alphas_cumprod[call["timestep"]]).sqrt()
    with torch.no_grad():
        guess = unet.predict(call["sample"], level.expand(2), unet.encode_prompts([BARN, LAKE]))
    assert torch.equal(guess, noise)
    denoiser = unet.denoiser(unet.encode_prompts([BARN, LAKE]))
    assert denoiser.with_prompt_embeds(call, [1], unet.encode_separately([DUSK]))["timestep_cond"].shape == (1, 8)


def test_the_default_guidance_scale_is_the_pipelines_own(unet):
    recommended = inspect.signature(type(unet.pipeline).__call__).parameters["guidance_scale"].default
    assert unet.pipeline_kwargs(unet.encode_prompts([BARN]), None)["guidance_scale"] == recommended
    assert unet.negative == ""


def test_the_words_of_a_prompt_are_all_tokens_of_clip(unet):
    assert unet.token_slices([BARN, LAKE]) == [slice(0, LONGEST)] * 2


# Training


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler, with numpy 2
@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler])
def test_training_predicts_what_drawing_predicts_bit_for_bit(name, scheduler_class):
    scheduler = scheduler_class.from_config(ddim().config, skip_prk_steps=True, timestep_spacing="leading")
    unet = unet_of(name, FAMILIES[name][1](scheduler=scheduler))
    for call, noise in calls_of(unet, [BARN, LAKE], guidance_scale=1.0):
        level = (1 - unet.pipeline.scheduler.alphas_cumprod[int(call["timestep"])]).sqrt()
        with torch.no_grad():
            guess = unet.predict(call["sample"], level.expand(2), unet.encode_prompts([BARN, LAKE]))
        assert torch.equal(guess, noise)


def test_every_level_that_training_draws_is_a_timestep_of_its_own(unet):
    drawn = unet.noise_schedule.sample_sigmas(500, torch.Generator().manual_seed(0))
    levels = (1 - unet.pipeline.scheduler.alphas_cumprod).sqrt()
    found = unet._nearest_timesteps(drawn)  # noqa: SLF001 - what predict asks the UNet for
    torch.testing.assert_close(levels[found], drawn)
    assert torch.equal(unet._nearest_timesteps(levels), torch.arange(1000))  # noqa: SLF001 - likewise


def test_pictures_are_noised_as_the_scheduler_noises_them(unet):
    scheduler, generator = unet.pipeline.scheduler, torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 4, 7, 5, generator=generator) for _ in range(2))
    times = torch.tensor([0, 500, 999])
    levels = (1 - scheduler.alphas_cumprod[times]).sqrt()
    torch.testing.assert_close(
        unet.noise_schedule.add_noise(clean, noise, levels), scheduler.add_noise(clean, noise, times)
    )
    assert unet.noise_schedule == EpsilonPrediction()


def test_a_velocity_predicting_scheduler_is_trained_as_such():
    scheduler = ddim(prediction_type="v_prediction")
    unet = unet_of("sd15", tiny_sd15(scheduler=scheduler))
    clean, noise = torch.randn(1, 4, 7, 5), torch.randn(1, 4, 7, 5)
    level = (1 - scheduler.alphas_cumprod[[300]]).sqrt()
    assert unet.noise_schedule == VPrediction()
    torch.testing.assert_close(
        unet.noise_schedule.target(clean, noise, level), scheduler.get_velocity(clean, noise, torch.tensor([300]))
    )


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("rescaled", [False, True])
def test_a_schedule_is_read_from_the_scheduler(schedule, rescaled):
    config = {"beta_schedule": schedule, "rescale_betas_zero_snr": rescaled, "prediction_type": "v_prediction"}
    scheduler = ddim(**config, beta_start=0.0001, beta_end=0.02)
    unet = unet_of("sd15", tiny_sd15(scheduler=scheduler))
    levels = (1 - scheduler.alphas_cumprod).sqrt()
    drawn = unet.noise_schedule.sample_sigmas(500, torch.Generator().manual_seed(0))
    times = unet._nearest_timesteps(drawn)  # noqa: SLF001 - what predict asks the UNet for
    torch.testing.assert_close(levels[times], drawn, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "sample"}, r"DDIMScheduler has .*'prediction_type': 'sample'.*v_prediction"),
        ({"trained_betas": [0.1, 0.2]}, r"DDIMScheduler has .*'trained_betas': \[0\.1, 0\.2\]"),
        (
            {"rescale_betas_zero_snr": True},
            "DDIMScheduler has rescale_betas_zero_snr=True with prediction_type='epsilon'",
        ),
    ],
)
def test_a_schedule_that_training_does_not_know_is_refused_by_name(config, message):
    unet = unet_of("sdxl", tiny_sdxl(scheduler=ddim(**config)))
    with pytest.raises(aa.ModelError, match=message):
        _ = unet.noise_schedule


def test_a_scheduler_that_counts_no_timesteps_neither_trains_nor_guides_attention():
    unet = unet_of("sdxl", tiny_sdxl(scheduler=EDMEulerScheduler()))
    with pytest.raises(aa.ModelError, match=r"EDMEulerScheduler has .*'beta_schedule': None"):
        _ = unet.noise_schedule
    with pytest.raises(aa.GuideError, match="scheduler does not count timesteps"):
        unet.denoiser(unet.encode_prompts([BARN])).noise_level({"timestep": torch.tensor(1.1)})


def test_a_prediction_has_the_type_of_the_latents_and_carries_gradient():
    unet = unet_of("sdxl", tiny_sdxl().to(torch.bfloat16))
    guess = unet.predict(torch.randn(1, 4, 7, 5), torch.tensor([0.5]), unet.encode_prompts([BARN]))
    assert guess.dtype == torch.float32
    assert guess.requires_grad


def test_latents_are_scaled_so_that_the_pipeline_decodes_them(unet):
    images = [picture(seed, width=WIDTH, height=HEIGHT) for seed in (1, 2)]
    latents, vae = unet.encode_images(images), unet.pipeline.vae
    with torch.no_grad():
        expected = vae.encode(unet.pipeline.image_processor.preprocess(images)).latent_dist.mode()
    assert latents.shape == (2, 4, *GRID)
    torch.testing.assert_close(latents / vae.config.scaling_factor, expected)


def decoded(unet, latents):
    """What the pipeline itself makes of latents, drawing no step of its own."""

    def swapped(_pipeline, _step, _timestep, _tensors):
        return {"latents": latents}

    options = {"width": WIDTH, "height": HEIGHT, "num_inference_steps": 1, "callback_on_step_end": swapped}
    return pixels(unet.pipeline([BARN], **options).images)


@pytest.mark.parametrize("normalized", [False, True])
def test_sdxl_pictures_go_through_latents_as_through_the_vae_alone(normalized):
    unet = unet_of("sdxl")
    vae, processor = unet.pipeline.vae, unet.pipeline.image_processor
    if normalized:
        vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 2.0, 1.0, 0.7])
    image = picture(3, width=WIDTH, height=HEIGHT)
    with torch.no_grad():
        latents = vae.encode(processor.preprocess([image])).latent_dist.mode()
        decoded_images = processor.postprocess(vae.decode(latents).sample, output_type="pil")
    assert np.abs(decoded(unet, unet.encode_images([image])).astype(int) - pixels(decoded_images)).max() <= 1


def test_a_half_precision_vae_that_overflows_encodes_in_full_and_stays_what_it_was():
    reference, half = unet_of("sdxl"), unet_of("sdxl")
    half.pipeline.vae.half()
    reference.pipeline.vae.half().float()
    image = picture(width=WIDTH, height=HEIGHT)
    assert torch.equal(half.encode_images([image]), reference.encode_images([image]))
    assert half.pipeline.vae.dtype == torch.float16


# Guides


def test_both_branches_of_a_batched_call_are_distinguished(unet):
    denoiser = unet.denoiser(unet.encode_prompts([BARN, LAKE]))
    plain, _ = calls_of(unet, [BARN, LAKE], guidance_scale=1.0)[0]
    guided, _ = calls_of(unet, [BARN, LAKE])[0]
    assert denoiser.branches(plain) == Branches(cond=range(2))
    assert denoiser.branches(guided) == Branches(cond=range(2, 4), uncond=range(2))
    assert torch.equal(guided["encoder_hidden_states"][2:4], unet.encode_prompts([BARN, LAKE])["prompt_embeds"])


def test_a_batch_of_more_branches_is_refused(unet):
    denoiser = unet.denoiser(unet.encode_prompts([BARN, LAKE]))
    with pytest.raises(aa.GuideError, match="called with 6 rows in a run of 2 pictures"):
        denoiser.branches({"sample": torch.zeros(6, 4, 7, 5)})


def test_reconditioning_takes_rows_and_leaves_the_call_as_it_was(unet):
    call, _ = calls_of(unet, [BARN, LAKE])[0]
    kept = dict(call)
    changed = unet.denoiser(unet.encode_prompts([BARN, LAKE])).with_prompt_embeds(
        call, [3, 2], unet.encode_separately([DUSK, LAKE])
    )
    other = unet.encode_prompts([DUSK, LAKE])
    assert torch.equal(changed["sample"], call["sample"][[3, 2]])
    torch.testing.assert_close(changed["encoder_hidden_states"], other["prompt_embeds"])
    if call["added_cond_kwargs"] is not None:
        torch.testing.assert_close(changed["added_cond_kwargs"]["text_embeds"], other["pooled_prompt_embeds"])
        assert changed["added_cond_kwargs"]["time_ids"].tolist() == [[HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]] * 2
    assert call == kept


def test_a_timestep_for_each_row_is_reconditioned_with_its_row(unet):
    denoiser = unet.denoiser(unet.encode_prompts([BARN, LAKE]))
    call, _ = calls_of(unet, [BARN, LAKE], guidance_scale=1.0)[0]
    call = {**call, "timestep": torch.tensor([900, 100])}
    assert denoiser.with_prompt_embeds(call, [1], unet.encode_separately([DUSK]))["timestep"].tolist() == [100]


def test_noise_levels_are_the_part_of_all_timesteps_and_fall(unet):
    denoiser = unet.denoiser(unet.encode_prompts([BARN]))
    levels = [denoiser.noise_level(call) for call, _ in calls_of(unet, BARN)]
    assert levels == [time / 1000 for time in unet.pipeline.scheduler.timesteps.tolist()]
    assert 1 > levels[0] > levels[1] > levels[2] > 0


def test_a_prediction_has_a_grid_of_latent_pixels(unet):
    denoiser = unet.denoiser(unet.encode_prompts([BARN]))
    _, noise = calls_of(unet, [BARN], guidance_scale=1.0)[0]
    assert noise.shape[2:] == denoiser.grid == GRID
    assert denoiser.broadcast_weights(torch.ones(GRID)).expand_as(noise[0]).shape == noise[0].shape


def test_the_twin_attending_plainly_is_the_original_bit_for_bit(unet):
    call, noise = calls_of(unet, [BARN, LAKE])[0]
    denoiser = unet.denoiser(unet.encode_prompts([BARN, LAKE]))
    with attending(denoiser, lambda _site: scaled_dot_product_attention):
        assert torch.equal(predicted(denoiser, call), noise)


@pytest.mark.parametrize("size", [(40, 56), (64, 64), (8, 24), (72, 8)])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_sites_are_all_cross_attention_in_order_each_with_its_own_grid(name, size):
    unet = unet_of(name, width=size[0], height=size[1])
    call, _ = calls_of(unet, [BARN, LAKE], guidance_scale=1.0)[0]
    denoiser = unet.denoiser(unet.encode_prompts([BARN, LAKE]))
    texts = [unet.encode_separately([DUSK, LAKE]), []]
    longer, spans = denoiser.append_prompts(call, texts, trim_padding=True)
    met = []

    def meeting(site):
        def attend(query, key, value):
            met.append(site.block)
            assert query.shape[2] == site.grid[0] * site.grid[1]
            assert key.shape[2] == 3 * LONGEST
            return scaled_dot_product_attention(query, key, value)

        return attend

    with attending(denoiser, meeting):
        predicted(denoiser, longer)
    crossing = [layer for path, layer in unet.module.named_modules() if path.endswith("attn2")]
    assert met == list(range(len(crossing)))
    assert {site.attention for site in denoiser.sites} == set(crossing)
    assert {site.kind for site in denoiser.sites} == {"cross"}
    assert spans[0] == tuple(Span("text", LONGEST, prompt) for prompt in range(3))
    assert spans[1] == (Span("text", LONGEST), Span("padding", 2 * LONGEST))
    assert torch.equal(longer["encoder_hidden_states"][:, :LONGEST], call["encoder_hidden_states"])
    appended = texts[0][1].conditioning["prompt_embeds"][0]
    assert torch.equal(longer["encoder_hidden_states"][0, 2 * LONGEST :], appended)


def test_a_level_in_the_middle_has_the_rows_and_columns_its_tokens_are_in():
    unet = unet_of("sdxl", width=40, height=24)  # 3 x 5 latent pixels, so 2 x 3 in the middle level, 1 x 2 in the last
    grids = [site.grid for site in unet.denoiser(unet.encode_prompts([BARN])).sites]
    assert grids == [(2, 3), *[(1, 2)] * 8, *[(2, 3)] * 2]


def test_layers_get_the_tokens_of_their_stream(unet):
    call, _ = calls_of(unet, [BARN], guidance_scale=1.0)[0]
    denoiser = unet.denoiser(unet.encode_prompts([BARN]))
    longer, _ = denoiser.append_prompts(call, [unet.encode_separately([DUSK])], trim_padding=True)
    counts = {"image": {site.grid[0] * site.grid[1] for site in denoiser.sites}, "text": {2 * LONGEST}}
    for name, shape in tokens_into_layers(denoiser, longer).items():
        stream = denoiser.token_stream(name)
        assert (len(shape) > 2) == (stream is not None), name  # two axes: of the noise level
        assert len(shape) != 4 or stream == "image", name  # pixels, of a convolution
        assert len(shape) != 3 or shape[1] in counts[stream], name


def test_a_region_too_small_for_the_coarsest_level_is_refused_before_anything_is_drawn():
    unet = unet_of("sdxl", width=512, height=512)
    denoiser = unet.denoiser(unet.encode_prompts([BARN]))
    assert denoiser.token_grid == (16, 16)
    speck = aa.Region(aa.Box(0.5, 0.5, 0.502, 0.502), DUSK)
    with (
        pytest.raises(aa.GuideError, match="of 16 x 16 image tokens"),
        under(aa.RegionalAttention(), denoiser, regions_of(unet, [speck])),
    ):
        pass


@pytest.mark.parametrize("guide", [OutputMix(), aa.RegionalAttention(isolation=APART)])
def test_a_region_everywhere_that_repeats_the_prompt_changes_nothing(unet, guide):
    call, noise = calls_of(unet, [BARN])[0]
    mixed = steered(unet, guide, call, [BARN], [aa.Region(FULL, BARN)])
    torch.testing.assert_close(mixed, noise)


def test_a_region_everywhere_is_read_as_if_it_were_the_only_prompt(unet):
    call, noise = calls_of(unet, [BARN], guidance_scale=1.0)[0]
    mixed = steered(unet, aa.RegionalAttention(isolation=APART), call, [BARN], [aa.Region(FULL, LAKE)])
    alone = {**call, "encoder_hidden_states": unet.encode_prompts([LAKE])["prompt_embeds"]}
    torch.testing.assert_close(mixed, predicted(unet.denoiser(unet.encode_prompts([BARN])), alone))
    assert not torch.allclose(mixed, noise, atol=1e-3)


def test_mixed_regions_change_their_place_in_their_row_alone(unet):
    call, noise = calls_of(unet, [BARN, LAKE])[0]
    mixed = steered(unet, OutputMix(), call, [BARN, LAKE], [aa.Region(LEFT, DUSK)], [])
    assert torch.equal(mixed[[0, 1, 3]], noise[[0, 1, 3]])
    assert torch.equal(mixed[2, :, :, 2:], noise[2, :, :, 2:])
    assert (mixed[2, :, :, :2] - noise[2, :, :, :2]).abs().min() > 0


def test_in_the_first_attention_regions_change_their_own_tokens_alone(unet):
    call, _ = calls_of(unet, [BARN], guidance_scale=1.0)[0]
    denoiser = unet.denoiser(unet.encode_prompts([BARN]))
    first = denoiser.sites[0]
    rows, columns = first.grid
    outputs = []
    with first.attention.register_forward_hook(lambda _module, _args, out: outputs.append(out)):
        for regions in ([], [aa.Region(LEFT, DUSK)]):
            with under(aa.RegionalAttention(), denoiser, regions_of(unet, regions)) if regions else nullcontext():
                predicted(denoiser, call)
    plain, guided = (output[0].unflatten(0, (rows, columns)) for output in outputs)
    reached = -(-columns * 2 // 5)
    torch.testing.assert_close(guided[:, reached:], plain[:, reached:])
    assert (guided[:, :1] - plain[:, :1]).abs().amax(-1).min() > 1e-5


def test_each_row_of_a_batch_has_its_own_regions(unet):
    call, noise = calls_of(unet, [BARN, LAKE], guidance_scale=1.0)[0]
    rows = [[aa.Region(LEFT, DUSK), aa.Region(FULL, LAKE)], [aa.Region(LEFT, BARN)]]
    together = steered(unet, aa.RegionalAttention(), call, [BARN, LAKE], *rows)
    for row, prompt in enumerate([BARN, LAKE]):
        alone = steered(unet, aa.RegionalAttention(), rows_of(call, [row]), [prompt], rows[row])
        torch.testing.assert_close(together[row : row + 1], alone)
        assert not torch.equal(together[row], noise[row])


@pytest.mark.parametrize("guide", [OutputMix(), aa.RegionalAttention()])
def test_guides_leave_no_trace(unet, guide):
    call, noise = calls_of(unet, [BARN], guidance_scale=1.0)[0]
    denoiser, regions = unet.denoiser(unet.encode_prompts([BARN])), regions_of(unet, [aa.Region(LEFT, LAKE)])
    before = hooks_of(unet.module), list(unet.module.attn_processors.values())
    steered(unet, guide, call, [BARN], [aa.Region(LEFT, LAKE)])
    with pytest.raises(ZeroDivisionError), under(guide, denoiser, regions):
        _ = 1 / 0
    assert (hooks_of(unet.module), list(unet.module.attn_processors.values())) == before
    assert torch.equal(predicted(denoiser, call), noise)


# Refusals


def test_a_prompt_longer_than_clip_reads_is_warned_of_with_the_words_cut(unet):
    with pytest.warns(UserWarning, match=r"CLIP reads 32 tokens .* has 33: cut off is 't'. Shorten it.$"):
        unet.encode_prompts(["a barn and a house in deep deep snow, at"])


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_pipeline_without_an_encoder_is_refused(name):
    pipeline = FAMILIES[name][1]()
    pipeline.text_encoder = None
    with pytest.raises(aa.ModelError, match=r"loaded without \['text_encoder'\]"):
        unet_of(name, pipeline)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 36}, "36 x 56 pixels is not whole image tokens.* multiples of 8"),
        ({"true_cfg_scale": 2.0}, "true_cfg_scale=2.0 would be ignored"),
        ({"negative_prompt": "fog", "guidance_scale": 1.0}, "negative_prompt='fog' would be ignored"),
        ({"max_sequence_length": 31}, "max_sequence_length=31 would be ignored: CLIP always reads 32 tokens"),
    ],
)
def test_what_would_be_ignored_or_fail_later_is_refused_at_once(options, message):
    with pytest.raises(aa.ModelError, match=message):
        unet_of("sd15", **options)


def test_a_negative_prompt_for_a_distilled_unet_is_refused():
    with pytest.raises(aa.ModelError, match=r"without classifier-free guidance at guidance_scale=7\.5"):
        unet_of("sd15", tiny_sd15(guidance_width=8), negative_prompt="fog")


def test_encoding_a_picture_of_another_size_is_refused(unet):
    with pytest.raises(aa.ModelError, match="56 x 40 pixels cannot be encoded at 40 x 56"):
        unet.encode_images([picture(width=56, height=40)])


def test_a_foreign_processor_is_refused_by_name():
    unet = unet_of("sd15")
    unet.module.fuse_qkv_projections()
    denoiser = unet.denoiser(unet.encode_prompts([BARN]))
    with pytest.raises(aa.GuideError, match=r"uses FusedAttnProcessor2_0.* Expected AttnProcessor2_0"):
        denoiser.processor(denoiser.sites[0], scaled_dot_product_attention)


def test_the_error_names_what_takes_attention_slicing_off_again(unet):
    pipeline = unet.pipeline
    draw = synthesizer_of(unet, guide=aa.RegionalAttention(), steps=1).synthesize
    plan = aa.Plan("a cat", (aa.Region(aa.Box(0, 0, 0.5, 1), "a dog"),))
    pipeline.enable_attention_slicing()
    try:
        with pytest.raises(
            aa.GuideError, match=r"SlicedAttnProcessor.*call pipeline\.disable_attention_slicing\(\) first"
        ):
            draw(plan, seed=0)
    finally:
        pipeline.disable_attention_slicing()
    draw(plan, seed=0)


def test_a_mask_over_prompts_is_refused(unet):
    call, _ = calls_of(unet, [BARN], guidance_scale=1.0)[0]
    denoiser = unet.denoiser(unet.encode_prompts([BARN]))
    with (
        attending(denoiser, lambda _site: scaled_dot_product_attention),
        pytest.raises(aa.GuideError, match="given an encoder_attention_mask"),
    ):
        predicted(denoiser, {**call, "encoder_attention_mask": torch.ones(1, LONGEST)})


CONVOLUTIONS = (
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
    "up_blocks.1.upsamplers.0.conv",
    "conv_in",
)


def conv_lora(unet, *names):
    generator = torch.Generator().manual_seed(3)
    layers = {}
    for name in names:
        outputs, *rest = unet.get_submodule(name).weight.shape
        down = 0.3 * torch.randn(2, *rest, generator=generator)
        layers[name] = aa.LowRank(down, 0.3 * torch.randn(outputs, 2, generator=generator))
    return aa.LoRA(layers)


@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize("guide", ["attention", "mixing"])
@pytest.mark.parametrize(
    ("tiny", "name"), [*((tiny_sd15, name) for name in CONVOLUTIONS), (tiny_sdxl, "down_blocks.0.resnets.0.conv1")]
)
def test_a_lora_of_convolutions_in_a_region_of_everything_acts_as_on_the_whole_picture(tiny, name, guide, scale):
    """Under guidance too: the negative branch has the LoRA as well, else guidance would multiply its effect."""
    pipeline = tiny()
    lora = conv_lora(pipeline.unet, name)
    sides = {"width": 64, "height": 64, "steps": 2, "guidance_scale": scale}
    reference = (
        DiffusersSynthesizer(pipeline=pipeline, **sides).with_lora(lora).synthesize(aa.Plan("a red cone"), seed=0)
    )
    guides = {
        "attention": aa.RegionalAttention(isolation=APART, loras={"anna": lora}),
        "mixing": aa.OutputMix(loras={"anna": lora}),
    }
    region = aa.Region(aa.Box(0, 0, 1, 1), "a red cone", lora="anna", weight=1e4 if guide == "mixing" else 1.0)
    plan = aa.Plan("a red cone", (region,))
    regional = DiffusersSynthesizer(pipeline=pipeline, guide=guides[guide], **sides).synthesize(plan, seed=0)
    plain = DiffusersSynthesizer(pipeline=pipeline, **sides).synthesize(aa.Plan("a red cone"), seed=0)
    found, expected, before = (np.asarray(image, dtype=int) for image in (regional, reference, plain))
    assert abs(found - expected).max() <= 2
    assert abs(expected - before).max() > 4


def test_a_lora_of_a_convolution_stays_in_its_region():
    pipeline = tiny_sd15()
    lora = conv_lora(pipeline.unet, "conv_out")  # after which nothing mixes pixels
    outputs = []
    pipeline.unet.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    sides = {"width": 64, "height": 64, "steps": 1}
    for lora_name, loras in ((None, {}), ("anna", {"anna": lora})):
        guide = aa.RegionalAttention(isolation=APART, loras=loras)
        left, right = aa.Box(0, 0, 0.5, 1), aa.Box(0.5, 0, 1, 1)
        plan = aa.Plan("a cone", (aa.Region(left, "a red cone", lora=lora_name), aa.Region(right, "a blue cube")))
        DiffusersSynthesizer(pipeline=pipeline, guide=guide, **sides).synthesize(plan, seed=0)
    before, after = outputs[0], outputs[-1]
    apart = (after - before).abs().amax((0, 1, 2))
    middle = len(apart) // 2
    assert apart[:middle].min() > 0
    assert apart[middle:].max() == 0
