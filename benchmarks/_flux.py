"""FLUX transformers with random weights, regions for them, and counts of what a guided step costs."""

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
from artaug.regional.attention_mask import GroupMask, joint_mask
from artaug.regional.flex import TILE, FlexMask
from artaug.regional.region_weights import split_grid
from artaug.regional.split_plan import AttentionSplit, plan_splits

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
    """One step of one picture: the model, the arguments a pipeline would call it with, and the picture's regions."""

    geometry: Geometry
    model: FluxTransformer2DModel
    side: int
    """Image tokens on a side: a 16th of the picture's pixels."""
    regions: tuple[aa.Region, ...]
    isolation: Isolation

    @cached_property
    def kwargs(self) -> Mapping[str, Any]:
        """The arguments of a pipeline's call, at a noise level where the regions of every preset count."""
        geometry = self.geometry
        rows, columns = torch.meshgrid(torch.arange(self.side), torch.arange(self.side), indexing="ij")
        grid = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
        inputs = {
            "timestep": torch.tensor([_NOISE_LEVEL]),
            "guidance": torch.tensor([3.5]),
            "img_ids": grid,
            "txt_ids": torch.zeros(geometry.base_tokens, 3),
        }
        return {
            "hidden_states": self._random(1, self.side**2, LATENT_CHANNELS),
            "encoder_hidden_states": self._random(1, geometry.base_tokens, geometry.text_channels),
            "pooled_projections": self._random(1, geometry.pooled_channels),
            **{name: tensor.to(geometry.device, geometry.dtype) for name, tensor in inputs.items()},
            "return_dict": False,
        }

    @cached_property
    def denoiser(self) -> FluxDenoiser:
        """The model's interface to a guide."""
        embeds = self.kwargs["encoder_hidden_states"]
        return FluxDenoiser(module=self.model, grid=(self.side, self.side), prompt_embeds=embeds)

    @cached_property
    def encoded(self) -> list[EncodedRegion]:
        """The regions with random prompts, padded as the plan's."""
        token_slice = slice(0, self.geometry.region_tokens)
        return [EncodedRegion(region, EncodedPrompt(self._prompt(), token_slice)) for region in self.regions]

    @property
    def spans(self) -> tuple[Span, ...]:
        """The joint sequence of a guided step."""
        region_tokens = self.geometry.region_tokens
        prompts = [Span("text", region_tokens, number + 1) for number in range(len(self.regions))]
        return (Span("text", self.geometry.base_tokens), *prompts, Span("image", self.side**2))

    @torch.no_grad()
    def step(self) -> Tensor:
        """The prediction of one step."""
        prediction: Tensor = self.model(**self.kwargs)[0]
        return prediction

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
class StepCost:
    """What one step of one picture costs."""

    linear_flops: int
    """Of the linear layers; a multiplication and an addition are two."""
    attention_flops: int
    """Of queries times keys and weights times values."""
    mask_bytes: int
    """Of masks and indices, as long as a run holds them, and of the copy that a call makes."""

    @property
    def flops(self) -> int:
        """The sum of both."""
        return self.linear_flops + self.attention_flops


def step_cost(setting: Setting, method: str) -> StepCost:
    """Count a step's floating point operations and the bytes of its masks.

    Args:
        setting: model, picture and regions.
        method: one of a `RegionalAttention`, or ``"plain"`` or ``"output_mix"``.
    """
    image, base, channels = setting.side**2, setting.geometry.base_tokens, _channels(setting)
    layers = len(setting.denoiser.sites)
    if method in {"plain", "output_mix"}:
        passes = 1 + len(setting.regions) if method == "output_mix" else 1
        attention = 4 * (image + base) ** 2 * channels * layers
        return StepCost(passes * _linear_flops(setting, base), passes * attention, 0)
    isolated = [
        setting.isolation.applies_to_block(site.block, num_blocks=layers, stack_start=site.stack_start)
        for site in setting.denoiser.sites
    ]
    masks = {applies: mask_of(setting, isolated=applies) for applies in set(isolated)}
    costs = {applies: _mask_cost(mask, method, setting.geometry.dtype) for applies, mask in masks.items()}
    text = base + len(setting.regions) * setting.geometry.region_tokens
    return StepCost(
        _linear_flops(setting, text),
        sum(4 * costs[applies][0] * channels for applies in isolated),
        sum(mask_bytes for _, mask_bytes in costs.values()),
    )


def mask_of(setting: Setting, *, isolated: bool) -> GroupMask:
    """The mask of a joint layer where the isolation applies, or of one where it does not."""
    region_weights = split_grid(
        setting.regions, (setting.side, setting.side), base_weight=setting.isolation.base_weight
    )
    return joint_mask(setting.spans, region_weights, setting.isolation if isolated else None)


def _channels(setting: Setting) -> int:
    return setting.geometry.heads * setting.geometry.head_channels


def _linear_flops(setting: Setting, text: int) -> int:
    """FLOPs of the linear layers: weights times tokens, summed over layers."""
    image = setting.side**2
    tokens = {"image": image, "text": text, "joint": image + text, None: 1}
    layers = [(name, layer) for name, layer in setting.model.named_modules() if isinstance(layer, nn.Linear)]
    return sum(2 * layer.weight.numel() * tokens[setting.denoiser.token_stream(name)] for name, layer in layers)


def _mask_cost(mask: GroupMask, method: str, dtype: torch.dtype) -> tuple[int, int]:
    """Scores computed in one layer, and bytes held."""
    if method == "dense":
        copy_bytes = 0 if dtype == torch.float32 else dtype.itemsize
        return mask.bias.numel(), mask.bias.numel() * (4 + copy_bytes)
    if method == "flex":
        flex_mask = FlexMask.of(mask, torch.device("cpu"))
        block_mask = flex_mask.block_mask
        tiles = int(block_mask.kv_num_blocks.sum()) + int(block_mask.full_kv_num_blocks.sum())  # type: ignore[union-attr]
        return tiles * TILE**2, _num_bytes(_flex_tensors(flex_mask))
    splits = plan_splits(mask, method)  # type: ignore[arg-type]
    queries, keys = mask.bias.shape
    scores = sum(_num_tokens([split.queries], queries) * _num_tokens(split.keys, keys) for split in splits)
    return scores, _num_bytes(_split_tensors(splits))


def _num_tokens(indices: Sequence[slice | Tensor], count: int) -> int:
    return sum(len(range(count)[index]) if isinstance(index, slice) else len(index) for index in indices)


def _split_tensors(splits: Sequence[AttentionSplit]) -> Iterator[Tensor]:
    for split in splits:
        parts = (split.queries, *split.keys, split.log_weights)
        yield from (part for part in parts if isinstance(part, Tensor))


def _flex_tensors(flex_mask: FlexMask) -> Iterator[Tensor]:
    """The tensors of a block mask, and those that its functions have closed over."""
    values = [*vars(flex_mask).values(), *vars(flex_mask.block_mask).values()]
    for function in (flex_mask.block_mask.mask_mod, flex_mask.score_mod):
        values += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    yield from {id(value): value for value in values if isinstance(value, Tensor)}.values()


def _num_bytes(tensors: Iterator[Tensor]) -> int:
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors)
