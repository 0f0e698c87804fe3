"""Estimates, compared with what real trainings take."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, T5Config

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer, Estimate, estimate
from artaug.training.injection import inject_adapter
from artaug.training.objectives import PairBatch
from support.quantized import quantized
from support.tiny_flux import TINY_SIZE, tiny_flux

CPU = {"width": TINY_SIZE, "height": TINY_SIZE, "fused_norms": False}


def make_trainer(**options):
    return aa.DifferentialLoRATrainer(**{"rank": 4, "batch_size": 1, **options})


def real_step(pipeline, trainer, **options):
    """Peak bytes beside weights, adapter and gradients, and FLOPs, of one real step on the CPU."""
    synthesizer = DiffusersSynthesizer(pipeline=pipeline, width=TINY_SIZE, height=TINY_SIZE, **options)
    generator = torch.Generator().manual_seed(0)
    with (
        synthesizer.training() as model,
        inject_adapter(model, rank=trainer.rank, targets=trainer.targets, generator=generator) as student,
    ):
        if trainer.gradient_checkpointing:
            model.module.enable_gradient_checkpointing()
        latents = torch.randn(trainer.batch_size, 64, 16, generator=generator)
        batch = PairBatch(
            before=latents,
            after=latents.clone(),
            noise=latents.clone(),
            sigmas=torch.full((trainer.batch_size,), 0.5),
            conditioning=model.encode_prompts(["a"] * trainer.batch_size),
        )
        for parameter in student.parameters():
            parameter.grad = torch.zeros_like(parameter)
        inputs = [batch.before, batch.after, batch.noise, batch.sigmas, *batch.conditioning.values()]
        peak = peak_bytes(lambda: trainer.objective.loss(student, batch).backward())
        with FlopCounterMode(display=False) as counter:
            trainer.objective.loss(student, batch).backward()
        model.module.disable_gradient_checkpointing()
        return peak + sum(tensor.numel() * tensor.element_size() for tensor in inputs), counter.get_total_flops()


def peak_bytes(operations):
    """Peak of what torch's allocator counts."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        operations()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_step_takes_the_memory_and_flops_estimated(batch_size, checkpointing):
    trainer = make_trainer(batch_size=batch_size, gradient_checkpointing=checkpointing, echo=1)
    pipeline = tiny_flux()
    estimated = estimate(pipeline, trainer=trainer, **CPU)
    peak, flops = real_step(pipeline, trainer)
    assert estimated.activations_bytes == pytest.approx(peak, rel=0.15)
    tokens, heads, channels, layers = 512 + 64, 2, 16, 3
    attention = 2 * batch_size * heads * tokens**2 * channels * layers  # one product; torch's counter leaves it out
    assert estimated.flops_per_step == flops + 2 * (2 + 2 + 5 + 2 * checkpointing) * attention


def test_adapter_and_files_take_the_bytes_estimated(tmp_path):
    pipeline, trainer = tiny_flux(), make_trainer(ema=0.9, steps=1)
    estimated = estimate(pipeline, trainer=trainer, **CPU)
    synthesizer = DiffusersSynthesizer(pipeline=pipeline, width=TINY_SIZE, height=TINY_SIZE)
    picture = synthesizer.synthesize(aa.Plan("a"), seed=0)
    pair = aa.ImagePair.unchanged(picture, prompt="a", seed=0)
    checkpoints = aa.Checkpoints(folder=tmp_path / "checkpoints")
    training = trainer.train([pair], synthesizer, seed=0, checkpoints=checkpoints, progress=False)
    parameters = sum(layer.down.numel() + layer.up.numel() for layer in training.lora.layers.values())
    assert estimated.trainable_parameters == parameters
    assert estimated.adapter_bytes == 4 * parameters * (
        1 + 1 + 2 + 1
    )  # parameters, gradients, two moments, the average
    assert training.lora.save(tmp_path / "lora.safetensors").stat().st_size == pytest.approx(
        estimated.lora_bytes, rel=0.2
    )
    assert estimated.weights_bytes == sum(4 * parameter.numel() for parameter in pipeline.transformer.parameters())


@pytest.mark.parametrize(
    ("optimizer", "state_bytes"),
    [(aa.AdamW(), 8), (aa.AdamW8bit(), 2.03125), (aa.Prodigy(), 16), (aa.ScheduleFree(), 8)],
    ids=lambda value: type(value).__name__,
)
def test_the_state_of_every_optimizer_is_measured(optimizer, state_bytes):
    estimated = estimate(tiny_flux(), trainer=make_trainer(optimizer=optimizer, targets="to_q"), **CPU)
    assert estimated.adapter_bytes == pytest.approx((8 + state_bytes) * estimated.trainable_parameters, abs=1)


def test_smaller_micro_batches_take_less_memory_and_as_many_flops():
    full, micro = (estimate(tiny_flux(), trainer=make_trainer(batch_size=4, micro_batch_size=n), **CPU) for n in (4, 1))
    assert micro.activations_bytes < 0.5 * full.activations_bytes
    assert micro.flops_per_step == full.flops_per_step


