"""What artaug knows of Qwen-Image, against what diffusers does."""

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch.nn.functional import scaled_dot_product_attention

import artaug as aa
from artaug.diffusion.families.qwen_image.family import QwenImage
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
from support.tiny_qwen_image import tiny_qwen_image
from support.traces import hooks_of

PROMPTS = ["a red barn", "a lake"]
LEFT, RIGHT, FULL = aa.Box(0, 0, 0.5, 1), aa.Box(0.5, 0, 1, 1), aa.Box(0, 0, 1, 1)
GUIDED = {"negative_prompt": "blurry", "true_cfg_scale": 3.0}


def qwen_of(**options):
    return family_of(QwenImage, tiny_qwen_image(), **options)


@pytest.fixture(scope="module", params=[{}, GUIDED], ids=["plain", "guided"])
def qwen(request):
    return qwen_of(**request.param)


def calls_of(qwen, prompts, **options):
    return pipeline_calls(
        qwen, prompts, negative_prompt=_negatives(qwen, prompts), true_cfg_scale=qwen.true_cfg_scale, **options
    )


def _negatives(qwen, prompts):
    return None if qwen.negative is None else [qwen.negative] * len(prompts)


def test_prompts_are_encoded_as_the_pipeline_encodes_them(qwen):
    call, _ = calls_of(qwen, PROMPTS)[0]
    encoded = qwen.encode_prompts(PROMPTS)
    assert torch.equal(encoded["prompt_embeds"], call["encoder_hidden_states"])
    assert torch.equal(encoded["prompt_embeds_mask"], call["encoder_hidden_states_mask"])
    assert encoded["prompt_embeds_mask"].sum(dim=1).tolist() == [tokens.stop for tokens in qwen.token_slices(PROMPTS)]
    assert not encoded["prompt_embeds"].requires_grad


def test_a_single_prompt_needs_no_mask_but_has_one():
    qwen = qwen_of()
    assert calls_of(qwen, PROMPTS[:1])[0][0]["encoder_hidden_states_mask"] is None
    assert qwen.encode_prompts(PROMPTS[:1])["prompt_embeds_mask"].all()


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
def test_a_plain_plan_draws_what_the_pipeline_draws_bit_for_bit(qwen, prompts):
    seeds = range(3, 3 + len(prompts))
    drawn = synthesizer_of(qwen).synthesize_batch([aa.Plan(prompt) for prompt in prompts], seeds=seeds)
    guidance = {"negative_prompt": _negatives(qwen, prompts), "true_cfg_scale": qwen.true_cfg_scale}
    assert drawn == drawn_by_pipeline(qwen, prompts, seeds=seeds, **guidance)


def test_a_prompt_longer_than_the_pipelines_own_limit_reaches_the_model():
    qwen = qwen_of(max_sequence_length=600)
    conditioning = qwen.encode_prompts(["a" * 550])
    _, calls = recorded_run(qwen, ["a" * 550], steps=1)
    assert calls[0][0]["encoder_hidden_states"].shape == conditioning["prompt_embeds"].shape
    assert conditioning["prompt_embeds"].shape[1] > 550


def test_training_predicts_what_drawing_predicts_bit_for_bit(qwen):
    for prompts in (PROMPTS[:1], PROMPTS):
        call, output = calls_of(qwen, prompts)[0]
        with torch.no_grad():
            predicted = qwen.predict(call["hidden_states"], call["timestep"], qwen.encode_prompts(prompts))
        assert torch.equal(predicted, output[0])


def test_a_prediction_has_the_type_of_the_latents_and_carries_gradient():
    qwen = family_of(QwenImage, tiny_qwen_image().to(torch.bfloat16))
    predicted = qwen.predict(torch.randn(1, 48, 16), torch.tensor([0.5]), qwen.encode_prompts(["a red barn"]))
    assert predicted.dtype == torch.float32
    assert predicted.requires_grad


def test_latents_are_packed_and_normalized_so_that_the_pipeline_decodes_them():
    qwen = qwen_of()
    images = [picture(1), picture(2)]
    latents = qwen.encode_images(images)
    vae = qwen.pipeline.vae
    with torch.no_grad():
        pixels = qwen.pipeline.image_processor.preprocess(images).unsqueeze(2)
        expected = vae.encode(pixels).latent_dist.mode()
    spread_out = qwen.pipeline._unpack_latents(latents, 32, 24, 2)  # noqa: SLF001 - what the pipeline decodes with
    mean, deviation = (
        torch.tensor(channels).view(1, 4, 1, 1, 1) for channels in (vae.config.latents_mean, vae.config.latents_std)
    )
    assert latents.shape == (2, 8 * 6, 16)
    torch.testing.assert_close(spread_out * deviation + mean, expected)


