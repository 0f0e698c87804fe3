"""Placement of parts: which are moved to the CPU and when, and which are pinned."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.flux.family import Flux
from artaug.diffusion.offload import encoders_of, has_quantized_weights, is_pinned, on_cpu
from artaug.synthesis import draw
from support.quantized import fp8_stored
from support.quantized import quantized as quantized_base
from support.tiny_flux import TINY_SIZE, tiny_flux

GPU = torch.device("cuda", 1)


class Parameter:
    """Reports a device, and nothing else."""

    def __init__(self, device):
        self.device = device


class FakeGPUModule(nn.Module):
    """A part that reports a GPU as its device, and records where it is moved."""

    def __init__(self):
        super().__init__()
        self.device = GPU
        self.moves = []

    def parameters(self, recurse=True):
        return iter([Parameter(self.device)])

    def to(self, device):
        self.device = torch.device(device)
        self.moves.append(self.device)
        return self


def test_parts_are_moved_to_the_cpu_and_back_also_after_an_exception():
    parts = [FakeGPUModule(), FakeGPUModule()]
    devices = []

    def failing():
        with on_cpu(parts):
            devices.extend(part.device.type for part in parts)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert devices == ["cpu", "cpu"]
    assert [part.device for part in parts] == [GPU, GPU]


def test_a_part_on_the_cpu_is_not_moved(monkeypatch):
    part = nn.Linear(2, 2)
    part.device = torch.device("cpu")
    monkeypatch.setattr(part, "to", lambda _device: pytest.fail("it was moved"))
    with on_cpu([part]):
        pass


@pytest.mark.parametrize("kind", ["bitsandbytes nf4", "torchao int8"])
def test_quantized_parts_are_pinned(kind):
    assert is_pinned(quantized_base(tiny_flux(), kind).transformer)


def test_offloaded_parts_are_pinned_and_those_stored_in_fp8_are_not():
    offloaded, stored = tiny_flux().transformer, fp8_stored(tiny_flux()).transformer
    offloaded.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    assert (is_pinned(offloaded), is_pinned(stored)) == (True, False)
    assert not has_quantized_weights(offloaded)
    part = FakeGPUModule()
    vars(part)["_hf_hook"] = "of accelerate"
    with on_cpu([part]):
        assert part.moves == []


def test_a_denoiser_under_group_offload_is_not_trained(tmp_path):
    pipeline = tiny_flux()
    pipeline.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    synthesizer = DiffusersSynthesizer(pipeline=pipeline, width=TINY_SIZE, height=TINY_SIZE, steps=1)
    with pytest.raises(aa.ModelError, match="takes weights away before a backward pass needs them"):
        synthesizer.training().__enter__()


def test_encoders_are_the_vae_and_the_text_encoders():
    pipeline = tiny_flux()
    assert set(encoders_of(pipeline)) == {pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2}


def test_a_training_encodes_without_the_denoiser_and_trains_without_the_encoders(monkeypatch):
    events = []

    def recording(parts):
        @contextmanager
        def moved(_family):
            events.append(f"{parts} leave")
            yield
            events.append(f"{parts} return")

        return moved

    encode, predict = Flux.encode_images, Flux.predict
    monkeypatch.setattr(Family, "without_encoders", recording("encoders"))
    monkeypatch.setattr(Family, "without_denoiser", recording("denoiser"))
    monkeypatch.setattr(Flux, "encode_images", lambda *args: events.append("encoding") or encode(*args))
    monkeypatch.setattr(Flux, "predict", lambda *args: events.append("training") or predict(*args))
    synthesizer = DiffusersSynthesizer(pipeline=tiny_flux(), width=TINY_SIZE, height=TINY_SIZE, steps=1)
    pair = aa.ImagePair.unchanged(synthesizer.synthesize(aa.Plan("a"), seed=0), prompt="a", seed=0)
    trainer = aa.DifferentialLoRATrainer(rank=2, steps=1, batch_size=1, objective=aa.SupervisedFineTuning())
    trainer.train([pair], synthesizer, seed=0, progress=False)
    assert events == [
        "denoiser leave",
        "encoding",
        "encoding",
        "encoders leave",
        "denoiser return",
        "training",
        "encoders return",
    ]


@pytest.mark.gpu
def test_on_a_gpu_idle_parts_are_on_the_cpu_and_come_back():
    pipeline = tiny_flux().to("cuda")
    devices = {}
    pipeline.vae.encoder.register_forward_pre_hook(
        lambda *_: devices.update(encoding=(pipeline.transformer.device.type, pipeline.vae.device.type))
    )
    pipeline.transformer.register_forward_pre_hook(
        lambda *_: devices.update(training=(pipeline.transformer.device.type, pipeline.vae.device.type))
    )
    synthesizer = DiffusersSynthesizer(pipeline=pipeline, width=TINY_SIZE, height=TINY_SIZE, steps=1)
    pair = aa.ImagePair.unchanged(synthesizer.synthesize(aa.Plan("a"), seed=0), prompt="a", seed=0)
    aa.DifferentialLoRATrainer(rank=2, steps=1).train([pair], synthesizer, seed=0, progress=False)
    assert devices == {"encoding": ("cpu", "cuda"), "training": ("cuda", "cpu")}
    assert {part.device.type for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder)} == {"cuda"}


def test_a_batch_that_ran_out_of_memory_leaves_no_model_on_the_device_and_is_drawn_in_halves(monkeypatch):
    pipeline = tiny_flux()
    plans, seeds = [aa.Plan("a barn"), aa.Plan("a hill"), aa.Plan("a pond")], [1, 2, 3]
    expected = [
        DiffusersSynthesizer(pipeline=pipeline, width=TINY_SIZE, height=TINY_SIZE, steps=2).synthesize(plan, seed=seed)
        for plan, seed in zip(plans, seeds, strict=True)
    ]
    on_device, decode = set(), pipeline.vae.decode

    def decode_one(latents, **options):
        if len(latents) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents, **options)

    for model in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.transformer):
        model.register_forward_pre_hook(lambda called, _: on_device.add(called))
    monkeypatch.setattr(pipeline.vae, "decode", decode_one)
    monkeypatch.setattr(pipeline, "maybe_free_model_hooks", on_device.clear)  # what model offload does at a run's end
    left = []

    class Watched(aa.Synthesizer):
        def synthesize(self, plan, *, seed):
            raise AssertionError

        def synthesize_batch(self, plans, *, seeds):
            left.append(len(on_device))
            images = DiffusersSynthesizer(
                pipeline=pipeline, width=TINY_SIZE, height=TINY_SIZE, steps=2
            ).synthesize_batch(plans, seeds=seeds)
            on_device.clear()
            return images

    drawn = draw(Watched(), plans, seeds=seeds)
    assert left == [0, 0, 0, 0]  # three together, then one by one
    assert [image.tobytes() for image in drawn] == [image.tobytes() for image in expected]
