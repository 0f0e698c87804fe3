"""FLUX transformers with random weights, regions for them, and what a guided step costs by counting."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

import artaug as aa
from artaug.diffusion.families.flux.family import FluxDenoiser
from artaug.regional import EncodedPrompt, EncodedRegion, Isolation, Span
from artaug.regional.attention_mask import Sight, joint_sight
from artaug.regional.flex import TILE, FlexSight
from artaug.regional.region_weights import divided
from artaug.regional.split_plan import Pass, passes

LATENT_CHANNELS = 64
_NOISE_LEVEL = 0.8


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How large a FLUX transformer is, and how long the prompts it reads."""

    double_blocks: int
    single_blocks: int
    heads: int
    head_channels: int
    text_channels: int
    pooled_channels: int
    base_tokens: int
    """Of a prompt with its padding, as the text encoder gives it."""
    region_tokens: int
    """Of a region's prompt without its padding."""
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    storage: str = "plain"
    """What its weights are kept in between calls: as they compute, or ``"fp8"``, or ``"nf4"``."""

    def model(self) -> FluxTransformer2DModel:
        """The transformer, built on the device, with the same weights every time."""
        plane = self.head_channels * 7 // 32 * 2
        before = torch.get_default_dtype()
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
                    axes_dims_rope=(self.head_channels - 2 * plane, plane, plane),
                )
        finally:
            torch.set_default_dtype(before)
        return stored(model.eval().requires_grad_(False), self.storage)


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


def stored(model: FluxTransformer2DModel, storage: str) -> FluxTransformer2DModel:
    """The model with its weights in ``"fp8"``, as diffusers keeps them, or its blocks' in bitsandbytes' ``"nf4"``."""
    if storage == "fp8":
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=model.dtype)
    if storage == "nf4":
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and "blocks" in name:
                model.set_submodule(name, _in_four_bits(layer))
    return model


def _in_four_bits(layer: nn.Linear) -> nn.Module:
    import bitsandbytes  # noqa: PLC0415 - of an extra

    weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    with torch.device("meta"):
        made = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=layer.weight.dtype, quant_type="nf4"
        )
    made.weight, made.bias = weight, layer.bias
    quantized: nn.Module = made.eval().to(layer.weight.device)  # which is when it packs them
    return quantized


@dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """One step of one picture: the model, the arguments a pipeline would call it with, and the picture's regions."""

    geometry: Geometry
    model: FluxTransformer2DModel
    side: int
    """Image tokens on a side: a 16th of the picture's pixels."""
    regions: tuple[aa.Region, ...]
    isolation: Isolation

    @cached_property
    def call(self) -> Mapping[str, Any]:
        """What a pipeline calls the transformer with, at a noise level where every preset's regions count."""
        geometry = self.geometry
        rows, columns = torch.meshgrid(torch.arange(self.side), torch.arange(self.side), indexing="ij")
        grid = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
        told = {
            "timestep": torch.tensor([_NOISE_LEVEL]),
            "guidance": torch.tensor([3.5]),
            "img_ids": grid,
            "txt_ids": torch.zeros(geometry.base_tokens, 3),
        }
        return {
            "hidden_states": self._random(1, self.side**2, LATENT_CHANNELS),
            "encoder_hidden_states": self._random(1, geometry.base_tokens, geometry.text_channels),
            "pooled_projections": self._random(1, geometry.pooled_channels),
            **{name: tensor.to(geometry.device, geometry.dtype) for name, tensor in told.items()},
            "return_dict": False,
        }

    @cached_property
    def denoiser(self) -> FluxDenoiser:
        """The model as a guide sees it."""
        embeds = self.call["encoder_hidden_states"]
        return FluxDenoiser(module=self.model, grid=(self.side, self.side), prompt_embeds=embeds)

    @cached_property
    def encoded(self) -> list[EncodedRegion]:
        """The regions with random prompts, padded as the plan's."""
        words = slice(0, self.geometry.region_tokens)
        return [EncodedRegion(region, EncodedPrompt(self._prompt(), words)) for region in self.regions]

    @property
    def spans(self) -> tuple[Span, ...]:
        """The joint sequence of a guided step."""
        lengths = self.geometry.base_tokens, self.geometry.region_tokens
        added = [Span("text", lengths[1], number + 1) for number in range(len(self.regions))]
        return (Span("text", lengths[0]), *added, Span("image", self.side**2))

    @torch.no_grad()
    def step(self) -> Tensor:
        """The prediction of one step."""
        predicted: Tensor = self.model(**self.call)[0]
        return predicted

    def _prompt(self) -> dict[str, Tensor]:
        geometry = self.geometry
        return {
            "prompt_embeds": self._random(1, geometry.base_tokens, geometry.text_channels),
            "pooled_prompt_embeds": self._random(1, geometry.pooled_channels),
        }

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.geometry.device, dtype=self.geometry.dtype)