def test_encoding_a_picture_of_another_size_is_refused():
    with pytest.raises(aa.ModelError, match="32 x 24 pixels cannot be encoded at 24 x 32"):
        qwen_of().encode_images([picture(), picture(width=32, height=24)])


def test_training_ends_where_a_scheduler_that_ends_early_does():
    pipeline = tiny_qwen_image(dynamic_shift=True)
    pipeline.scheduler.register_to_config(shift_terminal=0.02)
    qwen = family_of(QwenImage, pipeline, width=32, height=32)
    calls_of(qwen, ["a"])
    assert pipeline.scheduler.sigmas[-2].item() == pytest.approx(0.02)
    assert qwen.noise_schedule.shift_terminal == 0.02


@pytest.mark.parametrize("dynamic_shift", [False, True])
def test_training_shifts_noise_levels_as_the_scheduler_does(dynamic_shift):
    qwen = family_of(QwenImage, tiny_qwen_image(dynamic_shift=dynamic_shift), width=32, height=32)
    calls_of(qwen, ["a"])  # two steps, which the scheduler shifts from 1 and 1/2
    _, sampled, _ = qwen.pipeline.scheduler.sigmas.tolist()
    shift = qwen.noise_schedule.shift
    assert sampled == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), rel=1e-6)
    if not dynamic_shift:
        assert qwen.noise_schedule == FlowMatching(shift=3.0)


def test_branches_come_in_turn_where_there_is_a_negative_prompt(qwen):
    denoiser, calls = recorded_run(qwen, PROMPTS)
    own, against = Branches(cond=range(2)), Branches(cond=range(0), uncond=range(2))
    turns = [own, own] if qwen.negative is None else [own, against, own, against]
    assert [denoiser.branches(call) for call, _ in calls] == turns


def test_a_plan_that_is_the_negative_prompt_cannot_be_guided():
    qwen = qwen_of(**GUIDED)
    with pytest.raises(aa.GuideError, match="every prompt of this batch is the negative prompt 'blurry' itself"):
        qwen.denoiser(qwen.encode_prompts(["blurry"]))


def test_noise_falls_from_one_towards_zero(qwen):
    denoiser, calls = recorded_run(qwen, PROMPTS, steps=4)
    levels = [denoiser.noise_level(call) for call, _ in calls if denoiser.branches(call).cond]
    assert levels[0] == 1
    assert levels == sorted(set(levels), reverse=True)
    assert all(0 <= level <= 1 for level in levels)


def test_reconditioning_takes_rows_and_leaves_the_call_as_it_was(qwen):
    denoiser, calls = recorded_run(qwen, ["a", "b", "something long"])
    call, output = calls[0]
    kept = dict(call)
    same = denoiser.with_prompt_embeds(call, [2, 0], qwen.encode_separately(["something long", "a"]))
    torch.testing.assert_close(predict_call(denoiser, same), output[0][[2, 0]], atol=1e-5, rtol=1e-4)
    other = denoiser.with_prompt_embeds(call, [2], qwen.encode_separately(["x"]))
    assert not torch.allclose(predict_call(denoiser, other), output[0][[2]], atol=1e-4)
    assert call == kept


def test_twins_that_attend_plainly_predict_the_same_bit_for_bit(qwen):
    denoiser, calls = recorded_run(qwen, PROMPTS[:1])
    call, output = calls[0]
    with with_processors(denoiser) as attentions:
        assert torch.equal(predict_call(denoiser, call), output[0])
    assert [site.block for site, _, _ in attentions] == [0, 1]


def test_padding_that_no_query_attends_to_equals_the_mask(qwen):
    denoiser, calls = recorded_run(qwen, PROMPTS)
    call, output = calls[0]
    changed, spans = denoiser.append_prompts(call, [[], []], trim_padding=True)
    assert [[span.kind for span in row_spans] for row_spans in spans] == [
        ["text", "image"],
        ["text", "padding", "image"],
    ]
    hidden = torch.ones(2, 1, 1, sum(span.length for span in spans[0]), dtype=torch.bool)
    for row, row_spans in enumerate(spans):
        for _, part in span_slices(row_spans, "padding"):
            hidden[row, ..., part] = False

    def unseen(_site):
        return lambda query, key, value: scaled_dot_product_attention(query, key, value, attn_mask=hidden)

    with with_processors(denoiser, unseen):
        torch.testing.assert_close(predict_call(denoiser, changed), output[0])


def test_no_added_texts_change_nothing_bit_for_bit(qwen):
    denoiser, calls = recorded_run(qwen, PROMPTS[:1])
    call, output = calls[0]
    changed, spans = denoiser.append_prompts(call, [[]], trim_padding=True)
    with with_processors(denoiser):
        assert torch.equal(predict_call(denoiser, changed), output[0])
    assert spans == [(Span("text", call["encoder_hidden_states"].shape[1]), Span("image", 48))]


