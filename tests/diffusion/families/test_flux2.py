"""What artaug knows of FLUX.2, against what diffusers does."""

import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor

import artaug as aa
from artaug.diffusion.families.flux2.family import Flux2, Flux2Klein
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
from support.tiny_flux2 import tiny_flux2, tiny_flux2_klein
from support.traces import hooks_of

PROMPTS = ["a red barn", "a lake"]
LEFT, RIGHT, FULL = aa.Box(0, 0, 0.5, 1), aa.Box(0.5, 0, 1, 1), aa.Box(0, 0, 1, 1)
ROOMY = {"max_sequence_length": 64}  # klein's chat is longer


def dev(**options):
    return family_of(Flux2, tiny_flux2(), **options)


def klein(**options):
    return family_of(Flux2Klein, tiny_flux2_klein(), **{**ROOMY, **options})


@pytest.fixture(scope="module", params=[dev, klein], ids=["dev", "klein"])
def family(request):
    return request.param()


def test_prompts_are_encoded_as_the_pipeline_encodes_them(family):
    call, _ = pipeline_calls(family, PROMPTS)[0]
    encoded = family.encode_prompts(PROMPTS)
    assert torch.equal(encoded["prompt_embeds"], call["encoder_hidden_states"])
    assert not encoded["prompt_embeds"].requires_grad


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
@pytest.mark.parametrize("build", [dev, lambda: klein(guidance_scale=1.0), klein], ids=["dev", "klein", "klein-cfg"])
def test_a_plain_plan_draws_what_the_pipeline_draws_bit_for_bit(build, prompts):
    family = build()
    scale = {} if family.guidance_scale is None else {"guidance_scale": family.guidance_scale}
    seeds = range(3, 3 + len(prompts))
    drawn = synthesizer_of(family).synthesize_batch([aa.Plan(prompt) for prompt in prompts], seeds=seeds)
    assert drawn == drawn_by_pipeline(family, prompts, seeds=seeds, **scale)


def test_a_distilled_klein_draws_without_guidance_as_its_pipeline_does():
    family = family_of(Flux2Klein, tiny_flux2_klein(is_distilled=True), **ROOMY)
    assert family.negative is None
    drawn = synthesizer_of(family).synthesize(aa.Plan(PROMPTS[0]), seed=1)
    assert [drawn] == drawn_by_pipeline(family, PROMPTS[:1], seeds=[1], guidance_scale=1.0)


def test_a_negative_prompt_of_klein_is_heeded():
    plain, against = klein(), klein(negative_prompt="a lake")
    pictures = [synthesizer_of(family).synthesize(aa.Plan(PROMPTS[0]), seed=1) for family in (plain, against)]
    assert pictures[0] != pictures[1]


def test_training_predicts_what_drawing_predicts_bit_for_bit(family):
    call, output = pipeline_calls(family, PROMPTS)[0]
    with torch.no_grad():
        predicted = family.predict(call["hidden_states"], call["timestep"], family.encode_prompts(PROMPTS))
    assert torch.equal(predicted, output[0])


def test_the_guidance_of_training_is_that_of_drawing():
    pipeline = tiny_flux2()
    weak, strong = (family_of(Flux2, pipeline, guidance_scale=scale) for scale in (1.0, 8.0))
    noisy, sigmas, prompt = torch.ones(1, 48, 16), torch.tensor([0.5]), weak.encode_prompts(PROMPTS[:1])
    assert not torch.equal(weak.predict(noisy, sigmas, prompt), strong.predict(noisy, sigmas, prompt))


def test_a_prediction_has_the_type_of_the_latents_and_carries_gradient():
    family = family_of(Flux2, tiny_flux2().to(torch.bfloat16))
    predicted = family.predict(torch.randn(1, 48, 16), torch.tensor([0.5]), family.encode_prompts(["a red barn"]))
    assert predicted.dtype == torch.float32
    assert predicted.requires_grad


def test_latents_are_packed_and_normalized_so_that_the_pipeline_decodes_them(family):
    images = [picture(1), picture(2)]
    latents = family.encode_images(images)
    vae = family.pipeline.vae
    with torch.no_grad():
        expected = vae.encode(family.pipeline.image_processor.preprocess(images)).latent_dist.mode()
        decoded = vae.decode(expected).sample
    places = family.pipeline._prepare_latent_ids(torch.empty(2, 1, 8, 6))  # noqa: SLF001 - what the pipeline decodes with
    spread_out = family.pipeline._unpack_latents_with_ids(latents, places)  # noqa: SLF001 - likewise
    deviation = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
    spread_out = spread_out * deviation + vae.bn.running_mean.view(1, -1, 1, 1)
    spread_out = family.pipeline._unpatchify_latents(spread_out)  # noqa: SLF001 - likewise
    assert latents.shape == (2, 8 * 6, 16)
    torch.testing.assert_close(spread_out, expected)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(spread_out).sample, decoded)


