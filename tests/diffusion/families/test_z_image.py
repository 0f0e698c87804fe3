"""What artaug knows of Z-Image, against what diffusers does."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.nn.functional import scaled_dot_product_attention

import artaug as aa
from artaug.diffusion.families.z_image.family import ZImage
from artaug.regional import Branches, EncodedRegion, OutputMix, Span
from artaug.regional.isolation import Isolation
from artaug.training.noise_schedule import FlowMatching
from support.family_laws import (
    drawn_by_pipeline,
    family_of,
    guided,
    picture,
    pipeline_calls,
    predict_call,
    recorded_run,
    region_replaces_plan,
    span_slices,
    synthesizer_of,
    token_streams_of,
    with_processors,
)
from support.guiding import under
from support.tiny_z_image import tiny_z_image
from support.traces import hooks_of

LONG = "a red barn beside a long white fence"
PROMPTS = [LONG, "a lake"]
LEFT, RIGHT, FULL = aa.Box(0, 0, 0.5, 1), aa.Box(0.5, 0, 1, 1), aa.Box(0, 0, 1, 1)
IMAGE = (Span("image", 48), Span("reference", 16))


def z_image_of(**options):
    return family_of(ZImage, tiny_z_image(), **{"max_sequence_length": 96, **options})


@pytest.fixture(scope="module", params=[0.0, 5.0], ids=["turbo", "guided"])
def z_image(request):
    return z_image_of(guidance_scale=request.param)


def test_prompts_are_encoded_as_the_pipeline_encodes_them(z_image):
    call, _ = pipeline_calls(z_image, PROMPTS, guidance_scale=0.0)[0]
    encoded = z_image.encode_prompts(PROMPTS)
    lengths = encoded["prompt_embeds_mask"].sum(dim=1).tolist()
    assert lengths == [tokens.stop for tokens in z_image.token_slices(PROMPTS)]
    for row, length, expected in zip(encoded["prompt_embeds"], lengths, call["cap_feats"], strict=True):
        assert torch.equal(row[:length], expected)
    assert not encoded["prompt_embeds"].requires_grad


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 0.0}, {"guidance_scale": 3.0, "negative_prompt": "blurry"}])
def test_a_plain_plan_draws_what_the_pipeline_draws_bit_for_bit(options, prompts):
    z_image = z_image_of(**options)
    seeds = range(3, 3 + len(prompts))
    drawn = synthesizer_of(z_image).synthesize_batch([aa.Plan(prompt) for prompt in prompts], seeds=seeds)
    repeated = {
        name: [option] * len(prompts) if isinstance(option, str) else option for name, option in options.items()
    }
    assert drawn == drawn_by_pipeline(z_image, prompts, seeds=seeds, **repeated)


def test_training_predicts_what_drawing_predicts_bit_for_bit(z_image):
    for prompts in (PROMPTS[:1], PROMPTS):
        call, (against,) = pipeline_calls(z_image, prompts, guidance_scale=0.0)[0]
        with torch.no_grad():
            noisy = torch.stack(call["x"]).squeeze(2)
            predicted = z_image.predict(noisy, 1 - call["t"], z_image.encode_prompts(prompts))
        assert torch.equal(predicted, -torch.stack(against).squeeze(2))


def test_a_prediction_is_the_velocity_a_scheduler_steps_along():
    z_image = z_image_of(guidance_scale=0.0)
    calls = pipeline_calls(z_image, PROMPTS[:1], guidance_scale=0.0)
    (first, _), (second, _) = calls
    with torch.no_grad():
        velocity = z_image.predict(first["x"][0].transpose(0, 1), 1 - first["t"], z_image.encode_prompts(PROMPTS[:1]))
    step = (first["t"] - second["t"]).item()  # of sigma, which falls as t rises
    torch.testing.assert_close(second["x"][0].transpose(0, 1), first["x"][0].transpose(0, 1) + step * velocity)


def test_a_prediction_has_the_type_of_the_latents_and_carries_gradient():
    z_image = family_of(ZImage, tiny_z_image().to(torch.bfloat16))
    predicted = z_image.predict(torch.randn(1, 4, 16, 12), torch.tensor([0.5]), z_image.encode_prompts(["a barn"]))
    assert predicted.dtype == torch.float32
    assert predicted.requires_grad


def test_latents_are_scaled_so_that_the_pipeline_decodes_them():
    z_image = z_image_of()
    images = [picture(1), picture(2)]
    latents = z_image.encode_images(images)
    vae = z_image.pipeline.vae
    with torch.no_grad():
        expected = vae.encode(z_image.pipeline.image_processor.preprocess(images)).latent_dist.mode()
    assert latents.shape == (2, 4, 16, 12)
    torch.testing.assert_close(latents / vae.config.scaling_factor + vae.config.shift_factor, expected)


def test_encoding_a_picture_of_another_size_is_refused():
    with pytest.raises(aa.ModelError, match="32 x 24 pixels cannot be encoded at 24 x 32"):
        z_image_of().encode_images([picture(), picture(width=32, height=24)])


@pytest.mark.parametrize("dynamic_shift", [False, True])
def test_training_shifts_noise_levels_as_the_scheduler_does(dynamic_shift):
    z_image = family_of(ZImage, tiny_z_image(dynamic_shift=dynamic_shift), width=32, height=32)
    pipeline_calls(z_image, ["a"])  # two steps, which the scheduler shifts from 1 and 1/2
    _, sampled, _ = z_image.pipeline.scheduler.sigmas.tolist()
    shift = z_image.noise_schedule.shift
    assert sampled == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), rel=1e-6)
    if not dynamic_shift:
        assert z_image.noise_schedule == FlowMatching(shift=3.0)


def test_both_branches_come_in_one_call(z_image):
    denoiser, calls = recorded_run(z_image, PROMPTS)
    expected = Branches(cond=range(2), uncond=range(2, 2 if z_image.negative is None else 4))
    assert [denoiser.branches(call) for call, _ in calls] == [expected] * 2


def test_noise_falls_from_one_towards_zero(z_image):
    denoiser, calls = recorded_run(z_image, PROMPTS, steps=4)
    levels = [denoiser.noise_level(call) for call, _ in calls]
    assert levels[0] == 1
    assert levels == sorted(set(levels), reverse=True)
    assert all(0 <= level <= 1 for level in levels)


def test_reconditioning_takes_rows_and_leaves_the_call_as_it_was(z_image):
    denoiser, calls = recorded_run(z_image, ["a", "b", LONG])
    call, output = calls[0]
    kept = dict(call)
    same = denoiser.with_prompt_embeds(call, [2, 0], z_image.encode_separately([LONG, "a"]))
    predicted = denoiser.prediction(output)
    torch.testing.assert_close(predict_call(denoiser, same), predicted[[2, 0]], atol=1e-5, rtol=1e-4)
    other = denoiser.with_prompt_embeds(call, [2], z_image.encode_separately(["x"]))
    assert not torch.allclose(predict_call(denoiser, other), predicted[[2]], atol=1e-4)
    assert call == kept


@pytest.mark.parametrize("return_dict", [True, False])
def test_an_output_keeps_its_type_with_another_prediction_in_it(return_dict):
    denoiser, calls = recorded_run(z_image_of(guidance_scale=0.0), PROMPTS, steps=1)
    with torch.no_grad():
        output = denoiser.module(**{**calls[0][0], "return_dict": return_dict})
    other = denoiser.with_prediction(output, 2 * denoiser.prediction(output))
    assert type(other) is type(output)
    assert isinstance(other[0], list)
    assert torch.equal(denoiser.prediction(other), 2 * denoiser.prediction(output))


def test_twins_that_attend_plainly_predict_the_same_bit_for_bit():
    denoiser, calls = recorded_run(z_image_of(guidance_scale=0.0), PROMPTS[:1])
    call, output = calls[0]
    with with_processors(denoiser) as attentions:
        assert torch.equal(predict_call(denoiser, call), denoiser.prediction(output))
    assert [(site.block, site.kind) for site, _, _ in attentions] == [(0, "text"), (1, "joint"), (2, "joint")]


def test_no_added_texts_change_nothing_bit_for_bit():
    z_image = z_image_of(guidance_scale=0.0)
    denoiser, calls = recorded_run(z_image, PROMPTS[:1])
    call, output = calls[0]
    changed, spans = denoiser.append_prompts(call, [[]], trim_padding=True)
    with with_processors(denoiser):
        assert torch.equal(predict_call(denoiser, changed), denoiser.prediction(output))
    assert spans == [(*IMAGE, Span("text", 64))]


def added(z_image, *, trim_padding):
    """A call with other texts for every row, those for the negative prompt included."""
    denoiser, calls = recorded_run(z_image, PROMPTS)
    row_texts = [["a door", "ivy"], ["a stormy sky"], ["dull"], []][: len(calls[0][0]["x"])]
    texts = [z_image.encode_separately(row_prompts) for row_prompts in row_texts]
    return denoiser, calls[0], texts, *denoiser.append_prompts(calls[0][0], texts, trim_padding=trim_padding)


@pytest.mark.parametrize("trim_padding", [False, True])
def test_spans_name_every_token_attention_sees(z_image, trim_padding):
    denoiser, (call, _), texts, changed, spans = added(z_image, trim_padding=trim_padding)
    with with_processors(denoiser) as attentions:
        predict_call(denoiser, changed)
    for site, query, _ in attentions:
        kinds = {"text", "padding"} if site.kind == "text" else {"image", "reference", "text", "padding"}
        assert {sum(span.length for span in row_spans if span.kind in kinds) for row_spans in spans} == {query.shape[2]}
    for own, row_prompts, row_spans in zip(call["cap_feats"], texts, spans, strict=True):
        assert row_spans[:2] == IMAGE
        lengths = [len(own), *(text.token_slice.stop for text in row_prompts)]
        padded = [-(-length // 32) * 32 for length in lengths]
        assert [span.length for span, _ in span_slices(row_spans, "text")] == (
            [padded[0], *lengths[1:]] if trim_padding else padded
        )
        assert [span.prompt for span, _ in span_slices(row_spans, "text")] == list(range(len(lengths)))


@pytest.mark.parametrize("trim_padding", [False, True])
def test_every_token_is_where_it_would_be_if_its_prompt_were_the_only_one(z_image, trim_padding):
    denoiser, (call, _), texts, changed, spans = added(z_image, trim_padding=trim_padding)
    joined = keys(denoiser, changed)
    for row, row_prompts in enumerate(texts):
        (prompt,) = z_image.encode_separately([(*PROMPTS, "", "")[row]])
        plain = [of_site[0] for of_site in keys(denoiser, denoiser.with_prompt_embeds(call, [row], [prompt]))]
        torch.testing.assert_close(joined[1][row][:, :64], plain[1][:, :64], atol=1e-5, rtol=1e-5)
        own, *others = (part for _, part in span_slices(spans[row][2:], "text"))
        torch.testing.assert_close(joined[0][row][:, own], plain[0], atol=1e-5, rtol=1e-5)
        for text, part in zip(row_prompts, others, strict=True):
            alone = keys(denoiser, denoiser.with_prompt_embeds(call, [row], [text]))[0][0]
            length = part.stop - part.start
            torch.testing.assert_close(joined[0][row][:, part], alone[:, :length], atol=1e-5, rtol=1e-5)


def keys(denoiser, call):
    """The keys of the first layers: where texts are among themselves, and where they meet the image."""
    with with_processors(denoiser) as attentions:
        predict_call(denoiser, call)
    return [attentions[0][2], attentions[1][2]]


def test_a_text_that_repeats_the_plans_prompt_can_take_its_place(z_image):
    denoiser, calls = recorded_run(z_image, PROMPTS)
    call, output = calls[0]
    row_texts = [*PROMPTS, *([] if z_image.negative is None else ["", ""])]
    texts = [z_image.encode_separately([prompt]) for prompt in row_texts]
    changed, spans = denoiser.append_prompts(call, texts, trim_padding=False)
    with with_processors(denoiser, region_replaces_plan(spans)):
        torch.testing.assert_close(predict_call(denoiser, changed), denoiser.prediction(output), atol=1e-5, rtol=1e-4)


def test_what_lets_the_model_take_more_texts_leaves_no_trace():
    denoiser, _ = recorded_run(z_image_of(), PROMPTS[:1], steps=1)
    with pytest.raises(RuntimeError, match="on purpose"):
        _fail_while_patched(denoiser)
    assert "patchify_and_embed" not in vars(denoiser.module)


def _fail_while_patched(denoiser):
    with denoiser.patched():
        assert "patchify_and_embed" in vars(denoiser.module)
        raise RuntimeError("on purpose")


def test_a_call_without_regions_keeps_its_mask_bit_for_bit(z_image):
    denoiser, calls = recorded_run(z_image, PROMPTS)
    call, output = calls[0]
    with with_processors(denoiser) as attentions:
        assert torch.equal(predict_call(denoiser, call), denoiser.prediction(output))
    assert len(attentions) == len(denoiser.sites)


def test_a_text_longer_than_the_positions_is_refused():
    z_image = z_image_of()
    denoiser, calls = recorded_run(z_image, PROMPTS[:1], steps=1)
    (text,) = z_image.encode_separately(["a door"])
    long = type(text)({"prompt_embeds": torch.zeros(1, 128, 16)}, slice(0, 128))
    with pytest.raises(aa.GuideError, match="a prompt of 128 tokens is longer than the 127 positions"):
        denoiser.append_prompts(calls[0][0], [[long], []], trim_padding=True)


def test_a_region_with_the_plans_prompt_changes_next_to_nothing(z_image):
    plain = synthesizer_of(z_image).synthesize(aa.Plan(LONG), seed=1)
    region = aa.Region(FULL, LONG, weight=7.0)
    guided = synthesizer_of(z_image, guide=OutputMix()).synthesize(aa.Plan(LONG, (region,)), seed=1)
    first, second = (torch.tensor(list(image.tobytes())).int() for image in (plain, guided))
    assert (first - second).abs().max() <= 1


def test_regions_change_a_prediction_only_where_they_are_and_each_row_has_its_own(z_image):
    denoiser, calls = recorded_run(z_image, PROMPTS)
    call, output = calls[0]
    regions = [
        [EncodedRegion(aa.Region(area, prompt), *z_image.encode_separately([prompt]))]
        for area, prompt in ((LEFT, "a stormy sky"), (RIGHT, "ivy"))
    ]
    before = hooks_of(z_image.module)
    with under(OutputMix(), denoiser, regions):
        change = predict_call(denoiser, call) - denoiser.prediction(output)
    assert hooks_of(z_image.module) == before
    assert (change[0, ..., 6:] == 0).all()
    assert (change[0, ..., :6] != 0).any()
    assert (change[1, ..., :6] == 0).all()
    assert (change[1, ..., 6:] != 0).any()
    assert (change[2:] == 0).all()


def test_a_regions_own_negative_prompt_changes_the_negative_branch():
    z_image = z_image_of()
    denoiser, calls = recorded_run(z_image, PROMPTS[:1])
    call, output = calls[0]
    text, negative = z_image.encode_separately(["a stormy sky", "dull"])
    region = aa.Region(LEFT, "a stormy sky", negative_prompt="dull")
    with under(OutputMix(), denoiser, [[EncodedRegion(region, text, negative)]]):
        change = predict_call(denoiser, call) - denoiser.prediction(output)
    assert (change[1, ..., :6] != 0).any()
    assert (change[1, ..., 6:] == 0).all()


def test_every_layer_that_takes_tokens_has_a_token_stream(z_image):
    denoiser, calls = recorded_run(z_image, PROMPTS)
    texts = [z_image.encode_separately(["a door", "ivy"])] * len(calls[0][0]["x"])
    changed, spans = denoiser.append_prompts(calls[0][0], texts, trim_padding=True)
    streams = token_streams_of(denoiser, changed, spans)
    assert {name for name, (stream, found) in streams.items() if stream is None and found} == set()
    assert all(found == [stream] for stream, found in streams.values() if stream is not None)
    assert {stream for stream, _ in streams.values()} == {None, "image", "text", "joint"}


def test_regional_attention_steers_each_picture_by_its_own_regions_and_leaves_no_trace(z_image):
    kept = [site.attention.processor for site in recorded_run(z_image, PROMPTS, steps=1)[0].sites]
    before = hooks_of(z_image.module)
    plain = [aa.Plan(prompt) for prompt in PROMPTS]
    regional = [aa.Plan(PROMPTS[0], (aa.Region(LEFT, "a stormy sky"), aa.Region(RIGHT, "ivy"))), plain[1]]
    bare, drawn = guided(z_image, plain), guided(z_image, regional)
    assert drawn[0] != bare[0]
    first, second = (torch.tensor(list(image.tobytes())).int() for image in (drawn[1], bare[1]))
    assert (first - second).abs().max() <= 1
    assert drawn == guided(z_image, regional)
    assert hooks_of(z_image.module) == before
    assert [site.attention.processor for site in recorded_run(z_image, PROMPTS, steps=1)[0].sites] == kept


def test_outside_the_levels_of_a_guide_the_plan_is_drawn_plainly(z_image):
    plain = [aa.Plan(prompt) for prompt in PROMPTS]
    regional = [aa.Plan(prompt, (aa.Region(LEFT, "ivy"),)) for prompt in PROMPTS]
    never = Isolation(sigma_range=(0.0, 0.001))
    assert guided(z_image, regional, isolation=never) == guided(z_image, plain)


def test_a_cut_prompt_is_warned_of_with_what_is_cut():
    with pytest.warns(UserWarning, match=r"Z-Image reads 12 tokens .* 'a red barn' has \d+ .* cut off is 'barn<"):
        encoded = z_image_of(max_sequence_length=12).encode_prompts(["a red barn"])
    assert encoded["prompt_embeds"].shape[1] == 12


def test_a_part_that_is_missing_is_named():
    pipeline = tiny_z_image()
    pipeline.text_encoder = None
    with pytest.raises(aa.ModelError, match=r"loaded without \['text_encoder'\]"):
        family_of(ZImage, pipeline)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30}, "positive multiples of 4"),
        ({"width": 68}, "more image tokens than this Z-Image has positions: at most 64 x 64 pixels"),
        ({"negative_prompt": "blurry", "guidance_scale": 0.0}, "guidance_scale=0.0 is no guidance"),
        ({"true_cfg_scale": 2.0}, "is classifier-free guidance itself"),
        ({"max_sequence_length": 97}, "this Z-Image reads 1 to 96 tokens"),
    ],
)
def test_what_would_have_no_effect_or_no_place_is_refused(options, message):
    with pytest.raises(aa.ModelError, match=message):
        z_image_of(**options)


def test_a_foreign_processor_is_refused_by_name():
    denoiser, _ = recorded_run(z_image_of(), ["a"], steps=1)
    site = denoiser.sites[0]
    site.attention.processor = AttnProcessor2_0()
    with pytest.raises(aa.GuideError, match=r"uses AttnProcessor2_0.*Expected ZSingleStreamAttnProcessor"):
        denoiser.processor(site, scaled_dot_product_attention)