def added(qwen):
    denoiser, calls = recorded_run(qwen, PROMPTS)
    texts = [qwen.encode_separately(["a door", "ivy"]), qwen.encode_separately(["a stormy sky"])]
    return denoiser, calls[0][0], texts, *denoiser.append_prompts(calls[0][0], texts, trim_padding=True)


def test_a_text_that_repeats_the_plans_prompt_can_take_its_place(qwen):
    denoiser, calls = recorded_run(qwen, PROMPTS)
    call, output = calls[0]
    texts = [qwen.encode_separately([PROMPTS[0]]), qwen.encode_separately([PROMPTS[1]])]
    changed, spans = denoiser.append_prompts(call, texts, trim_padding=False)
    with with_processors(denoiser, region_replaces_plan(spans)):
        torch.testing.assert_close(predict_call(denoiser, changed), output[0], atol=1e-5, rtol=1e-4)


def first_keys(denoiser, call):
    with with_processors(denoiser) as attentions:
        predict_call(denoiser, call)
    return attentions[0][2]


def test_spans_name_every_token_attention_sees(qwen):
    denoiser, call, _, changed, spans = added(qwen)
    with with_processors(denoiser) as attentions:
        predict_call(denoiser, changed)
    assert all(
        query.shape[2] == sum(span.length for span in row_spans) for _, query, _ in attentions for row_spans in spans
    )
    lengths = [
        [tokens.stop for tokens in qwen.token_slices([*row_prompts, prompt])] for prompt, row_prompts in _row_prompts()
    ]
    assert [[span.length for span, _ in span_slices(row_spans, "text")] for row_spans in spans] == lengths
    assert [[span.prompt for span, _ in span_slices(row_spans, "text")] for row_spans in spans] == [[1, 2, 0], [1, 0]]
    assert all(row_spans[-1] == Span("image", 48) for row_spans in spans)
    assert call["encoder_hidden_states_mask"] is not None
    assert changed["encoder_hidden_states_mask"] is None


def _row_prompts():
    return [(PROMPTS[0], ["a door", "ivy"]), (PROMPTS[1], ["a stormy sky"])]


