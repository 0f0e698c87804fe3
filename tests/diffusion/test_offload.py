"""Parts that rest: who waits on the CPU and when, and who is left where it is."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.flux.family import Flux
from artaug.diffusion.offload import encoders_of, quantized, resting, tied
from support.quantized import fp8_stored
from support.quantized import quantized as quantized_base
from support.tiny_flux import TINY_SIZE, tiny_flux

CARD = torch.device("cuda", 1)


class Elsewhere(nn.Module):
    """A part that says it is on a card, and notes where it is sent."""

    def __init__(self):
        super().__init__()
        self.device = CARD
        self.sent = []

    def parameters(self, recurse=True):
        return iter([SimpleNamespace(device=self.device)])

    def to(self, device):
        self.device = torch.device(device)
        self.sent.append(self.device)
        return self


def test_parts_wait_on_the_cpu_and_come_back_also_after_an_exception():
    parts = [Elsewhere(), Elsewhere()]
    seen = []

    def failing():
        with resting(parts):
            seen.extend(part.device.type for part in parts)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert seen == ["cpu", "cpu"]
    assert [part.device for part in parts] == [CARD, CARD]


def test_a_part_on_the_cpu_is_not_touched(monkeypatch):
    part = nn.Linear(2, 2)
    part.device = torch.device("cpu")
    monkeypatch.setattr(part, "to", lambda _device: pytest.fail("it was moved"))
    with resting([part]):
        pass


@pytest.mark.parametrize("kind", ["bitsandbytes nf4", "torchao int8"])
def test_quantized_parts_are_tied_to_their_device(kind):
    assert tied(quantized_base(tiny_flux(), kind).transformer)


def test_offloaded_parts_are_tied_and_those_stored_in_fp8_are_not():
    offloaded, stored = tiny_flux().transformer, fp8_stored(tiny_flux()).transformer
    offloaded.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    assert (tied(offloaded), tied(stored)) == (True, False)
    assert not quantized(offloaded)
    part = Elsewhere()
    vars(part)["_hf_hook"] = "of accelerate"
    with resting([part]):
        assert part.sent == []


def test_a_denoiser_whose_weights_are_swapped_is_not_trained(tmp_path):
    pipeline = tiny_flux()
    pipeline.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    synthesizer = DiffusersSynthesizer(pipeline=pipeline, width=TINY_SIZE, height=TINY_SIZE, steps=1)
    with pytest.raises(aa.ModelError, match="takes weights away before a backward pass needs them"):
        synthesizer.training().__enter__()


def test_encoders_are_what_encodes():
    pipeline = tiny_flux()
    assert set(encoders_of(pipeline)) == {pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2}


def test_a_training_encodes_without_the_denoiser_and_learns_without_encoders(monkeypatch):
    told = []

    def noting(what):
        @contextmanager
        def absent(_family):
            told.append(f"{what} leave")
            yield
            told.append(f"{what} return")

        return absent

    encode, predict = Flux.encode_images, Flux.predict
    monkeypatch.setattr(Family, "without_encoders", noting("encoders"))
    monkeypatch.setattr(Family, "without_denoiser", noting("denoiser"))
    monkeypatch.setattr(Flux, "encode_images", lambda *given: told.append("encoding") or encode(*given))
    monkeypatch.setattr(Flux, "predict", lambda *given: told.append("learning") or predict(*given))
    synthesizer = DiffusersSynthesizer(pipeline=tiny_flux(), width=TINY_SIZE, height=TINY_SIZE, steps=1)
    pair = aa.ImagePair.unchanged(synthesizer.synthesize(aa.Plan("a"), seed=0), prompt="a", seed=0)
    trainer = aa.DifferentialLoRATrainer(rank=2, steps=1, batch_size=1, objective=aa.SupervisedFineTuning())
    trainer.train([pair], synthesizer, seed=0, progress=False)
    assert told == [
        "denoiser leave",
        "encoding",
        "encoding",
        "encoders leave",
        "denoiser return",
        "learning",
        "encoders return",
    ]


@pytest.mark.gpu
def test_on_a_gpu_what_rests_is_on_the_cpu_and_comes_back():
    pipeline = tiny_flux().to("cuda")
    seen = {}
    pipeline.vae.encoder.register_forward_pre_hook(
        lambda *_: seen.update(encoding=(pipeline.transformer.device.type, pipeline.vae.device.type))
    )
    pipeline.transformer.register_forward_pre_hook(
        lambda *_: seen.update(learning=(pipeline.transformer.device.type, pipeline.vae.device.type))
    )
    synthesizer = DiffusersSynthesizer(pipeline=pipeline, width=TINY_SIZE, height=TINY_SIZE, steps=1)
    pair = aa.ImagePair.unchanged(synthesizer.synthesize(aa.Plan("a"), seed=0), prompt="a", seed=0)
    aa.DifferentialLoRATrainer(rank=2, steps=1).train([pair], synthesizer, seed=0, progress=False)
    assert seen == {"encoding": ("cpu", "cuda"), "learning": ("cuda", "cpu")}
    assert {part.device.type for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder)} == {"cuda"}
