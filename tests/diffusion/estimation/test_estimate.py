"""What is said of a training beforehand, against what the training does."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, T5Config

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer, Estimate, estimate
from artaug.training.objectives import PairBatch
from artaug.training.student import inject_adapter
from support.quantized import quantized
from support.tiny_flux import TINY_SIZE, tiny_flux

CPU = {"width": TINY_SIZE, "height": TINY_SIZE, "fused_norms": False}


def trainer_of(**options):
    return aa.DifferentialLoRATrainer(**{"rank": 4, "batch_size": 1, **options})


def real_step(pipeline, trainer, **options):
    """Bytes at most, beside weights, factors and their gradients, and operations of one real step on the CPU."""
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
        for factor in student.parameters():
            factor.grad = torch.zeros_like(factor)
        given = [batch.before, batch.after, batch.noise, batch.sigmas, *batch.conditioning.values()]
        peak = peak_bytes(lambda: trainer.objective.loss(student, batch).backward())
        with FlopCounterMode(display=False) as counted:
            trainer.objective.loss(student, batch).backward()
        model.module.disable_gradient_checkpointing()
        return peak + sum(one.numel() * one.element_size() for one in given), counted.get_total_flops()


def peak_bytes(work):
    """As torch's own allocator counts."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [one for one in recorded.profiler.kineto_results.events() if one.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_step_holds_what_was_said(batch_size, checkpointing):
    trainer, pipeline = trainer_of(batch_size=batch_size, gradient_checkpointing=checkpointing), tiny_flux()
    told = estimate(pipeline, trainer=trainer, **CPU)
    peak, products = real_step(pipeline, trainer)
    assert told.activations_bytes == pytest.approx(peak, rel=0.15)
    tokens, heads, channels, layers = 512 + 64, 2, 16, 3
    attention = 2 * batch_size * heads * tokens**2 * channels * layers  # one product, which torch's counter leaves out
    assert told.flops_per_step == products + (2 + 2 + 5 + 2 * checkpointing) * attention


def test_factors_and_files_take_what_was_said(tmp_path):
    pipeline, trainer = tiny_flux(), trainer_of(ema=0.9, steps=1)
    told = estimate(pipeline, trainer=trainer, **CPU)
    synthesizer = DiffusersSynthesizer(pipeline=pipeline, width=TINY_SIZE, height=TINY_SIZE)
    picture = synthesizer.synthesize(aa.Plan("a"), seed=0)
    pair = aa.ImagePair.unchanged(picture, prompt="a", seed=0)
    checkpoints = aa.Checkpoints(folder=tmp_path / "checkpoints")
    training = trainer.train([pair], synthesizer, seed=0, checkpoints=checkpoints, progress=False)
    numbers = sum(one.down.numel() + one.up.numel() for one in training.lora.layers.values())
    assert told.trainable_parameters == numbers
    assert told.adapter_bytes == 4 * numbers * (1 + 1 + 2 + 1)  # factors, gradients, two moments, the average
    assert training.lora.save(tmp_path / "lora.safetensors").stat().st_size == pytest.approx(told.lora_bytes, rel=0.2)
    assert told.weights_bytes == sum(4 * one.numel() for one in pipeline.transformer.parameters())


@pytest.mark.parametrize(
    ("optimizer", "each"),
    [(aa.AdamW(), 8), (aa.AdamW8bit(), 2.03125), (aa.Prodigy(), 16), (aa.ScheduleFree(), 8)],
    ids=lambda one: type(one).__name__,
)
def test_every_optimizer_keeps_what_it_keeps(optimizer, each):
    told = estimate(tiny_flux(), trainer=trainer_of(optimizer=optimizer, targets="to_q"), **CPU)
    assert told.adapter_bytes == pytest.approx((8 + each) * told.trainable_parameters, abs=1)


def test_fewer_pairs_at_once_hold_less_and_compute_as_much():
    whole, parts = (estimate(tiny_flux(), trainer=trainer_of(batch_size=4, micro_batch_size=n), **CPU) for n in (4, 1))
    assert parts.activations_bytes < 0.5 * whole.activations_bytes
    assert parts.flops_per_step == whole.flops_per_step


def test_packed_weights_take_their_bits_and_one_layer_unpacked():
    plain, packed = (estimate(tiny_flux(), trainer=trainer_of(), bits_per_weight=bits, **CPU) for bits in (None, 4))
    linear = [one.weight.numel() for one in tiny_flux().transformer.modules() if isinstance(one, torch.nn.Linear)]
    assert plain.weights_bytes - packed.weights_bytes == sum(linear) * 4 - sum(linear) // 2
    assert packed.activations_bytes - plain.activations_bytes == 4 * max(linear)


