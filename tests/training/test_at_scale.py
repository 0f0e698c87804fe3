"""Training large models, on a tiny real FLUX: sizes, gradient checkpointing, micro batches, caches, compiled blocks."""

import pytest
import torch
from PIL import Image, ImageChops

from artaug.diffusion import DiffusersSynthesizer
from artaug.errors import ModelError
from artaug.geometry import Box
from artaug.pairs import ImagePair
from artaug.plan import Plan, Region
from artaug.training import DifferentialLoRATrainer, PairedDifference
from support.tiny_flux import TINY_SIZE, tiny_flux


def pair_of(width=TINY_SIZE, height=TINY_SIZE, *, prompt="a red cone", regions=()):
    before = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    return ImagePair(
        prompt=prompt, seed=0, before=before, after=ImageChops.invert(before), plan=Plan(prompt, regions=regions)
    )


def synthesizer_of(pipeline):
    return DiffusersSynthesizer(pipeline=pipeline, width=TINY_SIZE, height=TINY_SIZE, steps=2)


def training_of(pipeline, pairs=None, **options):
    trainer = DifferentialLoRATrainer(**{"rank": 4, "steps": 4, "batch_size": 2, "learning_rate": 1e-2, **options})
    return trainer.train(pairs or [pair_of()], synthesizer_of(pipeline), seed=0, progress=False)


def assert_close(training, other, *, rel=1e-4):
    assert training.losses == pytest.approx(other.losses, rel=rel)
    for name, layer in training.lora.layers.items():
        torch.testing.assert_close(layer.delta(), other.lora.layers[name].delta(), rtol=1e-2, atol=1e-5)


def test_pairs_of_several_sizes_are_learned_together():
    pairs = [pair_of(), pair_of(2 * TINY_SIZE, TINY_SIZE), pair_of(TINY_SIZE, 2 * TINY_SIZE)]
    training = training_of(tiny_flux(dynamic_shift=True), pairs, steps=6)
    alone = training_of(tiny_flux(dynamic_shift=True), pairs[:1], steps=6)
    assert len(training.losses) == 6
    assert training.losses != alone.losses


def test_a_size_that_is_not_whole_tokens_is_refused():
    with pytest.raises(ModelError, match="a picture of 33 x 32 pixels is not whole image tokens"):
        training_of(tiny_flux(), [pair_of(33, 32)])


def test_gradient_checkpointing_changes_nothing_but_memory():
    pipeline = tiny_flux()
    assert_close(training_of(pipeline, gradient_checkpointing=True), training_of(tiny_flux()))
    assert not pipeline.transformer.is_gradient_checkpointing


def test_gradient_checkpointing_saves_activations():
    saved = {enable: saved_bytes(gradient_checkpointing=enable) for enable in (False, True)}
    assert saved[True] < 0.5 * saved[False]


def saved_bytes(**options):
    """Bytes that autograd keeps for the backward pass, of a one-step training."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        training_of(tiny_flux(), steps=1, **options)
    return total


def test_a_model_without_gradient_checkpointing_is_refused(tiny_model, two_pairs):
    with pytest.raises(ModelError, match="TinyDenoiser offers no gradient checkpointing"):
        DifferentialLoRATrainer(gradient_checkpointing=True).train(two_pairs, tiny_model, seed=0)


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_micro_batches_give_the_result_of_the_batch(micro_batch_size):
    pairs = [pair_of(prompt="a red cone"), pair_of(prompt="a blue cube")]
    assert_close(
        training_of(tiny_flux(), pairs, batch_size=4, micro_batch_size=micro_batch_size),
        training_of(tiny_flux(), pairs, batch_size=4),
    )


def test_a_cache_gives_the_same_training(tmp_path):
    trainer = DifferentialLoRATrainer(rank=4, steps=3, learning_rate=1e-2)
    regions = (Region(Box(0, 0, 0.5, 1), "a bright cone"),)
    pairs = [pair_of(regions=regions), pair_of(prompt="a blue cube")]
    plain = trainer.train(pairs, synthesizer_of(tiny_flux()), seed=0, progress=False)
    for _ in range(2):
        cached = trainer.train(pairs, synthesizer_of(tiny_flux()), seed=0, cache=tmp_path, progress=False)
        assert cached.losses == plain.losses


def test_only_the_change_in_the_regions_is_learned_if_composited():
    """Where the difference lies outside the region, there is nothing to learn."""
    before = Image.new("RGB", (TINY_SIZE, TINY_SIZE), "grey")
    after = before.copy()
    after.paste("white", (0, 0, TINY_SIZE // 2, TINY_SIZE))
    right = Plan("a red cone", regions=(Region(Box(0.75, 0, 1, 1), "a red cone"),))
    pair = ImagePair(prompt=right.prompt, seed=0, before=before, after=after, plan=right)
    everywhere = training_of(tiny_flux(), [pair]).losses[0]
    inside = training_of(tiny_flux(), [pair], objective=PairedDifference(outside_weight=0.0, composite=True)).losses[0]
    assert inside < 0.2 * everywhere


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo asks for it
def test_blocks_that_are_compiled_are_trained():
    pipeline = tiny_flux()
    pipeline.transformer.compile_repeated_blocks(backend="eager")

    compiled = training_of(pipeline)
    assert_close(compiled, training_of(tiny_flux()), rel=1e-3)
