"""Regional attention on a real FLUX transformer: what is exact, what stays apart, and what is left behind."""

import shutil

import numpy as np
import pytest
import torch

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer, Flux
from artaug.regional import ELIGEN, INSTANTX, INVOKEAI, OPEN, Denoiser, EncodedRegion
from support.tiny_flux import TINY_SIZE, tiny_flux
from support.traces import hooks_of

LEFT, RIGHT, FULL = aa.Box(0, 0, 0.5, 1), aa.Box(0.5, 0, 1, 1), aa.Box(0, 0, 1, 1)
SOFT = aa.Box(0.1, 0.2, 0.55, 0.9)
PLAIN = "a red barn"
PRESETS = {"open": OPEN, "eligen": ELIGEN, "instantx": INSTANTX, "invokeai": INVOKEAI}
APART = aa.Isolation(image_to_image="regions")


@pytest.fixture(scope="module")
def pipeline():
    return tiny_flux()


def synthesizer(pipeline, guide=None, **options):
    size = {"width": TINY_SIZE, "height": TINY_SIZE, "steps": 2, "max_sequence_length": 24}
    return DiffusersSynthesizer(pipeline=pipeline, guide=guide, **{**size, **options})


def drawn(pipeline, plan, guide, *, seed=0, **options):
    return np.asarray(synthesizer(pipeline, guide, **options).synthesize(plan, seed=seed)).astype(int)


def processors_of(module):
    return [one.processor for one in module.modules() if hasattr(one, "processor")]


class Run:
    """One step of a run, and what every layer's attention is asked and answers in it."""

    def __init__(self, pipeline, regions, *, prompts=(PLAIN,), guide=None, level=0.7):
        self.flux = Flux(
            pipeline=pipeline,
            width=TINY_SIZE,
            height=TINY_SIZE,
            guidance_scale=None,
            negative_prompt=None,
            true_cfg_scale=1.0,
            max_sequence_length=24,
        )
        self.conditioning = self.flux.encode_prompts(list(prompts))
        self.latents = torch.randn(len(prompts), 64, 16, generator=torch.Generator().manual_seed(0))
        self.level = level
        encoded = [[EncodedRegion(one, *self.flux.encode_separately([one.prompt])) for one in row] for row in regions]
        self.answers = []
        watches = [
            block.register_forward_hook(lambda _block, _args, output: self.answers.append(output))
            for block in (*pipeline.transformer.transformer_blocks, *pipeline.transformer.single_transformer_blocks)
        ]
        with (guide or aa.RegionalAttention()).steering(self.flux.denoiser(self.conditioning), encoded):
            self.prediction = self.predict()
        for watch in watches:
            watch.remove()

    def predict(self):
        return self.flux.predict(self.latents, torch.full((len(self.latents),), self.level), self.conditioning)