def boxes(count: int, *, side: int) -> list[aa.Box]:
    """Boxes along the token grid, in rows and columns, an eighth of their cell (one token at least) free all around."""
    down = max(1, 2 ** ((count.bit_length() - 1) // 2))
    across = -(-count // down)
    height, width = side // down, side // across
    gaps = max(1, height // 8), max(1, width // 8)
    cells = [(number // across, number % across) for number in range(count)]
    return [
        aa.Box(
            (column * width + gaps[1]) / side,
            (row * height + gaps[0]) / side,
            ((column + 1) * width - gaps[1]) / side,
            ((row + 1) * height - gaps[0]) / side,
        )
        for row, column in cells
    ]


@dataclass(frozen=True)
class Work:
    """What one step of one picture takes."""

    linear_flops: int
    """Of the linear layers; a multiplication and an addition are two."""
    attention_flops: int
    """Of queries times keys and weights times values."""
    mask_bytes: int
    """Of all that says who sees whom, as long as a drawing runs, and of the copy a call makes of it."""

    @property
    def flops(self) -> int:
        """All of them."""
        return self.linear_flops + self.attention_flops


def work(setting: Setting, method: str) -> Work:
    """Count a step's floating point operations and the bytes of its masks.

    Args:
        setting: model, picture and regions.
        method: one of a `RegionalAttention`, or ``"plain"`` or ``"output_mix"``.
    """
    image, base, channels = setting.side**2, setting.geometry.base_tokens, _channels(setting)
    layers = len(setting.denoiser.sites)
    if method in {"plain", "output_mix"}:
        times = 1 + len(setting.regions) if method == "output_mix" else 1
        attention = 4 * (image + base) ** 2 * channels * layers
        return Work(times * _linear(setting, base), times * attention, 0)
    holding = [setting.isolation.applies_to_block(block, of=layers) for block in range(layers)]
    sights = {holds: sight_of(setting, isolated=holds) for holds in set(holding)}
    costs = {holds: _cost(sight, method, setting.geometry.dtype) for holds, sight in sights.items()}
    text = base + len(setting.regions) * setting.geometry.region_tokens
    return Work(
        _linear(setting, text),
        sum(4 * costs[holds][0] * channels for holds in holding),
        sum(held for _, held in costs.values()),
    )


def sight_of(setting: Setting, *, isolated: bool) -> Sight:
    """Who sees whom in a joint layer where the isolation holds, or in one where it does not."""
    shares = divided(setting.regions, (setting.side, setting.side), base_weight=setting.isolation.base_weight)
    return joint_sight(setting.spans, shares, setting.isolation if isolated else None)


def _channels(setting: Setting) -> int:
    return setting.geometry.heads * setting.geometry.head_channels


def _linear(setting: Setting, text: int) -> int:
    """Each linear layer, times the tokens that go through it."""
    image = setting.side**2
    tokens = {"image": image, "text": text, "joint": image + text, None: 1}
    layers = [(name, layer) for name, layer in setting.model.named_modules() if isinstance(layer, nn.Linear)]
    return sum(2 * layer.weight.numel() * tokens[setting.denoiser.stream(name)] for name, layer in layers)


def _cost(sight: Sight, method: str, dtype: torch.dtype) -> tuple[int, int]:
    """Scores computed in one layer, and bytes held."""
    if method == "dense":
        copied = 0 if dtype == torch.float32 else dtype.itemsize
        return sight.bias.numel(), sight.bias.numel() * (4 + copied)
    if method == "flex":
        flexed = FlexSight.of(sight, torch.device("cpu"))
        mask = flexed.block_mask
        tiles = int(mask.kv_num_blocks.sum()) + int(mask.full_kv_num_blocks.sum())  # type: ignore[union-attr]
        return tiles * TILE**2, _bytes(_tensors_of(flexed))
    planned = passes(sight, method)  # type: ignore[arg-type]
    queries, keys = sight.bias.shape
    scores = sum(_length([one.queries], queries) * _length(one.keys, keys) for one in planned)
    return scores, _bytes(_tensors_in(planned))


def _length(where: Sequence[slice | Tensor], count: int) -> int:
    return sum(len(range(count)[one]) if isinstance(one, slice) else len(one) for one in where)


def _tensors_in(planned: Sequence[Pass]) -> Iterator[Tensor]:
    for one in planned:
        yield from (part for part in (one.queries, *one.keys, one.bias) if isinstance(part, Tensor))


def _tensors_of(flexed: FlexSight) -> Iterator[Tensor]:
    """What a block mask holds, and what its functions have closed over."""
    held = [*vars(flexed).values(), *vars(flexed.block_mask).values()]
    for function in (flexed.block_mask.mask_mod, flexed.score_mod):
        held += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    yield from {id(one): one for one in held if isinstance(one, Tensor)}.values()


def _bytes(tensors: Iterator[Tensor]) -> int:
    return sum(math.prod(one.shape) * one.element_size() for one in tensors)
