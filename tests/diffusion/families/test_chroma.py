"""What artaug knows of Chroma, against what diffusers does."""

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch.nn.functional import scaled_dot_product_attention

import artaug as aa
from artaug.diffusion import Chroma1, check_family, estimate, verify_export
from artaug.diffusion.estimation.meta_pipeline import meta_pipeline, text_shapes
from artaug.diffusion.families.chroma.attention import attention_with_token_mask
from artaug.lora.formats import Format
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
from support.tiny_chroma import tiny_chroma
from support.traces import hooks_of

PROMPTS = ["a red barn", "a lake"]
LEFT, RIGHT, FULL = aa.Box(0, 0, 0.5, 1), aa.Box(0.5, 0, 1, 1), aa.Box(0, 0, 1, 1)
LIMIT = 32


def chroma_of(**options):
    return family_of(Chroma1, tiny_chroma(), **{"max_sequence_length": LIMIT, **options})


@pytest.fixture(
    scope="module", params=[{"guidance_scale": 1.0}, {"negative_prompt": "blurry"}], ids=["plain", "guided"]
)
def chroma(request):
    return chroma_of(**request.param)


def guidance_of(chroma):
    return {"guidance_scale": chroma._guidance, "negative_prompt": chroma.negative}  # noqa: SLF001 - what the family calls with


def calls_of(chroma, prompts, **options):
    guidance = guidance_of(chroma)
    negative = guidance["negative_prompt"]
    guidance["negative_prompt"] = None if negative is None else [negative] * len(prompts)
    return pipeline_calls(chroma, prompts, **guidance, **options)


def test_prompts_are_encoded_as_the_pipeline_encodes_them(chroma):
    call, _ = calls_of(chroma, PROMPTS)[0]
    encoded = chroma.encode_prompts(PROMPTS)
    assert torch.equal(encoded["prompt_embeds"], call["encoder_hidden_states"])
    assert torch.equal(encoded["prompt_attention_mask"], call["attention_mask"][:, :LIMIT])
    assert not encoded["prompt_embeds"].requires_grad


@pytest.mark.filterwarnings("ignore:T5 reads")
def test_a_prompts_own_tokens_are_those_that_the_mask_keeps():
    chroma = chroma_of()
    mask = chroma.encode_prompts([*PROMPTS, "a" * 99])["prompt_attention_mask"]
    slices = chroma.token_slices([*PROMPTS, "a" * 99])
    assert [tokens.stop for tokens in slices] == mask.sum(dim=1).int().tolist()
    assert slices[-1].stop == LIMIT


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
def test_a_plain_plan_draws_what_the_pipeline_draws_bit_for_bit(chroma, prompts):
    seeds = range(3, 3 + len(prompts))
    drawn = synthesizer_of(chroma).synthesize_batch([aa.Plan(prompt) for prompt in prompts], seeds=seeds)
    guidance = guidance_of(chroma)
    if guidance["negative_prompt"] is not None:
        guidance["negative_prompt"] = [guidance["negative_prompt"]] * len(prompts)
    assert drawn == drawn_by_pipeline(chroma, prompts, seeds=seeds, **guidance)


def test_training_predicts_what_drawing_predicts_bit_for_bit(chroma):
    for prompts in (PROMPTS[:1], PROMPTS):
        call, output = calls_of(chroma, prompts)[0]
        with torch.no_grad():
            predicted = chroma.predict(call["hidden_states"], call["timestep"], chroma.encode_prompts(prompts))
        assert torch.equal(predicted, output[0])


def test_gradient_checkpointing_keeps_the_mask_that_diffusers_leaves_out():
    chroma = chroma_of()
    noisy, sigmas = torch.randn(2, 48, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 0.8])
    conditioning = chroma.encode_prompts(PROMPTS)
    plain = chroma.predict(noisy, sigmas, conditioning)
    weight = chroma.module.single_transformer_blocks[1].proj_mlp.weight
    (expected,) = torch.autograd.grad(plain.square().mean(), weight)
    chroma.module.enable_gradient_checkpointing()
    function = chroma.module._gradient_checkpointing_func  # noqa: SLF001 - which predict replaces for a while
    predicted = chroma.predict(noisy, sigmas, conditioning)
    assert torch.equal(predicted, plain)
    assert chroma.module._gradient_checkpointing_func is function  # noqa: SLF001 - likewise
    (gradient,) = torch.autograd.grad(predicted.square().mean(), weight)
    assert torch.equal(gradient, expected)
    unmasked = {**conditioning, "prompt_attention_mask": torch.ones(2, LIMIT)}
    assert not torch.equal(chroma.predict(noisy, sigmas, unmasked), plain), "the mask has no effect"