@pytest.mark.parametrize("isolation", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("method", ["auto", "merged"])
def test_every_method_draws_what_the_dense_mask_draws(pipeline, isolation, method):
    regions = [[aa.Region(SOFT, "a blue door", weight=2.0), aa.Region(LEFT, "ivy", feather=0.1)], []]
    told = [
        Run(pipeline, regions, prompts=(PLAIN, "a lake"), guide=aa.RegionalAttention(isolation=isolation, method=one))
        for one in (method, "dense")
    ]
    torch.testing.assert_close(told[0].prediction, told[1].prediction, atol=1e-5, rtol=1e-5)


def test_grouped_attention_draws_what_the_dense_mask_draws(pipeline):
    regions = [[aa.Region(LEFT, "a blue door"), aa.Region(RIGHT, "ivy")]]
    told = [
        Run(pipeline, regions, guide=aa.RegionalAttention(isolation=APART, method=one)) for one in ("grouped", "dense")
    ]
    torch.testing.assert_close(told[0].prediction, told[1].prediction, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch, and takes an error for a fault
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_flex_attention_draws_what_the_dense_mask_draws(pipeline):
    regions = [[aa.Region(SOFT, "a blue door"), aa.Region(LEFT, "ivy")]]
    with torch.no_grad():
        told = [Run(pipeline, regions, guide=aa.RegionalAttention(method=one)) for one in ("flex", "dense")]
    torch.testing.assert_close(told[0].prediction, told[1].prediction, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("isolation", PRESETS.values(), ids=PRESETS)
def test_without_regions_the_picture_is_plain_bit_for_bit(pipeline, isolation):
    guide = aa.RegionalAttention(isolation=isolation)
    assert (drawn(pipeline, aa.Plan(PLAIN), guide) == drawn(pipeline, aa.Plan(PLAIN), None)).all()


def test_beside_a_plan_with_regions_a_plan_without_stays_plain(pipeline):
    run = Run(pipeline, [[aa.Region(LEFT, "a blue door")], []], prompts=(PLAIN, "a lake"))
    torch.testing.assert_close(run.prediction[1], run.predict()[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(run.prediction[0], run.predict()[0], atol=1e-3)


@pytest.mark.parametrize("isolation", [aa.Isolation(), APART])
def test_a_region_of_everything_that_says_what_the_plan_says_changes_nothing(pipeline, isolation):
    guide = aa.RegionalAttention(isolation=isolation, trim_padding=False)
    run = Run(pipeline, [[aa.Region(FULL, PLAIN)]], guide=guide)
    torch.testing.assert_close(run.prediction, run.predict(), atol=1e-5, rtol=1e-5)


def test_padding_left_out_is_a_choice_that_shows(pipeline):
    kept, left_out = (
        Run(
            pipeline, [[aa.Region(FULL, PLAIN)]], guide=aa.RegionalAttention(isolation=APART, trim_padding=trim_padding)
        )
        for trim_padding in (False, True)
    )
    assert kept.answers[0][0].shape[1] == 24 + 24
    assert left_out.answers[0][0].shape[1] == 24 + 12
    assert not torch.allclose(kept.prediction, left_out.prediction, atol=1e-4)


def test_in_the_first_layer_another_prompt_changes_its_own_region_only(pipeline):
    one, other = (
        Run(
            pipeline,
            [[aa.Region(LEFT, "blue"), aa.Region(RIGHT, said)]],
            guide=aa.RegionalAttention(isolation=APART, trim_padding=False),
        )
        for said in ("ivy", "ice")
    )
    (texts, image), (other_texts, other_image) = one.answers[0], other.answers[0]
    change = (image - other_image).reshape(8, 8, -1).abs().amax(dim=-1)
    assert (change[:, :4] == 0).all()
    assert (change[:, 4:] > 0).all()
    changed = (texts - other_texts).abs().amax(dim=-1)[0]
    left, right, plan = changed.split(24)
    assert (left == 0).all()
    assert (plan == 0).all()
    assert (right > 0).any()


def test_a_batch_draws_what_each_picture_draws_alone(pipeline):
    plans = [
        aa.Plan(PLAIN, (aa.Region(SOFT, "a blue door"),)),
        aa.Plan("a lake"),
        aa.Plan("a hill", (aa.Region(LEFT, "ivy"), aa.Region(RIGHT, "a stormy sky", weight=0.5))),
        aa.Plan(PLAIN, (aa.Region(SOFT, "a blue door"),)),
    ]
    together = synthesizer(pipeline, aa.RegionalAttention()).synthesize_batch(plans, seeds=range(4))
    for seed, (plan, picture) in enumerate(zip(plans, together, strict=True)):
        alone = drawn(pipeline, plan, aa.RegionalAttention(), seed=seed)
        assert np.abs(np.asarray(picture).astype(int) - alone).max() <= 1


def test_above_the_window_of_noise_levels_only_the_plans_prompt_draws(pipeline):
    late = aa.RegionalAttention(isolation=aa.Isolation(sigma_range=(0.0, 0.5)))
    run = Run(pipeline, [[aa.Region(LEFT, "a blue door")]], guide=late, level=0.7)
    assert torch.equal(run.prediction, run.predict())


def test_a_regions_negative_prompt_steers_the_negative_branch(pipeline):
    guided = {"negative_prompt": "blurry", "true_cfg_scale": 3.0}
    said = [aa.Region(LEFT, "a blue door"), aa.Region(LEFT, "a blue door", negative_prompt="rust")]
    one, other = (
        drawn(pipeline, aa.Plan(PLAIN, (region,)), aa.RegionalAttention(), **guided, steps=1) for region in said
    )
    assert (one != other).any()
    for guide in (aa.RegionalAttention(), aa.OutputMix()):
        with pytest.raises(aa.GuideError, match="without classifier-free guidance"):
            drawn(pipeline, aa.Plan(PLAIN, (said[1],)), guide)


def test_nothing_remains_after_a_run_nor_after_an_exception(pipeline):
    transformer = pipeline.transformer
    before = hooks_of(transformer), processors_of(transformer)
    plan = aa.Plan(PLAIN, (aa.Region(LEFT, "a blue door"),))
    drawn(pipeline, plan, aa.RegionalAttention())
    assert (hooks_of(transformer), processors_of(transformer)) == before
    with pytest.raises(aa.GuideError, match="nobody would read"):
        drawn(pipeline, aa.Plan(PLAIN, (aa.Region(aa.Box(0, 0, 1e-4, 1e-4), "a mote"),)), aa.RegionalAttention())
    with (
        transformer.register_forward_hook(lambda *_: 1 / 0),
        pytest.raises(ZeroDivisionError),
    ):
        drawn(pipeline, plan, aa.RegionalAttention())
    assert (hooks_of(transformer), processors_of(transformer)) == before


def test_two_guides_never_meet(pipeline):
    plan = aa.Plan(PLAIN, (aa.Region(LEFT, "a blue door"),))

    def draw_again(*_):
        drawn(pipeline, plan, aa.OutputMix())

    with (
        pipeline.transformer.register_forward_hook(draw_again),
        pytest.raises(
            aa.GuideError, match=r"OutputMix\(\) cannot steer a FluxTransformer2DModel that RegionalAttention"
        ),
    ):
        drawn(pipeline, plan, aa.RegionalAttention())


def test_attention_that_would_misread_the_plan_is_refused_by_name(pipeline):
    plan = aa.Plan(PLAIN, (aa.Region(LEFT, "a blue door"),))
    attention = pipeline.transformer.transformer_blocks[0].attn
    attention.processor._attention_backend = "sage"  # noqa: SLF001 - what set_attention_backend sets
    try:
        with pytest.raises(aa.GuideError, match="attention backend 'sage'"):
            drawn(pipeline, plan, aa.RegionalAttention())
    finally:
        attention.processor._attention_backend = None  # noqa: SLF001 - likewise
    kept = attention.processor
    attention.set_processor(type("SomeAdapter", (type(kept),), {})())
    try:
        with pytest.raises(aa.GuideError, match="attention uses SomeAdapter"):
            drawn(pipeline, plan, aa.RegionalAttention())
    finally:
        attention.set_processor(kept)


def test_a_denoiser_that_hides_its_attention_is_refused():
    class Opaque(Denoiser):
        def branches(self, call): ...

        def with_prompt_embeds(self, call, rows, texts): ...

    opaque = Opaque(module=torch.nn.Linear(1, 1), grid=(1, 1))
    with (
        pytest.raises(aa.GuideError, match="Opaque does not say where its model's attention is"),
        aa.RegionalAttention().steering(opaque, [[]]),
    ):
        pass


def test_regions_are_followed_in_training_too_and_under_checkpointing(pipeline):
    transformer = pipeline.transformer
    slopes = []
    for checkpointing in (False, True):
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.train(checkpointing)  # diffusers checkpoints whatever the mode; dropout is 0
        run = Run.__new__(Run)
        Run.__init__(run, pipeline, [[aa.Region(LEFT, "a blue door")]], guide=aa.RegionalAttention())
        weight = transformer.single_transformer_blocks[0].attn.to_q.weight
        flux, regions = run.flux, [[EncodedRegion(aa.Region(SOFT, "ivy"), *run.flux.encode_separately(["ivy"]))]]
        with aa.RegionalAttention().steering(flux.denoiser(run.conditioning), regions):
            (slope,) = torch.autograd.grad(run.predict().square().sum(), [weight])
        slopes.append(slope)
    transformer.disable_gradient_checkpointing()
    transformer.eval()
    assert slopes[0].abs().max() > 0
    torch.testing.assert_close(*slopes)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch, and takes an error for a fault
def test_a_compiled_model_draws_the_same():
    plan = aa.Plan(PLAIN, (aa.Region(SOFT, "a blue door"), aa.Region(RIGHT, "ivy")))
    wanted = drawn(tiny_flux(), plan, aa.RegionalAttention())
    compiled = tiny_flux()
    compiled.transformer.compile_repeated_blocks(backend="eager")
    assert np.abs(drawn(compiled, plan, aa.RegionalAttention()) - wanted).max() <= 1
    assert np.abs(drawn(compiled, aa.Plan(PLAIN), None) - drawn(tiny_flux(), aa.Plan(PLAIN), None)).max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_nearly_the_same(dtype):
    plan = aa.Plan(PLAIN, (aa.Region(SOFT, "a blue door"), aa.Region(RIGHT, "ivy")))
    pipeline = tiny_flux().to(dtype)
    told = [drawn(pipeline, plan, aa.RegionalAttention(method=method)) for method in ("auto", "dense")]
    assert np.abs(told[0] - told[1]).mean() < 2
    assert np.abs(told[0] - drawn(pipeline, aa.Plan(PLAIN), None)).max() > 2


def test_an_offloaded_model_draws_the_same():
    plan = aa.Plan(PLAIN, (aa.Region(SOFT, "a blue door"), aa.Region(RIGHT, "ivy")))
    offloaded, here = tiny_flux(), torch.device("cpu")
    offloaded.transformer.enable_group_offload(onload_device=here, offload_device=here, offload_type="leaf_level")
    wanted = drawn(tiny_flux(), plan, aa.RegionalAttention())
    assert np.abs(drawn(offloaded, plan, aa.RegionalAttention()) - wanted).max() <= 1


@pytest.mark.filterwarnings("ignore")  # deprecated, but the one way of torch itself that needs no other package
def test_a_model_with_quantized_layers_is_guided_as_it_is():
    plan = aa.Plan(PLAIN, (aa.Region(SOFT, "a blue door"), aa.Region(RIGHT, "ivy")))
    quantized = tiny_flux()
    quantized.transformer = torch.ao.quantization.quantize_dynamic(quantized.transformer, {torch.nn.Linear})
    told = [drawn(quantized, plan, aa.RegionalAttention(method=method)) for method in ("auto", "dense")]
    assert np.abs(told[0] - told[1]).max() <= 1
    assert np.abs(told[0] - drawn(quantized, aa.Plan(PLAIN), None)).max() > 2


def test_a_lora_worn_everywhere_and_regions_go_together(pipeline):
    regions = [[aa.Region(FULL, PLAIN)]]
    with lora().applied_to(pipeline.transformer):
        run = Run(pipeline, regions, guide=aa.RegionalAttention(isolation=APART, trim_padding=False))
        wanted = run.predict()
    torch.testing.assert_close(run.prediction, wanted, atol=1e-4, rtol=1e-4)


def lora(seed=0, *, layers=("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp")):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"proj_mlp": 128}
    return aa.LoRA(
        {
            name: aa.LowRank(
                torch.randn(2, 32, generator=generator),
                torch.randn(shapes.get(name.split(".")[-1], 32), 2, generator=generator),
            )
            for name in layers
        }
    )


def test_a_lora_of_a_region_of_everything_is_the_lora(pipeline):
    wearing = aa.RegionalAttention(isolation=APART, trim_padding=False, loras={"anna": lora()})
    run = Run(pipeline, [[aa.Region(FULL, PLAIN, lora="anna")]], guide=wearing)
    with lora().applied_to(pipeline.transformer):
        wanted = run.predict()
    torch.testing.assert_close(run.prediction, wanted, atol=1e-4, rtol=1e-4)


def test_under_guidance_in_two_calls_a_lora_of_a_region_of_everything_is_the_lora(pipeline):
    """The call of the negative prompt has no region's prompt in it, and wears the LoRA all the same."""
    worn = lora(layers=("transformer_blocks.0.attn.to_out.0",))
    sides = {"width": TINY_SIZE, "height": TINY_SIZE, "steps": 1, "negative_prompt": "bad", "true_cfg_scale": 4.0}
    guide = aa.RegionalAttention(isolation=APART, trim_padding=False, loras={"anna": worn})
    plan = aa.Plan(PLAIN, (aa.Region(FULL, PLAIN, lora="anna"),))
    drawn, whole, plain = (
        np.asarray(one.synthesize(said, seed=0), dtype=int)
        for one, said in (
            (DiffusersSynthesizer(pipeline=pipeline, guide=guide, **sides), plan),
            (DiffusersSynthesizer(pipeline=pipeline, **sides).with_lora(worn), aa.Plan(PLAIN)),
            (DiffusersSynthesizer(pipeline=pipeline, **sides), aa.Plan(PLAIN)),
        )
    )
    assert abs(drawn - whole).max() <= 1
    assert abs(whole - plain).mean() > 2


def test_a_region_wears_its_lora_alone_in_the_layer_it_acts_on(pipeline):
    worn = lora(layers=("transformer_blocks.0.attn.to_out.0",))
    guide = aa.RegionalAttention(isolation=APART, loras={"anna": worn})
    said = [[aa.Region(LEFT, "blue", lora=wears), aa.Region(RIGHT, "ivy")] for wears in (None, "anna")]
    plain, wearing = (Run(pipeline, [regions], guide=guide) for regions in said)
    change = (plain.answers[0][1] - wearing.answers[0][1]).reshape(8, 8, -1).abs().amax(dim=-1)
    assert (change[:, 4:] == 0).all()
    assert (change[:, :4] > 0).all()
    assert (plain.answers[0][0] == wearing.answers[0][0]).all()


def test_output_mixing_wears_a_regions_lora_for_its_prediction(pipeline):
    guide = aa.OutputMix(loras={"anna": lora()})
    run = Run(pipeline, [[aa.Region(FULL, PLAIN, lora="anna")]], guide=guide)
    with lora().applied_to(pipeline.transformer):
        worn = run.predict()
    torch.testing.assert_close(run.prediction, (run.predict() + worn) / 2, atol=1e-5, rtol=1e-5)


def test_a_lora_nobody_knows_or_no_region_can_wear_is_said(pipeline):
    for guide in (aa.RegionalAttention(loras={"bea": lora()}), aa.OutputMix(loras={"bea": lora()})):
        with pytest.raises(aa.GuideError, match=r"wants the LoRA 'anna' and the guide knows \['bea'\]"):
            drawn(pipeline, aa.Plan(PLAIN, (aa.Region(LEFT, "ivy", lora="anna"),)), guide)
    plan = aa.Plan(PLAIN, (aa.Region(LEFT, "ivy", lora="anna"),))
    modulation = aa.LowRank(torch.ones(1, 32), torch.ones(96, 1))
    whole = aa.LoRA({"single_transformer_blocks.0.norm.linear": modulation})
    with pytest.raises(aa.GuideError, match="no layer of the LoRA 'anna' works on tokens"):
        drawn(pipeline, plan, aa.RegionalAttention(loras={"anna": whole}))
    mixed = aa.LoRA({**lora().layers, **whole.layers})
    with pytest.warns(UserWarning, match="1 of 3 layers of the LoRA 'anna' act on the whole picture"):
        drawn(pipeline, plan, aa.RegionalAttention(loras={"anna": mixed}))