def test_encoding_a_picture_of_another_size_is_refused(family):
    with pytest.raises(aa.ModelError, match="32 x 24 pixels cannot be encoded at 24 x 32"):
        family.encode_images([picture(), picture(width=32, height=24)])


@pytest.mark.parametrize("dynamic_shift", [False, True])
def test_training_shifts_noise_levels_as_the_scheduler_does_in_fifty_steps(dynamic_shift):
    family = family_of(Flux2, tiny_flux2(dynamic_shift=dynamic_shift), width=32, height=32)
    pipeline_calls(family, ["a"], steps=50)
    sampled = family.pipeline.scheduler.sigmas[25].item()  # which the scheduler shifts from 1/2
    shift = family.noise_schedule.shift
    assert sampled == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), rel=1e-5)
    if not dynamic_shift:
        assert family.noise_schedule == FlowMatching(shift=3.0)


def test_dev_has_one_branch():
    denoiser, calls = recorded_run(dev(), PROMPTS)
    assert [denoiser.branches(call) for call, _ in calls] == [Branches(cond=range(2))] * 2


def test_kleins_branches_come_in_turn():
    denoiser, calls = recorded_run(klein(negative_prompt="blurry"), PROMPTS)
    both = [Branches(cond=range(2)), Branches(cond=range(0), uncond=range(2))]
    assert [denoiser.branches(call) for call, _ in calls] == both * 2


def test_a_plan_that_is_the_negative_prompt_cannot_be_guided():
    family = klein(negative_prompt="blurry")
    with pytest.raises(aa.GuideError, match="every prompt of this batch is the negative prompt 'blurry' itself"):
        family.denoiser(family.encode_prompts(["blurry", "blurry"]))
    assert family.denoiser(family.encode_prompts(["blurry", "a lake"])).grid == (8, 6)


def test_noise_falls_from_one_towards_zero(family):
    denoiser, calls = recorded_run(family, PROMPTS, steps=4)
    levels = [denoiser.noise_level(call) for call, _ in calls if denoiser.branches(call).cond]
    assert levels[0] == 1
    assert levels == sorted(set(levels), reverse=True)
    assert all(0 <= level <= 1 for level in levels)


def test_reconditioning_takes_rows_and_leaves_the_call_as_it_was(family):
    denoiser, calls = recorded_run(family, ["a", "b", "c"])
    call, output = calls[0]
    kept = dict(call)
    same = denoiser.with_prompt_embeds(call, [2, 0], family.encode_separately(["c", "a"]))
    torch.testing.assert_close(predict_call(denoiser, same), output[0][[2, 0]], atol=1e-5, rtol=1e-4)
    other = denoiser.with_prompt_embeds(call, [2], family.encode_separately(["x"]))
    assert not torch.allclose(predict_call(denoiser, other), output[0][[2]], atol=1e-4)
    assert call == kept


def test_twins_that_attend_plainly_predict_the_same_bit_for_bit(family):
    denoiser, calls = recorded_run(family, PROMPTS)
    call, output = calls[0]
    with with_processors(denoiser) as attentions:
        assert torch.equal(predict_call(denoiser, call), output[0])
    assert [site.block for site, _, _ in attentions] == [0, 1, 2, 3]


def test_twins_work_on_fused_projections():
    family = dev()
    family.module.fuse_qkv_projections()
    denoiser, calls = recorded_run(family, PROMPTS)
    call, output = calls[0]
    with with_processors(denoiser):
        assert torch.equal(predict_call(denoiser, call), output[0])


@pytest.mark.parametrize("trim_padding", [False, True])
def test_spans_name_every_token_attention_sees(family, trim_padding):
    denoiser, calls = recorded_run(family, PROMPTS)
    texts = [family.encode_separately(["a door", "ivy"]), family.encode_separately(["a stormy sky"])]
    changed, spans = denoiser.append_prompts(calls[0][0], texts, trim_padding=trim_padding)
    with with_processors(denoiser) as attentions:
        predict_call(denoiser, changed)
    assert all(
        query.shape[2] == sum(span.length for span in row_spans) for _, query, _ in attentions for row_spans in spans
    )
    assert all(row_spans[-2] == Span("text", family.max_sequence_length) for row_spans in spans)
    assert all(row_spans[-1] == Span("image", 48) for row_spans in spans)
    lengths = [[span.length for span in row_spans if span.prompt] for row_spans in spans]
    whole = family.max_sequence_length
    own_lengths = [[text.token_slice.stop - text.token_slice.start for text in row_prompts] for row_prompts in texts]
    assert lengths == (own_lengths if trim_padding else [[whole, whole], [whole]])