def test_quantized_weights_take_their_bits_and_one_layer_unpacked():
    plain, quantized_base = (
        estimate(tiny_flux(), trainer=make_trainer(), bits_per_weight=bits, **CPU) for bits in (None, 4)
    )
    linear = [layer.weight.numel() for layer in tiny_flux().transformer.modules() if isinstance(layer, torch.nn.Linear)]
    assert plain.weights_bytes - quantized_base.weights_bytes == sum(linear) * 4 - sum(linear) // 2
    assert quantized_base.activations_bytes - plain.activations_bytes == 4 * max(linear)


def test_the_denoiser_is_offloaded_while_pairs_are_encoded_unless_it_is_quantized():
    plain, quantized_base = (
        estimate(tiny_flux(), trainer=make_trainer(), bits_per_weight=bits, **CPU) for bits in (None, 8)
    )
    assert (plain.offloaded_bytes, quantized_base.offloaded_bytes) == (plain.weights_bytes, 0)
    encoding = plain.encoders_bytes + plain.encoding_bytes
    assert plain.peak_bytes == max(plain.training_bytes, encoding)
    assert quantized_base.peak_bytes == max(quantized_base.training_bytes, quantized_base.weights_bytes + encoding)
    assert plain.pipeline_bytes == plain.weights_bytes + plain.encoders_bytes


def heavy_flux():
    """A FLUX whose weights outweigh its activations."""
    pipeline = tiny_flux()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline.transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=64,
            num_attention_heads=4,
            joint_attention_dim=24,
            pooled_projection_dim=20,
            axes_dims_rope=(8, 28, 28),
        ).eval()
    return pipeline


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["fp8 stored", "torchao int8", "bitsandbytes nf4"])
def test_a_quantized_base_takes_the_memory_estimated(kind, checkpointing):
    """Layers that are unpacked in a call count as long as autograd saves them."""
    trainer, pipeline = make_trainer(gradient_checkpointing=checkpointing), quantized(heavy_flux(), kind)
    estimated = estimate(pipeline, trainer=trainer, max_sequence_length=16, **CPU)
    peak, _ = real_step(pipeline, trainer, max_sequence_length=16)
    weights = sum(4 * parameter.numel() for parameter in heavy_flux().transformer.parameters())
    assert estimated.weights_bytes < 0.65 * weights
    block = sum(4 * parameter.numel() for parameter in heavy_flux().transformer.transformer_blocks[0].parameters())
    slack = block if (kind, checkpointing) == ("fp8 stored", True) else 0  # as `Estimate` says of those
    assert 0.85 * (estimated.weights_bytes + peak) - slack <= estimated.weights_bytes + estimated.activations_bytes
    assert estimated.weights_bytes + estimated.activations_bytes <= 1.15 * (estimated.weights_bytes + peak)


def test_fp8_storage_by_argument_equals_that_of_a_loaded_pipeline():
    loaded = estimate(quantized(heavy_flux(), "fp8 stored"), trainer=make_trainer(), **CPU)
    assert estimate(heavy_flux(), trainer=make_trainer(), storage_dtype=torch.float8_e4m3fn, **CPU) == loaded


def test_a_second_stage_with_the_first_lora_active_takes_more():
    objectives = (aa.TwoStage(), aa.SupervisedFineTuning())
    two, one = (estimate(tiny_flux(), trainer=make_trainer(objective=objective), **CPU) for objective in objectives)
    assert two.activations_bytes > one.activations_bytes
    assert two.flops_per_step > one.flops_per_step


def test_time_needs_a_throughput_and_follows_it():
    trainer = make_trainer(steps=50)
    untimed, timed = (
        estimate(tiny_flux(), trainer=trainer, flops_per_second=throughput, **CPU) for throughput in (None, 1e9)
    )
    assert (untimed.seconds, untimed.seconds_per_step) == (None, None)
    assert timed.seconds == pytest.approx(50 * timed.flops_per_step / 1e9)
    assert "time of 50 steps" in str(timed)
    assert "time of" not in str(untimed)


def test_an_estimate_prints_as_a_table_and_says_what_fits():
    estimated = estimate(tiny_flux(), trainer=make_trainer(), **CPU)
    assert isinstance(estimated, Estimate)
    assert str(estimated).startswith("FluxPipeline, 32 x 32 pixels, micro-batch of 1\n")
    assert "<td>activations</td>" in estimated._repr_html_()
    assert estimated.fits(estimated.peak_bytes)
    assert not estimated.fits(estimated.peak_bytes - 1)


@pytest.mark.parametrize(
    "options",
    [
        {"bits_per_weight": 0},
        {"bits_per_weight": 33},
        {"flops_per_second": 0},
        {"storage_dtype": torch.int8},
        {"storage_dtype": torch.float8_e4m3fn, "bits_per_weight": 8},
    ],
)
def test_illegal_options_are_refused(options):
    with pytest.raises(aa.InvalidValueError, match=next(iter(options))):
        estimate(tiny_flux(), **options, **CPU)


def test_a_size_that_the_model_does_not_support_is_refused():
    with pytest.raises(aa.ModelError, match="not whole image tokens"):
        estimate(tiny_flux(), width=33, height=32)


