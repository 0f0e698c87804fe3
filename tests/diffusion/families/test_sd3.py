"""What artaug knows of SD3 and SD3.5, against what diffusers does."""

import dataclasses
import inspect
import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch.nn.functional import scaled_dot_product_attention

import artaug as aa
from artaug.diffusion.families.sd3.family import StableDiffusion3
from artaug.regional import Branches, EncodedRegion, OutputMix, Span
from artaug.training import FlowMatching
from support.family_runs import (
    attending,
    calls_of,
    drawn_by_artaug,
    drawn_by_pipeline,
    picture,
    predicted,
    tokens_into_layers,
)
from support.guiding import under
from support.tiny_clip import LONGEST
from support.tiny_sd3 import tiny_sd3
from support.traces import hooks_of

WIDTH, HEIGHT = 24, 32
GRID = (8, 6)
BARN, LAKE, DUSK = "a red barn", "a lake", "at dusk"
LEFT, FULL = aa.Box(0, 0, 0.5, 1), aa.Box(0, 0, 1, 1)
APART = aa.Isolation(base_weight=0.0)


def sd3_of(pipeline, **options):
    defaults = {"width": WIDTH, "height": HEIGHT, "guidance_scale": None}
    defaults |= {"negative_prompt": None, "true_cfg_scale": 1.0, "max_sequence_length": 24}
    return StableDiffusion3(pipeline=pipeline, **{**defaults, **options})


@pytest.fixture(scope="module", params=["sd3", "sd3.5", "without T5"])
def pipeline(request):
    return tiny_sd3(is_35=request.param == "sd3.5", has_t5=request.param != "without T5")


@pytest.fixture
def sd3(pipeline):
    return sd3_of(pipeline)


def first_call(sd3, prompts, **options):
    return calls_of(sd3, prompts, max_sequence_length=sd3.max_sequence_length, **options)[0]


def regions_of(sd3, *pictures):
    return [
        [EncodedRegion(region, *sd3.encode_separately([region.prompt])) for region in regions] for regions in pictures
    ]


def steered(sd3, guide, call, prompts, *pictures):
    """The prediction of one call with a guide at work."""
    denoiser = sd3.denoiser(sd3.encode_prompts(prompts))
    with under(guide, denoiser, regions_of(sd3, *pictures)):
        return predicted(denoiser, call)


# Drawing and encoding


def test_prompts_are_encoded_as_the_pipeline_encodes_them(sd3):
    call, _ = first_call(sd3, [BARN, LAKE], guidance_scale=1.0)
    encoded = sd3.encode_prompts([BARN, LAKE])
    assert torch.equal(encoded["prompt_embeds"], call["encoder_hidden_states"])
    assert torch.equal(encoded["pooled_prompt_embeds"], call["pooled_projections"])
    assert not encoded["prompt_embeds"].requires_grad


@pytest.mark.parametrize("prompts", [[BARN], [BARN, LAKE]], ids=["one", "two"])
@pytest.mark.parametrize(
    ("scale", "negative"), [(None, None), (4.0, "fog"), (1.0, None)], ids=["default", "negative", "without"]
)
def test_artaug_draws_what_the_pipeline_draws_bit_for_bit(pipeline, prompts, scale, negative):
    guidance = {} if negative is None else {"negative_prompt": [negative] * len(prompts)}
    guidance |= {} if scale is None else {"guidance_scale": scale}
    size = {"width": WIDTH, "height": HEIGHT, "max_sequence_length": 24}
    expected = drawn_by_pipeline(pipeline, prompts, **guidance, **size)
    plans = [aa.Plan(prompt) for prompt in prompts]
    drawn = drawn_by_artaug(StableDiffusion3, pipeline, plans, guidance_scale=scale, negative_prompt=negative, **size)
    assert np.array_equal(drawn, expected)


def test_the_default_guidance_scale_is_the_pipelines_own():
    recommended = inspect.signature(StableDiffusion3Pipeline.__call__).parameters["guidance_scale"].default
    sd3 = sd3_of(tiny_sd3())
    assert sd3.pipeline_kwargs({}, None)["guidance_scale"] == recommended
    assert sd3.negative == ""


