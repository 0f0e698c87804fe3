"""Quantized bases: a LoRA learned on one is the LoRA learned on plain weights of the same values."""

import accelerate
import pytest
import torch
from PIL import Image, ImageChops

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer
from artaug.diffusion.families.flux.family import Flux
from artaug.training.injection import inject_adapter
from artaug.training.quantized import check_gradients
from support.quantized import dequantized, fp8_stored, quantized, stored_digest
from support.tiny_flux import TINY_SIZE, tiny_flux

EXACT = ("fp8 stored", "bitsandbytes nf4", "bitsandbytes fp4")
"""Libraries that compute with the values of the oracle, in the same order."""
ROUNDED = ("torchao int8", "torchao float8")
"""Libraries that multiply by the scale last: float32 rounds otherwise."""


def pair_of():
    before = Image.linear_gradient("L").resize((TINY_SIZE, TINY_SIZE)).convert("RGB")
    return aa.ImagePair(prompt="a red cone", seed=0, before=before, after=ImageChops.invert(before), plan=aa.Plan("a"))


def synthesizer_of(pipeline):
    return DiffusersSynthesizer(pipeline=pipeline, width=TINY_SIZE, height=TINY_SIZE, steps=2)


def training_of(synthesizer, **options):
    checkpoints = options.pop("checkpoints", None)
    on_step = options.pop("on_step", None)
    trainer = aa.DifferentialLoRATrainer(**{"rank": 4, "steps": 4, "batch_size": 1, "learning_rate": 1e-3, **options})
    return trainer.train([pair_of()], synthesizer, seed=0, progress=False, checkpoints=checkpoints, on_step=on_step)


def gap(lora, other):
    """The norm of the difference of two LoRAs over that of the second."""
    deltas = [(layer.delta(), other.layers[name].delta()) for name, layer in lora.layers.items()]
    difference, norm = (
        sum(delta.square().sum() for delta in side) for side in zip(*((a - b, b) for a, b in deltas), strict=True)
    )
    return float((difference / norm).sqrt())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [*EXACT, *ROUNDED])
def test_the_lora_of_a_quantized_base_is_that_of_plain_weights_of_the_same_values(kind, checkpointing):
    pipeline = quantized(tiny_flux(), kind)
    stored = stored_digest(pipeline.transformer)
    learned = training_of(synthesizer_of(pipeline), gradient_checkpointing=checkpointing)
    oracle = training_of(
        synthesizer_of(dequantized(quantized(tiny_flux(), kind))), gradient_checkpointing=checkpointing
    )
    assert gap(learned.lora, oracle.lora) <= (0 if kind in EXACT else 1e-3)
    assert stored_digest(pipeline.transformer) == stored
    assert all(layer.down.dtype == torch.float32 for layer in learned.lora.layers.values())


@pytest.mark.parametrize("kind", [*EXACT, *ROUNDED, "bitsandbytes int8"])
def test_the_loss_falls_on_a_quantized_base(kind):
    losses = training_of(
        synthesizer_of(quantized(tiny_flux(), kind)),
        steps=24,
        batch_size=4,
        learning_rate=3e-3,
        objective=aa.SupervisedFineTuning(),
    ).losses
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])


def test_int8_that_rounds_activations_gives_nearly_the_gradient_of_its_weights():
    """LLM.int8 rounds its inputs as well, and its gradient ignores that."""
    gradient, oracle = (
        gradient_of(make(quantized(tiny_flux(), "bitsandbytes int8"))) for make in (_unchanged, dequantized)
    )
    assert torch.linalg.vector_norm(gradient - oracle) < 0.05 * torch.linalg.vector_norm(oracle)


def _unchanged(pipeline):
    return pipeline


def gradient_of(pipeline):
    generator = torch.Generator().manual_seed(0)
    with (
        synthesizer_of(pipeline).training() as model,
        inject_adapter(model, rank=4, targets="blocks", generator=generator) as student,
    ):
        for factor in student.parameters():
            factor.data += 0.05 * torch.randn(factor.shape, generator=generator)
        latents = torch.randn(1, 64, 16, generator=generator)
        student.predict(latents, torch.tensor([0.5]), model.encode_prompts(["a"])).square().sum().backward()
        return torch.cat([factor.grad.flatten() for factor in student.parameters()])


@pytest.mark.parametrize("kind", ["fp8 stored", "torchao int8"])
def test_a_quantized_base_draws_as_before_and_takes_what_it_learned(kind):
    synthesizer = synthesizer_of(quantized(tiny_flux(), kind))
    before = synthesizer.synthesize(aa.Plan("a"), seed=0)
    learned = training_of(synthesizer, learning_rate=1e-2)
    assert synthesizer.synthesize(aa.Plan("a"), seed=0).tobytes() == before.tobytes()
    with_lora = synthesizer.with_lora(learned.lora)
    assert with_lora.synthesize(aa.Plan("a"), seed=0).tobytes() != before.tobytes()
    on_top, oracle = (
        training_of(synthesizer_of(pipeline).with_lora(learned.lora))
        for pipeline in (synthesizer.pipeline, dequantized(quantized(tiny_flux(), kind)))
    )
    assert gap(on_top.lora, oracle.lora) < 1e-3


