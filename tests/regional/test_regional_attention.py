"""Regional attention on a real FLUX transformer: what is exact, what is isolated, and what is left behind."""

import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend

import artaug as aa
from artaug.regional import ELIGEN, INSTANTX, INVOKEAI, OPEN, Denoiser, EncodedPrompt, EncodedRegion
from support.guided_flux import FULL, ISOLATED, LEFT, PROMPT, RIGHT, GuidedStep, draw, synthesizer
from support.guiding import under
from support.tiny_flux import tiny_flux
from support.traces import hooks_of

SOFT = aa.Box(0.1, 0.2, 0.55, 0.9)
PRESETS = {"open": OPEN, "eligen": ELIGEN, "instantx": INSTANTX, "invokeai": INVOKEAI}


@pytest.fixture(scope="module")
def pipeline():
    return tiny_flux()


def processors_of(module):
    return [layer.processor for layer in module.modules() if hasattr(layer, "processor")]


@pytest.mark.parametrize("isolation", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("method", ["auto", "merged"])
def test_every_method_draws_what_the_dense_mask_draws(pipeline, isolation, method):
    regions = [[aa.Region(SOFT, "a blue door", weight=2.0), aa.Region(LEFT, "ivy", feather=0.1)], []]
    results = [
        GuidedStep(
            pipeline, regions, prompts=(PROMPT, "a lake"), guide=aa.RegionalAttention(isolation=isolation, method=name)
        )
        for name in (method, "dense")
    ]
    torch.testing.assert_close(results[0].prediction, results[1].prediction, atol=1e-5, rtol=1e-5)


def test_grouped_attention_draws_what_the_dense_mask_draws(pipeline):
    regions = [[aa.Region(LEFT, "a blue door"), aa.Region(RIGHT, "ivy")]]
    results = [
        GuidedStep(pipeline, regions, guide=aa.RegionalAttention(isolation=ISOLATED, method=name))
        for name in ("grouped", "dense")
    ]
    torch.testing.assert_close(results[0].prediction, results[1].prediction, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch, and takes an error for a fault
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_flex_attention_draws_what_the_dense_mask_draws(pipeline):
    regions = [[aa.Region(SOFT, "a blue door"), aa.Region(LEFT, "ivy")]]
    with torch.no_grad():
        results = [GuidedStep(pipeline, regions, guide=aa.RegionalAttention(method=name)) for name in ("flex", "dense")]
    torch.testing.assert_close(results[0].prediction, results[1].prediction, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("isolation", PRESETS.values(), ids=PRESETS)
def test_without_regions_the_picture_is_plain_bit_for_bit(pipeline, isolation):
    guide = aa.RegionalAttention(isolation=isolation)
    assert (draw(pipeline, aa.Plan(PROMPT), guide) == draw(pipeline, aa.Plan(PROMPT), None)).all()


def test_beside_a_plan_with_regions_a_plan_without_stays_plain(pipeline):
    run = GuidedStep(pipeline, [[aa.Region(LEFT, "a blue door")], []], prompts=(PROMPT, "a lake"))
    torch.testing.assert_close(run.prediction[1], run.predict()[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(run.prediction[0], run.predict()[0], atol=1e-3)


@pytest.mark.parametrize("isolation", [aa.Isolation(), ISOLATED])
def test_a_region_of_everything_with_the_plans_prompt_changes_nothing(pipeline, isolation):
    guide = aa.RegionalAttention(isolation=isolation, trim_padding=False)
    run = GuidedStep(pipeline, [[aa.Region(FULL, PROMPT)]], guide=guide)
    torch.testing.assert_close(run.prediction, run.predict(), atol=1e-5, rtol=1e-5)


def test_padding_left_out_is_a_choice_that_shows(pipeline):
    kept, left_out = (
        GuidedStep(
            pipeline,
            [[aa.Region(FULL, PROMPT)]],
            guide=aa.RegionalAttention(isolation=ISOLATED, trim_padding=trim_padding),
        )
        for trim_padding in (False, True)
    )
    assert kept.block_outputs[0][0].shape[1] == 24 + 24
    assert left_out.block_outputs[0][0].shape[1] == 24 + 12
    assert not torch.allclose(kept.prediction, left_out.prediction, atol=1e-4)


def test_in_the_first_layer_another_prompt_changes_its_own_region_only(pipeline):
    ivy, ice = (
        GuidedStep(
            pipeline,
            [[aa.Region(LEFT, "blue"), aa.Region(RIGHT, prompt)]],
            guide=aa.RegionalAttention(isolation=ISOLATED, trim_padding=False),
        )
        for prompt in ("ivy", "ice")
    )
    (texts, image), (other_texts, other_image) = ivy.block_outputs[0], ice.block_outputs[0]
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
        aa.Plan(PROMPT, (aa.Region(SOFT, "a blue door"),)),
        aa.Plan("a lake"),
        aa.Plan("a hill", (aa.Region(LEFT, "ivy"), aa.Region(RIGHT, "a stormy sky", weight=0.5))),
        aa.Plan(PROMPT, (aa.Region(SOFT, "a blue door"),)),
    ]
    together = synthesizer(pipeline, aa.RegionalAttention()).synthesize_batch(plans, seeds=range(4))
    for seed, (plan, picture) in enumerate(zip(plans, together, strict=True)):
        alone = draw(pipeline, plan, aa.RegionalAttention(), seed=seed)
        assert np.abs(np.asarray(picture).astype(int) - alone).max() <= 1


def test_above_the_sigma_range_only_the_plans_prompt_counts(pipeline):
    late = aa.RegionalAttention(isolation=aa.Isolation(sigma_range=(0.0, 0.5)))
    run = GuidedStep(pipeline, [[aa.Region(LEFT, "a blue door")]], guide=late, sigma=0.7)
    assert torch.equal(run.prediction, run.predict())


def test_a_regions_negative_prompt_steers_the_negative_branch(pipeline):
    guided = {"negative_prompt": "blurry", "true_cfg_scale": 3.0}
    regions = [aa.Region(LEFT, "a blue door"), aa.Region(LEFT, "a blue door", negative_prompt="rust")]
    plain, negated = (
        draw(pipeline, aa.Plan(PROMPT, (region,)), aa.RegionalAttention(), **guided, steps=1) for region in regions
    )
    assert (plain != negated).any()
    for guide in (aa.RegionalAttention(), aa.OutputMix()):
        with pytest.raises(aa.GuideError, match="without classifier-free guidance"):
            draw(pipeline, aa.Plan(PROMPT, (regions[1],)), guide)


def test_nothing_remains_after_a_run_nor_after_an_exception(pipeline):
    transformer = pipeline.transformer
    before = hooks_of(transformer), processors_of(transformer)
    plan = aa.Plan(PROMPT, (aa.Region(LEFT, "a blue door"),))
    draw(pipeline, plan, aa.RegionalAttention())
    assert (hooks_of(transformer), processors_of(transformer)) == before
    with pytest.raises(aa.GuideError, match="its prompt would have no effect"):
        draw(pipeline, aa.Plan(PROMPT, (aa.Region(aa.Box(0, 0, 1e-4, 1e-4), "a mote"),)), aa.RegionalAttention())
    with (
        transformer.register_forward_hook(lambda *_: 1 / 0),
        pytest.raises(ZeroDivisionError),
    ):
        draw(pipeline, plan, aa.RegionalAttention())
    assert (hooks_of(transformer), processors_of(transformer)) == before


def test_a_region_under_others_is_left_out_with_a_warning(pipeline):
    hidden, above = aa.Region(LEFT, "a blue door"), aa.Region(FULL, "ivy")
    guide = aa.RegionalAttention(overlap="over")
    with pytest.warns(UserWarning, match=r"no share of any image token to 1 of 2 regions .*'a blue door'.*no effect"):
        drawn = draw(pipeline, aa.Plan(PROMPT, (hidden, above)), guide)
    expected = draw(pipeline, aa.Plan(PROMPT, (above,)), guide)
    assert abs(drawn.astype(int) - expected.astype(int)).max() <= 1


def test_every_other_block_of_each_stack_is_isolated_as_in_invokeai(pipeline):
    step = GuidedStep(pipeline, [[]])
    sites = step.flux.denoiser(step.conditioning).sites
    assert [(site.block, site.stack_start) for site in sites] == [(0, 0), (1, 1), (2, 1)]


def test_an_attention_processor_that_would_be_lost_is_refused_by_name(pipeline):
    plan = aa.Plan(PROMPT, (aa.Region(LEFT, "a blue door"),))
    attention = pipeline.transformer.transformer_blocks[0].attn
    kept = attention.processor
    attention.set_processor(type("SomeAdapter", (type(kept),), {})())
    try:
        with pytest.raises(aa.GuideError, match="attention uses SomeAdapter"):
            draw(pipeline, plan, aa.RegionalAttention())
    finally:
        attention.set_processor(kept)


@contextmanager
def with_backend(transformer, backend):
    """What `set_attention_backend` does, without its check of what is installed."""
    active, _ = _AttentionBackendRegistry.get_active_backend()
    processors = [layer.processor for layer in transformer.modules() if hasattr(layer, "processor")]
    for processor in processors:
        processor._attention_backend = backend  # noqa: SLF001 - what it sets
    try:
        yield
    finally:
        for processor in processors:
            processor._attention_backend = None  # noqa: SLF001 - likewise
        _AttentionBackendRegistry.set_active_backend(active)


def test_the_native_backend_draws_regions_bit_for_bit_as_no_backend(pipeline):
    plan = aa.Plan(PROMPT, (aa.Region(LEFT, "ivy"),))
    expected = draw(pipeline, plan, aa.RegionalAttention())
    with with_backend(pipeline.transformer, None):
        pipeline.transformer.set_attention_backend("native")
        assert (draw(pipeline, plan, aa.RegionalAttention()) == expected).all()
        plain = draw(pipeline, aa.Plan(PROMPT), aa.RegionalAttention())
    assert (plain == draw(pipeline, aa.Plan(PROMPT), None)).all()


@pytest.mark.parametrize("backend", [name for name in AttentionBackendName if name != AttentionBackendName.NATIVE])
def test_another_backend_is_refused_with_the_reason_and_the_way_out(pipeline, backend):
    plan = aa.Plan(PROMPT, (aa.Region(LEFT, "ivy"),))
    message = rf"the backend '{backend.value}', which [a-z ].*\. Call its set_attention_backend\('native'\) first"
    for guide in (
        aa.RegionalAttention(),
        aa.Together((aa.OutputMix(), aa.AttentionProbe(phrases=["barn"], receive=print))),
    ):
        with with_backend(pipeline.transformer, backend), pytest.raises(aa.GuideError, match=message):
            draw(pipeline, plan, guide)


def test_a_backend_that_is_active_for_all_models_is_refused_and_output_mix_works_with_it(pipeline):
    plan = aa.Plan(PROMPT, (aa.Region(LEFT, "ivy"),))
    expected = draw(pipeline, plan, aa.OutputMix())
    with attention_backend("_native_math"):
        with pytest.raises(aa.GuideError, match="the backend '_native_math', which returns no log-sum-exp"):
            draw(pipeline, plan, aa.RegionalAttention())
        assert np.abs(draw(pipeline, plan, aa.OutputMix()) - expected).max() <= 1


def test_a_denoiser_that_hides_its_attention_is_refused():
    class Opaque(Denoiser):
        def branches(self, kwargs): ...

        def with_prompt_embeds(self, kwargs, rows, prompts): ...

    opaque = Opaque(module=torch.nn.Linear(1, 1), grid=(1, 1))
    with (
        pytest.raises(aa.GuideError, match="Opaque does not say where its model's attention is"),
        under(aa.RegionalAttention(), opaque, [[EncodedRegion(aa.Region(LEFT, "ivy"), EncodedPrompt({}, slice(0)))]]),
    ):
        pass


def test_regions_are_followed_in_training_too_and_under_checkpointing(pipeline):
    transformer = pipeline.transformer
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.train(checkpointing)  # diffusers checkpoints whatever the mode; dropout is 0
        step = GuidedStep(pipeline, [[aa.Region(LEFT, "a blue door")]], guide=aa.RegionalAttention())
        weight = transformer.single_transformer_blocks[0].attn.to_q.weight
        regions = [step.encode([aa.Region(SOFT, "ivy")])]
        with under(aa.RegionalAttention(), step.flux.denoiser(step.conditioning), regions):
            (gradient,) = torch.autograd.grad(step.predict().square().sum(), [weight])
        gradients.append(gradient)
    transformer.disable_gradient_checkpointing()
    transformer.eval()
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def test_a_call_outside_the_sigma_range_after_a_guided_one_is_plain(pipeline):
    early = aa.RegionalAttention(isolation=aa.Isolation(sigma_range=(0.5, 1.0)))
    step = GuidedStep(pipeline, [[]])
    regions = [step.encode([aa.Region(LEFT, "a blue door")])]
    with under(early, step.flux.denoiser(step.conditioning), regions):
        guided = step.predict()
        step.sigma = 0.3
        late = step.predict()
    assert torch.equal(late, step.predict())
    step.sigma = 0.7
    assert not torch.allclose(guided, step.predict(), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_nearly_the_same(dtype):
    plan = aa.Plan(PROMPT, (aa.Region(SOFT, "a blue door"), aa.Region(RIGHT, "ivy")))
    pipeline = tiny_flux().to(dtype)
    results = [draw(pipeline, plan, aa.RegionalAttention(method=method)) for method in ("auto", "dense")]
    assert np.abs(results[0] - results[1]).mean() < 2
    assert np.abs(results[0] - draw(pipeline, aa.Plan(PROMPT), None)).max() > 2


def test_an_offloaded_model_draws_the_same():
    plan = aa.Plan(PROMPT, (aa.Region(SOFT, "a blue door"), aa.Region(RIGHT, "ivy")))
    offloaded, cpu = tiny_flux(), torch.device("cpu")
    offloaded.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    expected = draw(tiny_flux(), plan, aa.RegionalAttention())
    assert np.abs(draw(offloaded, plan, aa.RegionalAttention()) - expected).max() <= 1


@pytest.mark.filterwarnings("ignore")  # deprecated, but the one way of torch itself that needs no other package
def test_a_model_with_quantized_layers_is_guided_as_it_is():
    plan = aa.Plan(PROMPT, (aa.Region(SOFT, "a blue door"), aa.Region(RIGHT, "ivy")))
    quantized = tiny_flux()
    quantized.transformer = torch.ao.quantization.quantize_dynamic(quantized.transformer, {torch.nn.Linear})
    results = [draw(quantized, plan, aa.RegionalAttention(method=method)) for method in ("auto", "dense")]
    assert np.abs(results[0] - results[1]).max() <= 1
    assert np.abs(results[0] - draw(quantized, aa.Plan(PROMPT), None)).max() > 2