def test_words_are_all_of_clips_and_the_words_of_t5(sd3):
    (tokens,) = sd3.token_slices([BARN])
    assert tokens == slice(0, LONGEST + len("_a_red_barn") + 1 if sd3.pipeline.text_encoder_3 else LONGEST)


def test_what_a_pipeline_without_t5_reads_in_its_place_is_zeros():
    encoded = sd3_of(tiny_sd3(has_t5=False)).encode_prompts([BARN])["prompt_embeds"]
    assert encoded.shape == (1, LONGEST + 24, 24)
    assert not encoded[:, LONGEST:].any()


# Training


def test_training_predicts_what_drawing_predicts_bit_for_bit(sd3):
    call, velocity = first_call(sd3, [BARN, LAKE], guidance_scale=1.0)
    sigmas = sd3.pipeline.scheduler.sigmas[:1].expand(2)
    with torch.no_grad():
        guess = sd3.predict(call["hidden_states"], sigmas, sd3.encode_prompts([BARN, LAKE]))
    assert torch.equal(guess, velocity)


def test_a_prediction_has_the_type_of_the_latents_and_carries_gradient():
    sd3 = sd3_of(tiny_sd3().to(torch.bfloat16))
    guess = sd3.predict(torch.randn(1, 4, 16, 12), torch.tensor([0.5]), sd3.encode_prompts([BARN]))
    assert guess.dtype == torch.float32
    assert guess.requires_grad


def test_latents_are_shifted_and_scaled_so_that_the_pipeline_decodes_them():
    sd3 = sd3_of(tiny_sd3())
    images = [picture(seed, width=WIDTH, height=HEIGHT) for seed in (1, 2)]
    latents, vae = sd3.encode_images(images), sd3.pipeline.vae
    with torch.no_grad():
        expected = vae.encode(sd3.pipeline.image_processor.preprocess(images)).latent_dist.mode()
    assert latents.shape == (2, 4, 16, 12)
    # as the pipeline undoes it before it decodes
    torch.testing.assert_close(latents / vae.config.scaling_factor + vae.config.shift_factor, expected)


@pytest.mark.parametrize("dynamic_shift", [False, True])
def test_training_shifts_noise_levels_as_the_scheduler_does(dynamic_shift):
    sd3 = sd3_of(tiny_sd3(dynamic_shift=dynamic_shift))
    calls_of(sd3, BARN, max_sequence_length=24)
    scheduler = sd3.pipeline.scheduler
    middle = (1 + scheduler.sigma_min) / 2  # three steps, which the scheduler shifts from even levels
    shift = sd3.noise_schedule.shift
    assert scheduler.sigmas[1].item() == pytest.approx(shift * middle / (1 + (shift - 1) * middle), rel=1e-6)
    if not dynamic_shift:
        assert sd3.noise_schedule == FlowMatching(shift=3.0)


# Guides


def test_both_branches_of_a_batched_call_are_distinguished(sd3):
    denoiser = sd3.denoiser(sd3.encode_prompts([BARN, LAKE]))
    plain, _ = first_call(sd3, [BARN, LAKE], guidance_scale=1.0)
    guided, _ = first_call(sd3, [BARN, LAKE], negative_prompt=["fog", "fog"])
    assert denoiser.branches(plain) == Branches(cond=range(2))
    assert denoiser.branches(guided) == Branches(cond=range(2, 4), uncond=range(2))
    encoded = sd3.encode_prompts([BARN, LAKE])["prompt_embeds"]
    assert torch.equal(guided["encoder_hidden_states"][2:4], encoded)


def test_a_batch_of_more_branches_is_refused(sd3):
    denoiser = sd3.denoiser(sd3.encode_prompts([BARN, LAKE]))
    with pytest.raises(aa.GuideError, match="called with 6 rows in a run of 2 pictures"):
        denoiser.branches({"hidden_states": torch.zeros(6, 4, 16, 12)})