def test_a_prediction_has_the_type_of_the_latents_and_carries_gradient():
    chroma = family_of(Chroma1, tiny_chroma().to(torch.bfloat16))
    predicted = chroma.predict(torch.randn(1, 48, 16), torch.tensor([0.5]), chroma.encode_prompts(["a red barn"]))
    assert predicted.dtype == torch.float32
    assert predicted.requires_grad


def test_latents_are_scaled_and_packed_so_that_the_pipeline_decodes_them():
    chroma = chroma_of()
    images = [picture(1), picture(2)]
    latents = chroma.encode_images(images)
    vae = chroma.pipeline.vae
    unpacked = chroma.pipeline._unpack_latents(latents, 32, 24, 2)  # noqa: SLF001 - what the pipeline decodes with
    with torch.no_grad():
        expected = vae.encode(chroma.pipeline.image_processor.preprocess(images)).latent_dist.mode()
    assert latents.shape == (2, 8 * 6, 16)
    torch.testing.assert_close(unpacked / vae.config.scaling_factor + vae.config.shift_factor, expected)


@pytest.mark.parametrize("dynamic_shift", [False, True])
def test_training_shifts_noise_levels_as_the_scheduler_does(dynamic_shift):
    chroma = family_of(Chroma1, tiny_chroma(dynamic_shift=dynamic_shift), width=32, height=32)
    calls_of(chroma, ["a"])  # two steps, which the scheduler shifts from 1 and 1/2
    _, sampled, _ = chroma.pipeline.scheduler.sigmas.tolist()
    shift = chroma.noise_schedule.shift
    assert sampled == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), rel=1e-6)
    if not dynamic_shift:
        assert chroma.noise_schedule == FlowMatching(shift=3.0)


def test_branches_come_in_turn_where_there_is_guidance(chroma):
    denoiser, calls = recorded_run(chroma, PROMPTS)
    cond, uncond = Branches(cond=range(2)), Branches(cond=range(0), uncond=range(2))
    expected = [cond, cond] if chroma.negative is None else [cond, uncond, cond, uncond]
    assert [denoiser.branches(call) for call, _ in calls] == expected


def test_noise_falls_from_one_towards_zero(chroma):
    denoiser, calls = recorded_run(chroma, PROMPTS, steps=4)
    sigmas = [denoiser.noise_level(call) for call, _ in calls if denoiser.branches(call).cond]
    assert sigmas[0] == 1
    assert sigmas == sorted(set(sigmas), reverse=True)


def test_another_prompt_for_some_rows_leaves_the_call_as_it_was(chroma):
    denoiser, calls = recorded_run(chroma, ["a", "b", "something long"])
    call, output = calls[0]
    kept = dict(call)
    same = denoiser.with_prompt_embeds(call, [2, 0], chroma.encode_separately(["something long", "a"]))
    torch.testing.assert_close(predict_call(denoiser, same), output[0][[2, 0]], atol=1e-5, rtol=1e-4)
    other = denoiser.with_prompt_embeds(call, [2], chroma.encode_separately(["x"]))
    assert not torch.allclose(predict_call(denoiser, other), output[0][[2]], atol=1e-4)
    assert call == kept


def test_a_call_without_regions_keeps_its_mask_bit_for_bit(chroma):
    denoiser, calls = recorded_run(chroma, PROMPTS)
    call, output = calls[0]
    assert (call["attention_mask"] == 0).any()
    with with_processors(denoiser) as attentions:
        assert torch.equal(predict_call(denoiser, call), output[0])
    assert len(attentions) == len(denoiser.sites)


def test_the_token_mask_is_the_bias_that_diffusers_adds_to_the_scores():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 7, 16, generator=generator) for _ in range(3))
    mask = torch.tensor([[1.0, 1, 0, 0, 1, 1, 1], [1, 0, 0, 0, 1, 1, 1]])
    bias = mask[:, None, None, :] * mask[:, None, :, None]
    expected = scaled_dot_product_attention(query, key, value, attn_mask=bias)
    found = attention_with_token_mask(scaled_dot_product_attention, mask, query, key, value)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_no_added_prompts_change_nothing_but_rounding(chroma):
    denoiser, calls = recorded_run(chroma, PROMPTS)
    call, output = calls[0]
    changed, spans = denoiser.append_prompts(call, [[], []], trim_padding=True)
    assert spans == [(Span("text", LIMIT), Span("image", 48))] * 2
    with with_processors(denoiser) as attentions:
        torch.testing.assert_close(predict_call(denoiser, changed), output[0], atol=1e-5, rtol=1e-4)
    assert [site.block for site, _, _ in attentions] == [0, 1, 2]


