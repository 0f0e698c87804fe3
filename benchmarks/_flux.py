"""FLUX transformers with random weights, and a step of a batch of pictures with regions."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

import artaug as aa
from artaug.diffusion.families.flux.family import FluxDenoiser
from artaug.regional import EncodedPrompt, EncodedRegion, GuidedRun

LATENT_CHANNELS = 64
_NOISE_LEVEL = 0.8


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The sizes of a FLUX transformer, and the lengths of its prompts."""

    double_blocks: int
    single_blocks: int
    heads: int
    head_channels: int
    text_channels: int
    pooled_channels: int
    base_tokens: int
    """Tokens of a prompt with its padding, as the text encoder gives it."""
    region_tokens: int
    """Tokens of a region's prompt without its padding."""
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    storage: str = "plain"
    """How its weights are stored between calls: as they compute, or ``"fp8"``, or ``"nf4"``."""

    def model(self) -> FluxTransformer2DModel:
        """The transformer, built on the device, with the same weights every time."""
        axis_channels = self.head_channels * 7 // 32 * 2
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.random.fork_rng(), torch.device(self.device):
                torch.manual_seed(0)
                model = FluxTransformer2DModel(
                    in_channels=LATENT_CHANNELS,
                    num_layers=self.double_blocks,
                    num_single_layers=self.single_blocks,
                    attention_head_dim=self.head_channels,
                    num_attention_heads=self.heads,
                    joint_attention_dim=self.text_channels,
                    pooled_projection_dim=self.pooled_channels,
                    guidance_embeds=True,
                    axes_dims_rope=(self.head_channels - 2 * axis_channels, axis_channels, axis_channels),
                )
        finally:
            torch.set_default_dtype(default_dtype)
        return with_storage(model.eval().requires_grad_(False), self.storage)


FLUX_DEV = Geometry(
    double_blocks=19,
    single_blocks=38,
    heads=24,
    head_channels=128,
    text_channels=4096,
    pooled_channels=768,
    base_tokens=512,
    region_tokens=32,
    device="cuda",
    dtype=torch.bfloat16,
)
"""FLUX.1-dev, whose prompts are 512 tokens."""

SCALED_DOWN = Geometry(
    double_blocks=2,
    single_blocks=4,
    heads=4,
    head_channels=128,
    text_channels=256,
    pooled_channels=64,
    base_tokens=128,
    region_tokens=32,
)
"""A sixth of FLUX's width, a tenth of its depth: small enough for two cores."""

PLAYGROUND = Geometry(
    double_blocks=2,
    single_blocks=5,
    heads=4,
    head_channels=32,
    text_channels=96,
    pooled_channels=64,
    base_tokens=24,
    region_tokens=12,
)
"""The playground's transformer, and the length of its prompts."""


def with_storage(model: FluxTransformer2DModel, storage: str) -> FluxTransformer2DModel:
    """The model with its weights in ``"fp8"``, as diffusers stores them, or its blocks' in bitsandbytes' ``"nf4"``."""
    if storage == "fp8":
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=model.dtype)
    if storage == "nf4":
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and "blocks" in name:
                model.set_submodule(name, _to_nf4(layer))
    return model


def _to_nf4(layer: nn.Linear) -> nn.Module:
    import bitsandbytes  # noqa: PLC0415 - of an extra

    weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    with torch.device("meta"):
        linear = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=layer.weight.dtype, quant_type="nf4"
        )
    linear.weight, linear.bias = weight, layer.bias
    quantized: nn.Module = linear.eval().to(layer.weight.device)  # the move to the device packs the weights
    return quantized


@dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """One step of a batch: the model, the arguments a pipeline would call it with, and the regions of every picture."""

    geometry: Geometry
    model: FluxTransformer2DModel
    side: int
    """Image tokens on a side: a 16th of the picture's pixels."""
    pictures: tuple[tuple[aa.Region, ...], ...]
    """The regions of each picture of the batch, possibly none."""
    gradients: bool = False
    """Whether a step is one of training: backward as well, to the noisy latents through every layer."""

    @cached_property
    def kwargs(self) -> Mapping[str, Any]:
        """The arguments of a pipeline's call, at a noise level where the regions of every preset count."""
        geometry, batch = self.geometry, len(self.pictures)
        rows, columns = torch.meshgrid(torch.arange(self.side), torch.arange(self.side), indexing="ij")
        grid = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
        inputs = {
            "timestep": torch.full((batch,), _NOISE_LEVEL),
            "guidance": torch.full((batch,), 3.5),
            "img_ids": grid,
            "txt_ids": torch.zeros(geometry.base_tokens, 3),
        }
        return {
            "hidden_states": self._random(batch, self.side**2, LATENT_CHANNELS).requires_grad_(self.gradients),
            "encoder_hidden_states": self._random(batch, geometry.base_tokens, geometry.text_channels),
            "pooled_projections": self._random(batch, geometry.pooled_channels),
            **{name: tensor.to(geometry.device, geometry.dtype) for name, tensor in inputs.items()},
            "return_dict": False,
        }

    @cached_property
    def denoiser(self) -> FluxDenoiser:
        """The model's interface to a guide."""
        embeds = self.kwargs["encoder_hidden_states"]
        return FluxDenoiser(module=self.model, grid=(self.side, self.side), prompt_embeds=embeds)

    @cached_property
    def run(self) -> GuidedRun:
        """What a guide gets of these steps."""
        plans = [aa.Plan("a plan", regions) for regions in self.pictures]
        return GuidedRun(
            denoiser=self.denoiser,
            plans=plans,
            regions=self.encoded,
            phrase_tokens=lambda _prompt, phrases: [()] * len(phrases),
        )

    @cached_property
    def encoded(self) -> list[list[EncodedRegion]]:
        """The regions of every picture with random prompts, padded as the plan's."""
        token_slice = slice(0, self.geometry.region_tokens)
        return [
            [EncodedRegion(region, EncodedPrompt(self._prompt(), token_slice)) for region in regions]
            for regions in self.pictures
        ]

    @property
    def inputs(self) -> list[Tensor]:
        """What a step holds before it begins: weights, and the arguments of the call."""
        arguments = [value for value in self.kwargs.values() if isinstance(value, Tensor)]
        return [*arguments, *self.model.parameters()]

    def step(self) -> None:
        """One step: the predictions, and with `gradients` the way back."""
        with torch.set_grad_enabled(self.gradients):
            prediction: Tensor = self.model(**self.kwargs)[0]
            if self.gradients:
                prediction.float().square().mean().backward()

    def _prompt(self) -> dict[str, Tensor]:
        geometry = self.geometry
        return {
            "prompt_embeds": self._random(1, geometry.base_tokens, geometry.text_channels),
            "pooled_prompt_embeds": self._random(1, geometry.pooled_channels),
        }

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.geometry.device, dtype=self.geometry.dtype)


def boxes(count: int, *, side: int, variant: int = 0) -> list[aa.Box]:
    """Boxes along the token grid, one in each of ``count`` equal cells in rows and columns.

    Args:
        count: of boxes, at most ``side``.
        side: image tokens on a side.
        variant: 0 for an eighth of the cell free all around; each other number for boxes of other sizes, at least half a
            cell high and wide, somewhere in their cells.
    """
    down = max(1, 2 ** ((count.bit_length() - 1) // 2))
    across = -(-count // down)
    height, width = side // down, side // across
    rng = random.Random(variant)
    found = []
    for number in range(count):
        top, bottom = _edges(height, rng if variant else None)
        left, right = _edges(width, rng if variant else None)
        row, column = number // across * height, number % across * width
        found.append(aa.Box((column + left) / side, (row + top) / side, (column + right) / side, (row + bottom) / side))
    return found


def _edges(length: int, rng: random.Random | None) -> tuple[int, int]:
    """Where a box begins and ends in a cell of ``length`` tokens."""
    if rng is None:
        gap = max(length // 8, int(length > 2))
        return gap, length - gap
    size = rng.randint(-(-length // 2), length)
    start = rng.randint(0, length - size)
    return start, start + size