def test_the_denoiser_waits_while_pairs_are_encoded_unless_it_is_quantized():
    loose, packed = (estimate(tiny_flux(), trainer=trainer_of(), bits_per_weight=bits, **CPU) for bits in (None, 8))
    assert (loose.offloaded_bytes, packed.offloaded_bytes) == (loose.weights_bytes, 0)
    others = loose.encoders_bytes + loose.encoding_bytes
    assert loose.peak_bytes == max(loose.training_bytes, others)
    assert packed.peak_bytes == max(packed.training_bytes, packed.weights_bytes + others)
    assert loose.pipeline_bytes == loose.weights_bytes + loose.encoders_bytes


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
def test_a_quantized_base_holds_what_was_said(kind, checkpointing):
    """Layers that are unpacked in a call count as long as autograd keeps them."""
    trainer, pipeline = trainer_of(gradient_checkpointing=checkpointing), quantized(heavy_flux(), kind)
    told = estimate(pipeline, trainer=trainer, max_sequence_length=16, **CPU)
    peak, _ = real_step(pipeline, trainer, max_sequence_length=16)
    weights = sum(4 * one.numel() for one in heavy_flux().transformer.parameters())
    assert told.weights_bytes < 0.65 * weights
    block = sum(4 * one.numel() for one in heavy_flux().transformer.transformer_blocks[0].parameters())
    slack = block if (kind, checkpointing) == ("fp8 stored", True) else 0  # as `Estimate` says of those
    assert 0.85 * (told.weights_bytes + peak) - slack <= told.weights_bytes + told.activations_bytes
    assert told.weights_bytes + told.activations_bytes <= 1.15 * (told.weights_bytes + peak)


def test_fp8_said_beforehand_is_fp8_of_a_loaded_pipeline():
    loaded = estimate(quantized(heavy_flux(), "fp8 stored"), trainer=trainer_of(), **CPU)
    assert estimate(heavy_flux(), trainer=trainer_of(), storage_dtype=torch.float8_e4m3fn, **CPU) == loaded


def test_a_stage_that_wears_the_one_before_holds_more():
    two, one = (estimate(tiny_flux(), trainer=trainer_of(objective=one), **CPU) for one in (aa.TwoStage(), _tuning()))
    assert two.activations_bytes > one.activations_bytes
    assert two.flops_per_step > one.flops_per_step


def _tuning():
    return aa.SupervisedFineTuning()


def test_time_needs_a_speed_and_follows_it():
    trainer = trainer_of(steps=50)
    silent, told = (estimate(tiny_flux(), trainer=trainer, flops_per_second=speed, **CPU) for speed in (None, 1e9))
    assert (silent.seconds, silent.seconds_per_step) == (None, None)
    assert told.seconds == pytest.approx(50 * told.flops_per_step / 1e9)
    assert "time of 50 steps" in str(told)
    assert "time of" not in str(silent)


def test_an_estimate_reads_as_a_table_and_says_what_fits():
    told = estimate(tiny_flux(), trainer=trainer_of(), **CPU)
    assert isinstance(told, Estimate)
    assert str(told).startswith("FluxPipeline, 32 x 32 pixels, 1 pair(s) at once\n")
    assert "<td>activations</td>" in told._repr_html_()
    assert told.fits(told.peak_bytes)
    assert not told.fits(told.peak_bytes - 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits_per_weight": 0},
        {"bits_per_weight": 33},
        {"flops_per_second": 0},
        {"storage_dtype": torch.int8},
        {"storage_dtype": torch.float8_e4m3fn, "bits_per_weight": 8},
    ],
)
def test_values_that_mean_nothing_are_refused(wrong):
    with pytest.raises(aa.InvalidValueError, match=next(iter(wrong))):
        estimate(tiny_flux(), **wrong, **CPU)


def test_a_size_the_model_does_not_take_is_refused():
    with pytest.raises(aa.ModelError, match="not whole image tokens"):
        estimate(tiny_flux(), width=33, height=32)