def test_reconditioning_takes_rows_and_leaves_the_call_as_it_was(sd3):
    call, _ = first_call(sd3, [BARN, LAKE], negative_prompt=["fog", "fog"])
    kept = dict(call)
    changed = sd3.denoiser(sd3.encode_prompts([BARN, LAKE])).with_prompt_embeds(
        call, [3, 2], sd3.encode_separately([DUSK, LAKE])
    )
    other = sd3.encode_prompts([DUSK, LAKE])
    assert torch.equal(changed["hidden_states"], call["hidden_states"][[3, 2]])
    torch.testing.assert_close(changed["encoder_hidden_states"], other["prompt_embeds"])
    torch.testing.assert_close(changed["pooled_projections"], other["pooled_prompt_embeds"])
    assert changed["timestep"].shape == (2,)
    assert call == kept


def test_noise_levels_are_the_schedulers_sigmas_and_fall(sd3):
    denoiser = sd3.denoiser(sd3.encode_prompts([BARN]))
    levels = [denoiser.noise_level(call) for call, _ in calls_of(sd3, BARN, max_sequence_length=24)]
    assert levels == pytest.approx(sd3.pipeline.scheduler.sigmas[:-1].tolist())
    assert 1 >= levels[0] > levels[1] > levels[2] > 0


def test_a_prediction_has_a_grid_of_latent_pixels_and_attention_one_of_patches(sd3):
    denoiser = sd3.denoiser(sd3.encode_prompts([BARN]))
    _, velocity = first_call(sd3, [BARN])
    assert velocity.shape[2:] == denoiser.grid == (16, 12)
    assert denoiser.token_grid == GRID
    assert denoiser.broadcast_weights(torch.ones(denoiser.grid)).expand_as(velocity[0]).shape == velocity[0].shape


def test_the_twin_attending_plainly_is_the_original_bit_for_bit(sd3):
    call, velocity = first_call(sd3, [BARN, LAKE], negative_prompt=["fog", "fog"])
    denoiser = sd3.denoiser(sd3.encode_prompts([BARN, LAKE]))
    with attending(denoiser, lambda _site: scaled_dot_product_attention):
        assert torch.equal(predicted(denoiser, call), velocity)


@pytest.mark.parametrize("trim_padding", [True, False])
def test_spans_name_the_sequence_that_attention_sees(sd3, trim_padding):
    call, _ = first_call(sd3, [BARN, LAKE], guidance_scale=1.0)
    denoiser = sd3.denoiser(sd3.encode_prompts([BARN, LAKE]))
    texts = [sd3.encode_separately([DUSK, LAKE]), []]
    longer, spans = denoiser.append_prompts(call, texts, trim_padding=trim_padding)
    lengths = []

    def seeing(_site):
        def attend(query, key, value):
            lengths.append((query.shape[2], key.shape[2]))
            return scaled_dot_product_attention(query, key, value)

        return attend

    with attending(denoiser, seeing):
        predicted(denoiser, longer)
    whole = LONGEST + 24
    of_texts = [text.token_slice.stop if trim_padding else whole for text in texts[0]]
    assert spans[0] == (
        Span("image", 48),
        Span("text", whole),
        *(Span("text", n, i) for i, n in enumerate(of_texts, 1)),
    )
    assert spans[1] == (Span("image", 48), Span("text", whole), Span("padding", sum(of_texts)))
    assert lengths == [(48 + whole + sum(of_texts),) * 2] * 3
    for number, row in enumerate(longer["encoder_hidden_states"]):
        assert torch.equal(row[:whole], call["encoder_hidden_states"][number])
    assert torch.equal(
        longer["encoder_hidden_states"][0, whole : whole + of_texts[0]],
        texts[0][0].conditioning["prompt_embeds"][0, : of_texts[0]],
    )


def test_the_image_alone_is_no_site(sd3):
    sites = sd3.denoiser(sd3.encode_prompts([BARN])).sites
    assert [site.block for site in sites] == [0, 1, 2]
    assert all(site.attention is block.attn for site, block in zip(sites, sd3.module.transformer_blocks, strict=True))