def test_a_prompt_that_repeats_the_plans_prompt_can_take_its_place(chroma):
    denoiser, calls = recorded_run(chroma, PROMPTS)
    call, output = calls[0]
    prompts = [chroma.encode_separately([prompt]) for prompt in PROMPTS]
    changed, spans = denoiser.append_prompts(call, prompts, trim_padding=False)
    with with_processors(denoiser, region_replaces_plan(spans)):
        torch.testing.assert_close(predict_call(denoiser, changed), output[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("trim_padding", [False, True])
def test_spans_name_every_token_of_the_sequence_and_its_mask(chroma, trim_padding):
    denoiser, calls = recorded_run(chroma, PROMPTS)
    rows = [["a door", "ivy"], ["a stormy sky"]]
    prompts = [chroma.encode_separately(row) for row in rows]
    changed, spans = denoiser.append_prompts(calls[0][0], prompts, trim_padding=trim_padding)
    with with_processors(denoiser) as attentions:
        predict_call(denoiser, changed)
    assert all(query.shape[2] == sum(span.length for span in row) for _, query, _ in attentions for row in spans)
    assert [[span.prompt for span, _ in span_slices(row, "text")] for row in spans] == [[1, 2, 0], [1, 0]]
    token_mask = changed["joint_attention_kwargs"]["token_mask"]
    for row, row_spans in enumerate(spans):
        own_mask = chroma.encode_prompts([PROMPTS[row]])["prompt_attention_mask"][0]
        *regions, own = (tokens for _, tokens in span_slices(row_spans, "text"))
        assert torch.equal(token_mask[row, own], own_mask)
        for prompt, tokens in zip(prompts[row], regions, strict=True):
            mask = prompt.conditioning["prompt_attention_mask"][0]
            assert torch.equal(token_mask[row, tokens], mask[prompt.token_slice] if trim_padding else mask)
        assert all((token_mask[row, tokens] == 1).all() for _, tokens in span_slices(row_spans, "image"))


def test_every_layer_that_takes_tokens_has_a_token_stream(chroma):
    denoiser, calls = recorded_run(chroma, PROMPTS)
    prompts = [chroma.encode_separately(["a door", "ivy"])] * 2
    changed, spans = denoiser.append_prompts(calls[0][0], prompts, trim_padding=True)
    streams = token_streams_of(denoiser, changed, spans)
    assert {name for name, (stream, found) in streams.items() if stream is None and found} == set()
    assert all(found == [stream] for stream, found in streams.values() if stream is not None)
    assert {stream for stream, _ in streams.values()} == {None, "image", "text", "joint"}


def test_regions_change_a_prediction_only_where_they_are_and_each_row_has_its_own(chroma):
    denoiser, calls = recorded_run(chroma, PROMPTS)
    call, output = calls[0]
    regions = [
        [EncodedRegion(aa.Region(area, prompt), *chroma.encode_separately([prompt]))]
        for area, prompt in ((LEFT, "a stormy sky"), (RIGHT, "ivy"))
    ]
    before = hooks_of(chroma.module)
    with under(OutputMix(), denoiser, regions):
        change = (predict_call(denoiser, call) - output[0]).reshape(2, 8, 6, -1)
        if chroma.negative is not None:
            assert torch.equal(predict_call(denoiser, calls[1][0]), calls[1][1][0])
    assert hooks_of(chroma.module) == before
    assert (change[0, :, 3:] == 0).all()
    assert (change[0, :, :3] != 0).any()
    assert (change[1, :, :3] == 0).all()
    assert (change[1, :, 3:] != 0).any()


def test_what_guides_promise_holds(chroma):
    check_family(synthesizer_of(chroma))


def test_outside_the_sigmas_of_a_guide_the_plan_is_drawn_plainly(chroma):
    plain = [aa.Plan(prompt) for prompt in PROMPTS]
    regional = [aa.Plan(prompt, (aa.Region(LEFT, "ivy"),)) for prompt in PROMPTS]
    never = Isolation(sigma_range=(0.0, 0.001))
    assert guided(chroma, regional, isolation=never) == guided(chroma, plain)


def test_a_training_can_be_estimated_from_configs_alone(tmp_path):
    pipeline = tiny_chroma()
    pipeline.save_pretrained(tmp_path)
    for file in tmp_path.rglob("*"):
        if file.is_file() and "config" not in file.name and file.name != "model_index.json":
            file.unlink()
    expected = estimate(pipeline, width=32, height=32, dtype=torch.float32)
    found = estimate(tmp_path, width=32, height=32, dtype=torch.float32)
    assert found == expected
    family = family_of(Chroma1, meta_pipeline(tmp_path, dtype=torch.float32), width=32, height=32)
    encoded = family_of(Chroma1, pipeline).encode_prompts(["a lake"])
    assert text_shapes(family) == {name: tuple(tensor.shape[1:]) for name, tensor in encoded.items()}


@pytest.mark.parametrize("file_format", [Format.PEFT, Format.KOHYA, Format.COMFYUI])
def test_a_lora_is_exported_in_every_format_and_read_by_diffusers(tmp_path, file_format):
    generator = torch.Generator().manual_seed(0)
    shapes = {"transformer_blocks.0.attn.to_q": (3072, 3072), "single_transformer_blocks.1.proj_mlp": (12288, 3072)}
    lora = aa.LoRA(
        {
            name: aa.LowRank(torch.randn(2, inputs, generator=generator), torch.randn(outputs, 2, generator=generator))
            for name, (outputs, inputs) in shapes.items()
        }
    )
    path = lora.save(tmp_path / "lora.safetensors", format=file_format, key_map=Chroma1.key_map)
    verification = verify_export(path, lora, family=Chroma1)
    assert verification.readers == ("LoRA.load", "the format's definition", "ChromaPipeline")
    assert verification.worst[1] < 1e-6


def test_every_layer_of_chroma_is_in_its_key_map_and_nothing_else():
    with torch.device("meta"):
        transformer = type(tiny_chroma().transformer)()
    layers = [name for name, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)]
    matches = {name: Chroma1.key_map.match(name) for name in layers}
    assert [name for name, match in matches.items() if match is None] == []
    assert sum(len(match.diffusers) for match in set(matches.values())) == len(layers)
    assert {match.row for match in matches.values()} == set(Chroma1.key_map.rows)


def test_the_approximator_is_refused_in_formats_that_diffusers_does_not_read(tmp_path):
    lora = aa.LoRA({"distilled_guidance_layer.in_proj": aa.LowRank(torch.ones(1, 64), torch.ones(5120, 1))})
    verify_export(lora.save(tmp_path / "peft.safetensors"), lora, family=Chroma1)
    with pytest.raises(aa.LoRAError, match=r"distilled_guidance_layer\.in_proj"):
        lora.save(tmp_path / "kohya.safetensors", format=Format.KOHYA, key_map=Chroma1.key_map)


def test_a_cut_prompt_is_warned_of_with_what_is_cut():
    with pytest.warns(UserWarning, match="T5 reads 12 tokens and the prompt 'a red barn by night' has 21: cut off is"):
        chroma_of(max_sequence_length=12).encode_prompts(["a red barn by night"])


def test_a_missing_component_is_named():
    pipeline = tiny_chroma()
    pipeline.text_encoder = None
    with pytest.raises(aa.ModelError, match=r"loaded without \['text_encoder'\]"):
        family_of(Chroma1, pipeline)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30}, "positive multiples of 4"),
        ({"negative_prompt": "blurry", "guidance_scale": 1.0}, "would be ignored"),
        ({"true_cfg_scale": 4.0}, "Set guidance_scale"),
        ({"max_sequence_length": 513}, "Chroma reads 1 to 512 tokens"),
    ],
)
def test_what_would_have_no_effect_is_refused(options, message):
    with pytest.raises(aa.ModelError, match=message):
        chroma_of(**options)


def test_a_foreign_processor_is_refused_by_name():
    denoiser, _ = recorded_run(chroma_of(), ["a"], steps=1)
    site = denoiser.sites[0]
    site.attention.processor = JointAttnProcessor2_0()
    with pytest.raises(aa.GuideError, match=r"uses JointAttnProcessor2_0.*Expected FluxAttnProcessor"):
        denoiser.processor(site, scaled_dot_product_attention)