@pytest.fixture
def flux_dev(tmp_path):
    """FLUX.1-dev as its configs say: what its folder holds besides weights and vocabularies."""
    parts = {
        "transformer": FluxTransformer2DModel,
        "vae": AutoencoderKL,
        "scheduler": FlowMatchEulerDiscreteScheduler,
    }
    levels = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    options = {"transformer": {"guidance_embeds": True}, "vae": levels, "scheduler": {"use_dynamic_shifting": True}}
    for name, kind in parts.items():
        with torch.device("meta" if name != "scheduler" else "cpu"):
            kind(**options[name]).save_config(tmp_path / name)
    CLIPTextConfig(hidden_size=768, intermediate_size=3072).save_pretrained(tmp_path / "text_encoder")
    T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu").save_pretrained(
        tmp_path / "text_encoder_2"
    )
    classes = {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"}
    classes |= {"tokenizer": "CLIPTokenizer", "tokenizer_2": "T5TokenizerFast"}
    index = {name: ["transformers", one] for name, one in classes.items()}
    index |= {name: ["diffusers", kind.__name__] for name, kind in parts.items()}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **index}))
    return tmp_path


def test_flux_dev_is_estimated_from_its_configs_and_agrees_with_pencil_and_paper(flux_dev):
    trainer = trainer_of(rank=16, gradient_checkpointing=True, objective=aa.SupervisedFineTuning())
    told = estimate(flux_dev, trainer=trainer)
    assert told.weights_bytes == pytest.approx(23.80e9, rel=0.001)
    assert told.encoders_bytes == pytest.approx(9.94e9, rel=0.01)  # T5-XXL's encoder, CLIP-L and the VAE
    assert told.trainable_parameters == pytest.approx(65.4e6, rel=0.01)
    # 57 blocks of 12 width² weights a token; forward, again, and gradients of inputs, but none of frozen weights.
    tokens, width, blocks = 4096 + 512, 3072, 57
    linear, product = 2 * 12 * width**2 * tokens * blocks, 2 * tokens**2 * width * blocks
    assert told.flops_per_step == pytest.approx(3 * linear + (2 + 2 + 5) * product, rel=0.02)
    # Checkpoints keep at least what goes into every block, in 16 bits.
    assert told.activations_bytes > blocks * tokens * width * 2


def test_flux_dev_stored_in_fp8_learns_at_1024_pixels_within_24_gigabytes(flux_dev):
    trainer = trainer_of(rank=16, gradient_checkpointing=True)
    plain = estimate(flux_dev, trainer=trainer)
    told = estimate(flux_dev, trainer=trainer, storage_dtype=torch.float8_e4m3fn)
    assert plain.training_bytes == pytest.approx(25.4 * 2**30, rel=0.01)
    assert told.training_bytes == pytest.approx(17.5 * 2**30, rel=0.01)
    assert told.peak_bytes == told.training_bytes
    # Layers that modulate have "norm" in their names, and stay in 16 bits: 6 width² a stream of 19 blocks, 3 of 38.
    modulating = (19 * 2 * 6 + 38 * 3) * 3072**2
    assert told.weights_bytes == pytest.approx(plain.weights_bytes / 2 + modulating, rel=0.002)  # and embeddings
    assert told.pipeline_bytes == told.weights_bytes + told.encoders_bytes


def test_a_compiled_pipeline_is_estimated_as_it_is_and_stays_as_it_was():
    pipeline, plain = tiny_flux(), tiny_flux()
    raw = pipeline.transformer
    pipeline.transformer = torch.compile(raw, backend="eager")
    trainer = trainer_of(gradient_checkpointing=True)
    for options in ({"trainer": trainer}, {"storage_dtype": torch.float8_e4m3fn, "trainer": trainer}):
        told, wanted = (estimate(one, **options, **CPU) for one in (pipeline, plain))
        assert (told.peak_bytes, told.flops_per_step) == (wanted.peak_bytes, wanted.flops_per_step)
    assert not raw.is_gradient_checkpointing
    assert {one.dtype for one in raw.parameters()} == {torch.float32}


def test_batches_that_come_again_spare_the_teachers_pass():
    plain, twice, often = (
        estimate(tiny_flux(), trainer=trainer_of(echo=echo), **CPU).flops_per_step for echo in (1, 2, 4)
    )
    alone = estimate(tiny_flux(), trainer=trainer_of(objective=aa.SupervisedFineTuning()), **CPU).flops_per_step
    assert twice == pytest.approx((plain + alone) / 2, rel=1e-6)
    assert often == pytest.approx((plain + 3 * alone) / 4, rel=1e-6)


def test_types_that_nothing_could_be_stored_in_are_refused():
    pipeline = tiny_flux()
    with pytest.raises(aa.InvalidValueError, match=r"need a floating type"):
        estimate(pipeline, dtype=torch.int8)
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(aa.InvalidValueError, match=r"stored by enable_layerwise_casting already"):
        estimate(pipeline, storage_dtype=torch.float8_e4m3fn)