@pytest.fixture
def flux_dev(tmp_path):
    """The folder of FLUX.1-dev without weights and vocabularies: its configs."""
    parts = {
        "transformer": FluxTransformer2DModel,
        "vae": AutoencoderKL,
        "scheduler": FlowMatchEulerDiscreteScheduler,
    }
    vae_config = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    options = {"transformer": {"guidance_embeds": True}, "vae": vae_config, "scheduler": {"use_dynamic_shifting": True}}
    for name, kind in parts.items():
        with torch.device("meta" if name != "scheduler" else "cpu"):
            kind(**options[name]).save_config(tmp_path / name)
    CLIPTextConfig(hidden_size=768, intermediate_size=3072).save_pretrained(tmp_path / "text_encoder")
    T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu").save_pretrained(
        tmp_path / "text_encoder_2"
    )
    classes = {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"}
    classes |= {"tokenizer": "CLIPTokenizer", "tokenizer_2": "T5TokenizerFast"}
    index = {name: ["transformers", class_name] for name, class_name in classes.items()}
    index |= {name: ["diffusers", kind.__name__] for name, kind in parts.items()}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **index}))
    return tmp_path


def test_flux_dev_is_estimated_from_its_configs_and_agrees_with_a_calculation_by_hand(flux_dev):
    trainer = make_trainer(rank=16, gradient_checkpointing=True, objective=aa.SupervisedFineTuning())
    estimated = estimate(flux_dev, trainer=trainer)
    assert estimated.weights_bytes == pytest.approx(23.80e9, rel=0.001)
    assert estimated.encoders_bytes == pytest.approx(9.94e9, rel=0.01)  # T5-XXL's encoder, CLIP-L and the VAE
    assert estimated.trainable_parameters == pytest.approx(65.4e6, rel=0.01)
    # 57 blocks of 12 width² weights a token; forward, recomputed, and gradients of inputs, but none of frozen weights.
    tokens, width, blocks = 4096 + 512, 3072, 57
    linear, product = 2 * 12 * width**2 * tokens * blocks, 2 * tokens**2 * width * blocks
    assert estimated.flops_per_step == pytest.approx(3 * linear + (2 + 2 + 5) * product, rel=0.02)
    # Gradient checkpointing saves at least the input of every block, in 16 bits.
    assert estimated.activations_bytes > blocks * tokens * width * 2


def test_flux_dev_stored_in_fp8_trains_at_1024_pixels_within_24_gigabytes(flux_dev):
    trainer = make_trainer(rank=16, gradient_checkpointing=True)
    plain = estimate(flux_dev, trainer=trainer)
    estimated = estimate(flux_dev, trainer=trainer, storage_dtype=torch.float8_e4m3fn)
    assert plain.training_bytes == pytest.approx(26.9 * 2**30, rel=0.01)
    assert estimated.training_bytes == pytest.approx(19.0 * 2**30, rel=0.01)
    assert estimated.peak_bytes == estimated.training_bytes
    # Modulation layers have "norm" in their names and stay in 16 bits: 6 width² a stream of 19 blocks, 3 of 38.
    modulation = (19 * 2 * 6 + 38 * 3) * 3072**2
    assert estimated.weights_bytes == pytest.approx(plain.weights_bytes / 2 + modulation, rel=0.002)  # and embeddings
    assert estimated.pipeline_bytes == estimated.weights_bytes + estimated.encoders_bytes


def test_a_compiled_pipeline_is_estimated_and_not_changed():
    pipeline, plain = tiny_flux(), tiny_flux()
    raw = pipeline.transformer
    pipeline.transformer = torch.compile(raw, backend="eager")
    trainer = make_trainer(gradient_checkpointing=True)
    for options in ({"trainer": trainer}, {"storage_dtype": torch.float8_e4m3fn, "trainer": trainer}):
        compiled, expected = (estimate(source, **options, **CPU) for source in (pipeline, plain))
        assert (compiled.peak_bytes, compiled.flops_per_step) == (expected.peak_bytes, expected.flops_per_step)
    assert not raw.is_gradient_checkpointing
    assert {parameter.dtype for parameter in raw.parameters()} == {torch.float32}


def test_repeated_batches_save_the_teachers_forward_pass():
    plain, twice, often = (
        estimate(tiny_flux(), trainer=make_trainer(objective=aa.PairedDifference(), echo=echo), **CPU).flops_per_step
        for echo in (1, 2, 4)
    )
    alone = estimate(tiny_flux(), trainer=make_trainer(objective=aa.SupervisedFineTuning()), **CPU).flops_per_step
    assert twice == pytest.approx((plain + alone) / 2, rel=1e-6)
    assert often == pytest.approx((plain + 3 * alone) / 4, rel=1e-6)


def test_illegal_types_are_refused():
    pipeline = tiny_flux()
    with pytest.raises(aa.InvalidValueError, match=r"need a floating type"):
        estimate(pipeline, dtype=torch.int8)
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(aa.InvalidValueError, match=r"stored by enable_layerwise_casting already"):
        estimate(pipeline, storage_dtype=torch.float8_e4m3fn)
