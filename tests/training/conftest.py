"""A tiny real model for a trainer: four-by-four pictures as latents, and a denoiser of three blocks."""

from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from artaug.errors import ModelError
from artaug.pairs import ImagePair
from artaug.plan import Plan
from artaug.synthesis import Synthesizer
from artaug.training import FlowMatching

SIDE = 4
PIXELS = SIDE * SIDE * 3


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Dropout(0.5), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden):
        return hidden + self.mlp(self.attn(self.norm(hidden)))


class TinyDenoiser(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.proj_in = nn.Linear(PIXELS + 8 + 1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.proj_out = nn.Linear(width, PIXELS)

    def forward(self, noisy, sigmas, prompts):
        hidden = self.proj_in(torch.cat([noisy.flatten(1), prompts, sigmas[:, None].to(noisy)], dim=1))
        for block in self.blocks:
            hidden = block(hidden)
        return self.proj_out(hidden).reshape(noisy.shape)


class TinyModel:
    """Fulfils `artaug.training.DiffusionModel`, and lends itself as an `artaug.training.Trainable`."""

    def __init__(self, *, noise_schedule=None, dtype=torch.float32, applied=()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.module = TinyDenoiser().to(dtype)
        self.noise_schedule = noise_schedule or FlowMatching()
        self.dtype = dtype
        self.applied = applied
        self.calls = SimpleNamespace(images=0, prompts=0)

    def encode_images(self, images):
        self.calls.images += len(images)
        pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).div(127.5).sub(1).to(self.dtype)

    def encode_prompts(self, prompts):
        self.calls.prompts += len(prompts)
        return {
            "embeds": torch.tensor([[float(byte % 7 - 3) for byte in f"{prompt:8.8}".encode()] for prompt in prompts])
        }

    def initial_noise(self, seeds, conditioning):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return torch.cat([torch.randn(1, 3, SIDE, SIDE, generator=generator) for generator in generators])

    def encode_masks(self, masks):
        return masks[:, None].expand(-1, 3, -1, -1).float()

    def predict(self, noisy, sigmas, conditioning):
        return self.module(noisy.to(self.dtype), sigmas, conditioning["embeds"].to(self.dtype))

    @property
    def device(self):
        return self.module.proj_in.weight.device

    def at_size(self, width, height):
        if (width, height) != (SIDE, SIDE):
            raise ModelError(f"a picture of {width} x {height} pixels: need {SIDE} x {SIDE}.")
        return self

    def without_encoders(self):
        return nullcontext()

    def without_denoiser(self):
        return nullcontext()

    @property
    def fingerprint(self):
        return " ".join(lora.digest for lora in self.applied)

    @contextmanager
    def training(self):
        if not self.applied:
            yield self
            return
        with self.applied[0].applied_to(self.module):
            yield self


class TinySynthesizer(Synthesizer):
    """Draws with a tiny model, in one step from pure noise."""

    def __init__(self, model=None, loras=()):
        self.model, self.loras = model or TinyModel(), tuple(loras)

    @torch.no_grad()
    def synthesize(self, plan, *, seed):
        noise = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
        sigmas, conditioning = torch.ones(1), self.model.encode_prompts([plan.prompt])
        with self.training() as model:
            prediction = model.predict(noise, sigmas, conditioning)
        (pixels,) = model.noise_schedule.predict_x0(noise, prediction, sigmas)
        return Image.fromarray((pixels / 2 + 0.5).clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy())

    def with_lora(self, lora, *, scale=1.0):
        return TinySynthesizer(self.model, (*self.loras, lora.scaled(scale)))

    @property
    def fingerprint(self):
        return " ".join(lora.digest for lora in self.loras)

    @contextmanager
    def training(self):
        was_training = self.model.module.training
        with ExitStack() as applied:
            for lora in self.loras:
                applied.enter_context(lora.applied_to(self.model.module))
            self.model.module.eval()
            try:
                yield self.model
            finally:
                self.model.module.train(was_training)


def picture(seed):
    grid = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(grid)


def make_pair(seed, *, changed=True, prompt=None):
    prompt = prompt or f"scene {seed}"
    after = picture(seed + 1000) if changed else picture(seed)
    return ImagePair(prompt=prompt, seed=seed, before=picture(seed), after=after, plan=Plan(prompt))


@pytest.fixture
def make_model():
    return TinyModel


@pytest.fixture
def tiny_model():
    return TinyModel()


@pytest.fixture
def pair_of():
    return make_pair


@pytest.fixture
def two_pairs():
    return [make_pair(1), make_pair(2)]
