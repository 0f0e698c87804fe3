"""Layers in training that get no gradient are named, once; those that act are not."""

import pytest
import torch

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer
from artaug.errors import ModelError
from support.family_runs import picture
from support.tiny_flux import tiny_flux
from support.tiny_qwen_image import tiny_qwen_image

LOGGER = "artaug.training.unused_layers"


def trainer_of(**options):
    return aa.DifferentialLoRATrainer(**{"rank": 2, "steps": 6, "batch_size": 2, "targets": "blocks", **options})


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


def bypass(module, forward):
    """Let a denoiser compute something else."""
    module.forward = forward.__get__(module)


def without_last_mlp(self, noisy, sigmas, prompts):
    hidden = self.proj_in(torch.cat([noisy.flatten(1), prompts, sigmas[:, None].to(noisy)], dim=1))
    for block in self.blocks[:2]:
        hidden = block(hidden)
    self.blocks[2].mlp(hidden)  # called, and dropped
    return self.proj_out(hidden + self.blocks[2].attn(self.blocks[2].norm(hidden))).reshape(noisy.shape)


def expert_of_high_noise(self, noisy, sigmas, prompts):
    hidden = self.proj_in(torch.cat([noisy.flatten(1), prompts, sigmas[:, None].to(noisy)], dim=1))
    for block in self.blocks[:2]:
        hidden = block(hidden)
    return self.proj_out(self.blocks[2](hidden) if sigmas.amax() > 0.75 else hidden).reshape(noisy.shape)


@pytest.mark.parametrize("objective", [aa.PairedDifference(), aa.TwoStage()])
def test_a_model_that_uses_all_layers_is_not_warned_of(make_model, two_pairs, caplog, objective):
    trainer_of(objective=objective).train(two_pairs, make_model(), seed=0)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("objective", [aa.PairedDifference(), aa.TwoStage(), aa.Bipolar(), aa.DirectPreference()])
def test_layers_whose_output_is_dropped_are_named_once(make_model, two_pairs, caplog, objective):
    model = make_model()
    bypass(model.module, without_last_mlp)
    trainer_of(objective=objective, steps=60).train(two_pairs, model, seed=0)
    (message,) = warnings_of(caplog)
    assert "2 of 9 layers" in message
    assert "first 25 steps" in message
    assert "blocks.2.mlp.0, blocks.2.mlp.3." in message
    assert "blocks.2.attn" not in message


def test_layers_are_named_at_the_end_of_a_short_training(make_model, two_pairs, caplog):
    model = make_model()
    bypass(model.module, without_last_mlp)
    trainer_of(steps=1).train(two_pairs, model, seed=0)
    assert "first 1 steps" in caplog.text


def test_an_expert_of_some_noise_levels_is_not_named(make_model, two_pairs, caplog):
    model = make_model()
    bypass(model.module, expert_of_high_noise)
    trainer_of(steps=30, batch_size=1).train(two_pairs, model, seed=0)
    assert warnings_of(caplog) == []


def test_pairs_without_a_change_say_nothing_of_layers(make_model, pair_of, caplog):
    pairs = [pair_of(seed, changed=False) for seed in range(2)]
    trainer_of(steps=60).train(pairs, make_model(), seed=0)
    assert warnings_of(caplog) == []


def test_a_model_that_calls_no_layer_in_training_is_refused(make_model, two_pairs):
    model = make_model()
    bypass(model.module, without_last_mlp)
    with pytest.raises(ModelError, match=r"none of the 2 layers in training \('blocks\.2\.mlp\.0' is one\)"):
        trainer_of(targets=r"blocks\.2\.mlp").train(two_pairs, model, seed=0)


def pairs_of_pictures(side=32):
    pictures = [picture(seed, width=side, height=side) for seed in range(2)]
    return [aa.ImagePair(prompt="a cone", seed=0, before=pictures[0], after=pictures[1], plan=aa.Plan("a cone"))]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_dropped_text_layers_of_a_last_block_are_named(caplog, gradient_checkpointing):
    synthesizer = DiffusersSynthesizer(pipeline=tiny_qwen_image(), width=32, height=32, steps=2, max_sequence_length=32)
    trainer = trainer_of(
        steps=1, batch_size=1, targets=aa.training.ATTENTION, gradient_checkpointing=gradient_checkpointing
    )
    trainer.train(pairs_of_pictures(), synthesizer, seed=0, progress=False)
    (message,) = warnings_of(caplog)
    assert "2 of 16 layers" in message
    assert "transformer_blocks.1.attn.add_q_proj, transformer_blocks.1.attn.to_add_out." in message


def test_nothing_is_looked_at_once_every_layer_had_a_gradient(make_model, two_pairs, monkeypatch):
    looks = []
    norms = torch._foreach_norm  # noqa: SLF001 - what clipping calls, too

    def count(tensors, *args):
        looks.extend(args)
        return norms(tensors, *args)

    monkeypatch.setattr(torch, "_foreach_norm", count)
    trainer_of(steps=10).train(two_pairs, make_model(), seed=0)
    assert looks.count(float("inf")) == 1


@pytest.mark.parametrize("storage", [torch.float16, torch.float8_e4m3fn])
def test_every_layer_of_a_float16_student_learns(caplog, storage):
    pipeline = tiny_flux().to(torch.float16)
    pipeline.vae.to(torch.float32)
    if storage != torch.float16:
        pipeline.transformer.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float16)
    synthesizer = DiffusersSynthesizer(pipeline=pipeline, width=32, height=32, steps=2, max_sequence_length=32)
    events = []
    trainer = trainer_of(steps=4, batch_size=1, targets=aa.training.ATTENTION_AND_MLP)
    training = trainer.train(pairs_of_pictures(), synthesizer, seed=0, progress=False, on_step=events.append)
    assert warnings_of(caplog) == []
    assert all(event.loss_scale is not None for event in events)
    assert not all(event.is_skipped for event in events)
    assert all(layer.up.any() for layer in training.lora.layers.values())