def test_layers_get_the_tokens_of_their_stream(sd3):
    call, _ = first_call(sd3, [BARN], guidance_scale=1.0)
    denoiser = sd3.denoiser(sd3.encode_prompts([BARN]))
    longer, _ = denoiser.append_prompts(call, [sd3.encode_separately([DUSK])], trim_padding=True)
    counts = {"image": 48, "text": longer["encoder_hidden_states"].shape[1]}
    for name, shape in tokens_into_layers(denoiser, longer).items():
        if len(shape) == 4:  # the convolution that makes tokens of latent pixels
            assert (name, denoiser.token_stream(name)) == ("pos_embed.proj", "image")
            continue
        of_tokens = len(shape) == 3
        assert of_tokens == (denoiser.token_stream(name) is not None), name
        assert not of_tokens or shape[1] == counts[denoiser.token_stream(name)], name


@pytest.mark.parametrize("guide", [OutputMix(), aa.RegionalAttention(isolation=APART, trim_padding=False)])
def test_a_region_everywhere_that_repeats_the_prompt_changes_nothing(sd3, guide):
    call, velocity = first_call(sd3, [BARN], negative_prompt=["fog"])
    mixed = steered(sd3, guide, call, [BARN], [aa.Region(FULL, BARN)])
    torch.testing.assert_close(mixed, velocity)


def test_a_region_everywhere_is_read_as_if_it_were_the_only_prompt(sd3):
    call, _ = first_call(sd3, [BARN], guidance_scale=1.0)
    guide = aa.RegionalAttention(isolation=APART, trim_padding=False)
    mixed = steered(sd3, guide, call, [BARN], [aa.Region(FULL, LAKE)])
    alone = {**call, "encoder_hidden_states": sd3.encode_prompts([LAKE])["prompt_embeds"]}
    torch.testing.assert_close(mixed, predicted(sd3.denoiser(sd3.encode_prompts([BARN])), alone))


def test_mixed_regions_change_their_place_in_their_row_alone(sd3):
    call, velocity = first_call(sd3, [BARN, LAKE], negative_prompt=["fog", "fog"])
    mixed = steered(sd3, OutputMix(), call, [BARN, LAKE], [aa.Region(LEFT, DUSK)], [])
    assert torch.equal(mixed[[0, 1, 3]], velocity[[0, 1, 3]])
    assert torch.equal(mixed[2, :, :, 6:], velocity[2, :, :, 6:])
    assert (mixed[2, :, :, :6] - velocity[2, :, :, :6]).abs().min() > 0


def test_each_row_of_a_batch_has_its_own_regions(sd3):
    call, velocity = first_call(sd3, [BARN, LAKE], guidance_scale=1.0)
    rows = [[aa.Region(LEFT, DUSK), aa.Region(FULL, LAKE)], [aa.Region(LEFT, BARN)]]
    together = steered(sd3, aa.RegionalAttention(), call, [BARN, LAKE], *rows)
    for row, prompt in enumerate([BARN, LAKE]):
        single = {name: value[row : row + 1] if torch.is_tensor(value) else value for name, value in call.items()}
        alone = steered(sd3, aa.RegionalAttention(), single, [prompt], rows[row])
        torch.testing.assert_close(together[row : row + 1], alone)
        assert not torch.allclose(together[row], velocity[row], atol=1e-3)


@pytest.mark.parametrize("guide", [OutputMix(), aa.RegionalAttention()])
def test_guides_leave_no_trace(sd3, guide):
    call, velocity = first_call(sd3, [BARN], guidance_scale=1.0)
    before = hooks_of(sd3.module), list(sd3.module.attn_processors.values())
    steered(sd3, guide, call, [BARN], [aa.Region(LEFT, LAKE)])
    with (
        pytest.raises(ZeroDivisionError),
        under(guide, sd3.denoiser(sd3.encode_prompts([BARN])), regions_of(sd3, [aa.Region(LEFT, LAKE)])),
    ):
        _ = 1 / 0
    assert (hooks_of(sd3.module), list(sd3.module.attn_processors.values())) == before
    assert torch.equal(predicted(sd3.denoiser(sd3.encode_prompts([BARN])), call), velocity)