@pytest.mark.parametrize("trim_padding", [False, True])
def test_every_token_is_where_it_would_be_if_its_prompt_were_the_only_one(family, trim_padding):
    denoiser, calls = recorded_run(family, PROMPTS)
    texts = [family.encode_separately(["a door", "ivy"]), family.encode_separately(["a stormy sky"])]
    call = calls[0][0]
    changed, spans = denoiser.append_prompts(call, texts, trim_padding=trim_padding)
    plain, joined = _first_keys(denoiser, call), _first_keys(denoiser, changed)
    for row, row_prompts in enumerate(texts):
        parts = {span.prompt: part for span, part in span_slices(spans[row], "text")}
        image = span_slices(spans[row], "image")[0][1]
        limit = family.max_sequence_length
        torch.testing.assert_close(joined[row][:, image], plain[row][:, limit:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(joined[row][:, parts[0]], plain[row][:, :limit], atol=1e-5, rtol=1e-5)
        for number, text in enumerate(row_prompts, start=1):
            alone = _first_keys(denoiser, denoiser.with_prompt_embeds(call, [row], [text]))[0][:, :limit]
            own = alone[:, text.token_slice] if trim_padding else alone
            torch.testing.assert_close(joined[row][:, parts[number]], own, atol=1e-5, rtol=1e-5)


def test_a_text_that_repeats_the_plans_prompt_can_take_its_place(family):
    denoiser, calls = recorded_run(family, PROMPTS)
    call, output = calls[0]
    texts = [family.encode_separately([PROMPTS[0]]), family.encode_separately([PROMPTS[1]])]
    changed, spans = denoiser.append_prompts(call, texts, trim_padding=False)
    with with_processors(denoiser, region_replaces_plan(spans)):
        torch.testing.assert_close(predict_call(denoiser, changed), output[0], atol=1e-5, rtol=1e-4)


def _first_keys(denoiser, call):
    with with_processors(denoiser) as attentions:
        predict_call(denoiser, call)
    return attentions[0][2]


def test_no_added_texts_change_nothing_bit_for_bit(family):
    denoiser, calls = recorded_run(family, PROMPTS)
    call, output = calls[0]
    changed, spans = denoiser.append_prompts(call, [[], []], trim_padding=True)
    assert torch.equal(predict_call(denoiser, changed), output[0])
    assert spans == [(Span("text", family.max_sequence_length), Span("image", 48))] * 2


def test_words_are_where_the_padding_is_not(family):
    (text,) = family.encode_separately(["a door"])
    padded = family.encode_prompts(["a door, open"])["prompt_embeds"]
    left = family.pipeline.tokenizer.padding_side == "left"
    assert (text.token_slice.stop == family.max_sequence_length) == left
    assert (text.token_slice.start == 0) != left
    length = text.token_slice.stop - text.token_slice.start
    assert family.token_slices(["a door, open"])[0] != text.token_slice
    assert 0 < length < family.max_sequence_length
    assert padded.shape == text.conditioning["prompt_embeds"].shape


def test_a_region_with_the_plans_prompt_changes_next_to_nothing(family):
    plain = synthesizer_of(family).synthesize(aa.Plan(PROMPTS[0]), seed=1)
    guided = synthesizer_of(family, guide=OutputMix()).synthesize(
        aa.Plan(PROMPTS[0], (aa.Region(FULL, PROMPTS[0], weight=7.0),)), seed=1
    )
    assert max(high for _, high in _difference(plain, guided)) <= 1


def _difference(first, second):
    return [(int((a - b).abs().min()), int((a - b).abs().max())) for a, b in [(_pixels(first), _pixels(second))]]


def _pixels(image):
    return torch.tensor(list(image.tobytes())).int()


def test_regions_change_a_prediction_only_where_they_are_and_each_row_has_its_own(family):
    denoiser, calls = recorded_run(family, PROMPTS)
    call, output = calls[0]
    regions = [_encoded(family, LEFT, "a stormy sky"), _encoded(family, RIGHT, "ivy")]
    before = hooks_of(family.module)
    with under(OutputMix(), denoiser, regions):
        change = (predict_call(denoiser, call) - output[0]).reshape(2, 8, 6, -1)
    assert hooks_of(family.module) == before
    assert (change[0, :, 3:] == 0).all()
    assert (change[0, :, :3] != 0).any()
    assert (change[1, :, :3] == 0).all()
    assert (change[1, :, 3:] != 0).any()


def _encoded(family, area, prompt):
    return [EncodedRegion(aa.Region(area, prompt), *family.encode_separately([prompt]))]


def test_every_layer_that_takes_tokens_has_a_token_stream(family):
    denoiser, calls = recorded_run(family, PROMPTS)
    texts = [family.encode_separately(["a door", "ivy"])] * len(PROMPTS)
    changed, spans = denoiser.append_prompts(calls[0][0], texts, trim_padding=True)
    streams = token_streams_of(denoiser, changed, spans)
    assert {name for name, (stream, found) in streams.items() if stream is None and found} == set()
    assert all(found == [stream] for stream, found in streams.values() if stream is not None)
    assert {stream for stream, _ in streams.values()} == {None, "image", "text", "joint"}


def test_regional_attention_steers_each_picture_by_its_own_regions_and_leaves_no_trace(family):
    kept = [site.attention.processor for site in recorded_run(family, PROMPTS, steps=1)[0].sites]
    before = hooks_of(family.module)
    plain = [aa.Plan(prompt) for prompt in PROMPTS]
    regional = [aa.Plan(PROMPTS[0], (aa.Region(LEFT, "a stormy sky"), aa.Region(RIGHT, "ivy"))), plain[1]]
    bare, drawn = guided(family, plain), guided(family, regional)
    assert drawn[0] != bare[0]
    first, second = (torch.tensor(list(image.tobytes())).int() for image in (drawn[1], bare[1]))
    assert (first - second).abs().max() <= 1
    assert drawn == guided(family, regional)
    assert hooks_of(family.module) == before
    assert [site.attention.processor for site in recorded_run(family, PROMPTS, steps=1)[0].sites] == kept


def test_outside_the_levels_of_a_guide_the_plan_is_drawn_plainly(family):
    plain = [aa.Plan(prompt) for prompt in PROMPTS]
    regional = [aa.Plan(prompt, (aa.Region(LEFT, "ivy"),)) for prompt in PROMPTS]
    never = Isolation(sigma_range=(0.0, 0.001))
    assert guided(family, regional, isolation=never) == guided(family, plain)


def test_a_cut_prompt_is_warned_of_with_what_is_cut():
    with pytest.warns(UserWarning, match=r"FLUX.2 reads 12 tokens .* 'a red barn' has 18 .* cut off is ' barn"):
        dev(max_sequence_length=12).encode_prompts(["a red barn"])
    with pytest.warns(UserWarning, match=r"FLUX.2 reads 32 tokens and the prompt 'a red barn' has \d+ with the chat"):
        klein(max_sequence_length=32).encode_prompts(["a red barn"])


def test_a_part_that_is_missing_is_named():
    pipeline = tiny_flux2()
    pipeline.text_encoder = None
    with pytest.raises(aa.ModelError, match=r"loaded without \['text_encoder'\]"):
        family_of(Flux2, pipeline)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (dev, {"width": 30}, "positive multiples of 4"),
        (dev, {"negative_prompt": "blurry"}, "Flux2Pipeline has no classifier-free guidance"),
        (dev, {"true_cfg_scale": 2.0}, "Flux2Pipeline has no classifier-free guidance"),
        (dev, {"max_sequence_length": 513}, "FLUX.2 reads 1 to 512 tokens"),
        (klein, {"true_cfg_scale": 2.0}, "is classifier-free guidance itself"),
        (klein, {"negative_prompt": "blurry", "guidance_scale": 1.0}, "this run has no classifier-free guidance"),
    ],
)
def test_what_would_have_no_effect_is_refused(build, options, message):
    with pytest.raises(aa.ModelError, match=message):
        build(**options)


def test_guidance_that_a_model_does_not_take_is_refused():
    with pytest.raises(aa.ModelError, match=r"guidance_scale=2.0 would be ignored: this FLUX.2 model is without"):
        family_of(Flux2, tiny_flux2(guidance_embeds=False), guidance_scale=2.0)
    with pytest.raises(aa.ModelError, match=r"guidance_scale=2.0 would be ignored: this FLUX.2 klein is distilled"):
        family_of(Flux2Klein, tiny_flux2_klein(is_distilled=True), guidance_scale=2.0)


def test_foreign_processors_are_refused_by_name():
    family = dev()
    site, *_, last = family.denoiser(family.encode_prompts(["a"])).sites
    site.attention.processor = Flux2KVAttnProcessor()
    last.attention.processor = Flux2KVAttnProcessor()
    denoiser = family.denoiser(family.encode_prompts(["a"]))
    with pytest.raises(aa.GuideError, match="uses Flux2KVAttnProcessor"):
        denoiser.processor(site, torch.nn.functional.scaled_dot_product_attention)
    with pytest.raises(aa.GuideError, match="Expected Flux2ParallelSelfAttnProcessor"):
        denoiser.processor(last, torch.nn.functional.scaled_dot_product_attention)