def test_every_token_is_where_it_would_be_if_its_prompt_were_the_only_one(qwen):
    denoiser, call, texts, changed, spans = added(qwen)
    joined = first_keys(denoiser, changed)
    for row, row_prompts in enumerate(texts):
        (image,) = (part for _, part in span_slices(spans[row], "image"))
        *others, own = (part for _, part in span_slices(spans[row], "text"))
        length = own.stop - own.start
        alone = denoiser.with_prompt_embeds(call, [row], qwen.encode_separately([PROMPTS[row]]))
        plain = first_keys(denoiser, alone)[0]
        torch.testing.assert_close(joined[row][:, own], plain[:, :length], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(joined[row][:, image], plain[:, length:], atol=1e-5, rtol=1e-5)
        for text, part in zip(row_prompts, others, strict=True):
            alone = first_keys(denoiser, denoiser.with_prompt_embeds(call, [row], [text]))[0]
            torch.testing.assert_close(joined[row][:, part], alone[:, text.token_slice], atol=1e-5, rtol=1e-5)


def test_many_texts_may_be_longer_together_than_the_positions_but_not_one():
    qwen = qwen_of()
    denoiser, calls = recorded_run(qwen, PROMPTS[:1], steps=1)
    texts = qwen.encode_separately(["a door"])
    changed, _ = denoiser.append_prompts(calls[0][0], [texts * 230], trim_padding=True)
    assert changed["encoder_hidden_states"].shape[1] > 4096
    with with_processors(denoiser):
        assert predict_call(denoiser, changed).isfinite().all()
    wide = {"prompt_embeds": torch.zeros(1, 4093, 16)}
    huge = [type(texts[0])(wide, slice(0, 4093))]
    with pytest.raises(aa.GuideError, match="a prompt of 4093 tokens is longer than the 4092 positions"):
        denoiser.append_prompts(calls[0][0], [huge], trim_padding=True)


def test_a_call_without_regions_keeps_its_mask_bit_for_bit(qwen):
    denoiser, calls = recorded_run(qwen, PROMPTS)
    call, output = calls[0]
    assert call["encoder_hidden_states_mask"] is not None
    with with_processors(denoiser) as attentions:
        assert torch.equal(predict_call(denoiser, call), output[0])
    assert len(attentions) == len(denoiser.sites)


def test_a_region_with_the_plans_prompt_changes_next_to_nothing(qwen):
    plain = synthesizer_of(qwen).synthesize(aa.Plan(PROMPTS[0]), seed=1)
    region = aa.Region(FULL, PROMPTS[0], weight=7.0)
    guided = synthesizer_of(qwen, guide=OutputMix()).synthesize(aa.Plan(PROMPTS[0], (region,)), seed=1)
    first, second = (torch.tensor(list(image.tobytes())).int() for image in (plain, guided))
    assert (first - second).abs().max() <= 1


def test_regions_change_a_prediction_only_where_they_are_and_each_row_has_its_own(qwen):
    denoiser, calls = recorded_run(qwen, PROMPTS)
    call, output = calls[0]
    regions = [
        [EncodedRegion(aa.Region(area, prompt), *qwen.encode_separately([prompt]))]
        for area, prompt in ((LEFT, "a stormy sky"), (RIGHT, "ivy"))
    ]
    before = hooks_of(qwen.module)
    with under(OutputMix(), denoiser, regions):
        change = (predict_call(denoiser, call) - output[0]).reshape(2, 8, 6, -1)
        if qwen.negative is not None:
            assert torch.equal(predict_call(denoiser, calls[1][0]), calls[1][1][0])
    assert hooks_of(qwen.module) == before
    assert (change[0, :, 3:] == 0).all()
    assert (change[0, :, :3] != 0).any()
    assert (change[1, :, :3] == 0).all()
    assert (change[1, :, 3:] != 0).any()


def test_every_layer_that_takes_tokens_has_a_token_stream(qwen):
    denoiser, calls = recorded_run(qwen, PROMPTS)
    texts = [qwen.encode_separately(["a door", "ivy"])] * len(PROMPTS)
    changed, spans = denoiser.append_prompts(calls[0][0], texts, trim_padding=True)
    streams = token_streams_of(denoiser, changed, spans)
    assert {name for name, (stream, found) in streams.items() if stream is None and found} == set()
    assert all(found == [stream] for stream, found in streams.values() if stream is not None)
    assert {stream for stream, _ in streams.values()} == {None, "image", "text"}


def test_regional_attention_steers_each_picture_by_its_own_regions_and_leaves_no_trace(qwen):
    kept = [site.attention.processor for site in recorded_run(qwen, PROMPTS, steps=1)[0].sites]
    before = hooks_of(qwen.module)
    plain = [aa.Plan(prompt) for prompt in PROMPTS]
    regional = [aa.Plan(PROMPTS[0], (aa.Region(LEFT, "a stormy sky"), aa.Region(RIGHT, "ivy"))), plain[1]]
    bare, drawn = guided(qwen, plain), guided(qwen, regional)
    assert drawn[0] != bare[0]
    first, second = (torch.tensor(list(image.tobytes())).int() for image in (drawn[1], bare[1]))
    assert (first - second).abs().max() <= 1
    assert drawn == guided(qwen, regional)
    assert hooks_of(qwen.module) == before
    assert [site.attention.processor for site in recorded_run(qwen, PROMPTS, steps=1)[0].sites] == kept


def test_outside_the_levels_of_a_guide_the_plan_is_drawn_plainly(qwen):
    plain = [aa.Plan(prompt) for prompt in PROMPTS]
    regional = [aa.Plan(prompt, (aa.Region(LEFT, "ivy"),)) for prompt in PROMPTS]
    never = Isolation(sigma_range=(0.0, 0.001))
    assert guided(qwen, regional, isolation=never) == guided(qwen, plain)


def test_a_cut_prompt_is_warned_of_with_what_is_cut():
    with pytest.warns(UserWarning, match=r"Qwen-Image reads 5 tokens .* 'a red barn' has \d+ .* cut off is ' barn<"):
        encoded = qwen_of(max_sequence_length=5).encode_prompts(["a red barn"])
    assert encoded["prompt_embeds"].shape[1] == 5


def test_a_part_that_is_missing_is_named():
    pipeline = tiny_qwen_image()
    pipeline.text_encoder = None
    with pytest.raises(aa.ModelError, match=r"loaded without \['text_encoder'\]"):
        family_of(QwenImage, pipeline)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30}, "positive multiples of 4"),
        ({"negative_prompt": "blurry"}, "would have no effect"),
        ({"true_cfg_scale": 4.0}, "would have no effect"),
        ({"guidance_scale": 4.0}, "Qwen-Image takes none as an input"),
        ({"max_sequence_length": 1025}, "Qwen-Image reads 1 to 1024 tokens"),
    ],
)
def test_what_would_have_no_effect_is_refused(options, message):
    with pytest.raises(aa.ModelError, match=message):
        qwen_of(**options)


def test_a_foreign_processor_is_refused_by_name():
    denoiser, _ = recorded_run(qwen_of(), ["a"], steps=1)
    site = denoiser.sites[0]
    site.attention.processor = JointAttnProcessor2_0()
    with pytest.raises(aa.GuideError, match=r"uses JointAttnProcessor2_0.*Expected QwenDoubleStreamAttnProcessor2_0"):
        denoiser.processor(site, scaled_dot_product_attention)