# Refusals


def test_a_prompt_longer_than_its_readers_is_warned_of_with_the_words_cut():
    sd3 = sd3_of(tiny_sd3(), max_sequence_length=12)
    with pytest.warns(UserWarning, match="T5 reads 12 tokens and .* has 21: cut off is 'by night'. Shorten it, or"):
        sd3.encode_prompts(["a red barn by night"])
    with pytest.warns(UserWarning, match=r"CLIP reads 32 tokens .* has 33: cut off is 't'. Shorten it; T5 still"):
        dataclasses.replace(sd3, max_sequence_length=64).encode_prompts(["a barn and a house in deep deep snow, at"])


def test_without_t5_nothing_reads_what_clip_does_not():
    sd3 = sd3_of(tiny_sd3(has_t5=False), max_sequence_length=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd3.encode_prompts(["a red barn by night"])
    with pytest.warns(UserWarning, match=r"cut off is 't'. Shorten it.$"):
        sd3.encode_prompts(["a barn and a house in deep deep snow, at"])


def test_a_pipeline_without_a_clip_is_refused():
    pipeline = tiny_sd3()
    pipeline.text_encoder_2 = None
    with pytest.raises(aa.ModelError, match=r"loaded without \['text_encoder_2'\]"):
        sd3_of(pipeline)


def test_t5_without_its_tokenizer_is_refused():
    pipeline = tiny_sd3()
    pipeline.tokenizer_3 = None
    with pytest.raises(aa.ModelError, match=r"loaded without \['tokenizer_3'\]"):
        sd3_of(pipeline)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 26}, "26 x 32 pixels is not whole image tokens.* multiples of 4"),
        ({"width": 52}, "52 x 32 pixels is larger than this SD3 has positions for: at most 48 pixels on a side"),
        ({"true_cfg_scale": 2.0}, "true_cfg_scale=2.0 would be ignored"),
        ({"negative_prompt": "fog", "guidance_scale": 1.0}, "negative_prompt='fog' would be ignored"),
        ({"max_sequence_length": 513}, "max_sequence_length=513: SD3 reads 1 to 512"),
        ({"max_sequence_length": 0}, "max_sequence_length=0: SD3 reads 1 to 512"),
    ],
)
def test_what_would_be_ignored_or_fail_later_is_refused_at_once(options, message):
    with pytest.raises(aa.ModelError, match=message):
        sd3_of(tiny_sd3(), **options)


def test_encoding_a_picture_of_another_size_is_refused():
    with pytest.raises(aa.ModelError, match="32 x 24 pixels cannot be encoded at 24 x 32"):
        sd3_of(tiny_sd3()).encode_images([picture(width=32, height=24)])


def test_fused_projections_are_refused_by_name():
    sd3 = sd3_of(tiny_sd3())
    sd3.module.fuse_qkv_projections()
    denoiser = sd3.denoiser(sd3.encode_prompts([BARN]))
    with pytest.raises(aa.GuideError, match=r"uses FusedJointAttnProcessor2_0.* Expected JointAttnProcessor2_0"):
        denoiser.processor(denoiser.sites[0], scaled_dot_product_attention)


def test_a_mask_that_sd3_would_drop_is_refused():
    sd3 = sd3_of(tiny_sd3())
    call, _ = first_call(sd3, [BARN], guidance_scale=1.0)
    denoiser = sd3.denoiser(sd3.encode_prompts([BARN]))
    masked = {**call, "joint_attention_kwargs": {"attention_mask": torch.ones(1, 1)}}
    with (
        attending(denoiser, lambda _site: scaled_dot_product_attention),
        pytest.raises(aa.GuideError, match="given an attention_mask, which it drops"),
    ):
        predicted(denoiser, masked)