@pytest.mark.parametrize("kind", ["fp8 stored", "torchao int8", "bitsandbytes nf4"])
def test_a_training_resumes_bit_for_bit_on_its_quantized_base_and_on_no_other(kind, tmp_path):
    uninterrupted = training_of(synthesizer_of(quantized(tiny_flux(), kind)))

    def killed(event):
        if event.step == 3:
            raise KeyboardInterrupt

    checkpoints = aa.Checkpoints(folder=tmp_path, every=2)
    with pytest.raises(KeyboardInterrupt):
        training_of(synthesizer_of(quantized(tiny_flux(), kind)), checkpoints=checkpoints, on_step=killed)
    with pytest.raises(aa.StorageError, match="model"):
        training_of(synthesizer_of(tiny_flux()), checkpoints=checkpoints)
    resumed = training_of(synthesizer_of(quantized(tiny_flux(), kind)), checkpoints=checkpoints)
    assert resumed.losses == uninterrupted.losses
    assert gap(resumed.lora, uninterrupted.lora) == 0


def test_a_base_whose_activations_are_rounded_without_a_gradient_is_refused():
    pipeline = quantized(tiny_flux(), "torchao int8 activations")
    with pytest.raises(aa.ModelError, match=r"is quantized as Int8Tensor, and its gradient predicts 0% of how"):
        training_of(synthesizer_of(pipeline))


def test_a_base_that_bitsandbytes_packed_for_inference_is_refused():
    pipeline = quantized(tiny_flux(), "bitsandbytes nf4")
    layer = pipeline.transformer.transformer_blocks[0].attn.to_q
    layer.weight.quant_state.packing_format_for_cpu = True  # as drawing leaves it where the CPU has AVX512-BF16
    with pytest.raises(aa.ModelError, match=r"packed 'transformer_blocks\.0\.attn\.to_q' for drawing on this CPU"):
        training_of(synthesizer_of(pipeline))


def test_layers_are_put_back_into_evaluation_mode():
    pipeline = quantized(tiny_flux(), "bitsandbytes nf4")
    training_of(synthesizer_of(pipeline))
    assert not any(submodule.training for submodule in pipeline.transformer.modules())


def test_fp8_computes_in_its_compute_dtype_and_keeps_its_hooks():
    pipeline = fp8_stored(tiny_flux().to(torch.bfloat16), compute=torch.bfloat16)
    hooked = [name for name, layer in pipeline.transformer.named_modules() if hasattr(layer, "_diffusers_hook")]
    learned = training_of(synthesizer_of(pipeline))
    plain = tiny_flux().to(torch.bfloat16)
    for parameter, stored in zip(plain.transformer.parameters(), pipeline.transformer.parameters(), strict=True):
        parameter.data = stored.data.to(torch.bfloat16)
    assert gap(learned.lora, training_of(synthesizer_of(plain)).lora) == 0
    assert [name for name, layer in pipeline.transformer.named_modules() if hasattr(layer, "_diffusers_hook")] == hooked


@pytest.mark.parametrize(("kind", "storage"), [("bitsandbytes int8", "bitsandbytes' int8"), ("fp8 stored", "float8")])
def test_dora_refuses_weights_it_cannot_read_before_anything_is_encoded(kind, storage, monkeypatch):
    pipeline = quantized(tiny_flux(), kind)
    synthesizer = synthesizer_of(pipeline)
    drawn = synthesizer.synthesize(aa.Plan("a"), seed=0).tobytes()
    encoded = []
    monkeypatch.setattr(Flux, "encode_images", lambda *args: encoded.append(args))
    with pytest.raises(aa.ModelError, match=rf"DoRA starts from the norms .* stored as .*{storage}"):
        training_of(synthesizer, adapter=aa.DoRA())
    assert not encoded
    assert synthesizer.synthesize(aa.Plan("a"), seed=0).tobytes() == drawn


@pytest.mark.parametrize("kind", ["bitsandbytes nf4", "torchao int8"])
def test_dora_learns_on_bases_it_can_dequantize(kind):
    learned = training_of(synthesizer_of(quantized(tiny_flux(), kind)), adapter=aa.DoRA(export_rank=32))
    oracle = training_of(synthesizer_of(dequantized(quantized(tiny_flux(), kind))), adapter=aa.DoRA(export_rank=32))
    assert gap(learned.lora, oracle.lora) < 1e-2


def test_fp8_storage_and_offload_go_together():
    offloaded = fp8_stored(tiny_flux())
    accelerate.cpu_offload_with_hook(offloaded.transformer, execution_device=torch.device("cpu"))
    learned, plain = (training_of(synthesizer_of(pipeline)) for pipeline in (offloaded, fp8_stored(tiny_flux())))
    assert gap(learned.lora, plain.lora) == 0


def test_running_out_of_memory_is_not_blamed_on_the_quantization(monkeypatch):
    pipeline = quantized(tiny_flux(), "torchao int8")
    kind = type(pipeline.transformer.transformer_blocks[0].attn.to_q)

    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(kind, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        training_of(synthesizer_of(pipeline))


def test_a_layer_in_bfloat16_is_checked_in_its_own_dtype():
    pipeline = quantized(tiny_flux().to(torch.bfloat16), "torchao float8")
    pipeline.transformer.x_embedder.float()  # the first plain weight is of another type
    check_gradients(pipeline.transformer, {"to_q": pipeline.transformer.transformer_blocks[0].attn.to_q})
