"""A LoRA for each region in one forward pass: every token gets the updates of the regions that it belongs to."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

import torch
from einops import rearrange
from torch import Tensor

from artaug._internal.arguments import argument_error, check_argument
from artaug.errors import GuideError
from artaug.lora.lora import LoRA
from artaug.plan import Region
from artaug.regional.denoiser import AttentiveDenoiser
from artaug.regional.guided_call import CurrentCall, GuidedRow
from artaug.regional.region_weights import RegionWeights

SplitGrid: TypeAlias = Callable[[tuple[Region, ...], tuple[int, int]], RegionWeights]
"""`artaug.regional.region_weights.split_grid` with a guide's options."""


def find_lora(region: Region, loras: Mapping[str, LoRA]) -> LoRA | None:
    """The LoRA that a region names.

    Raises:
        GuideError: if the guide has none of that name.
    """
    if region.lora is None:
        return None
    if region.lora not in loras:
        raise GuideError(
            f"a region names the LoRA {region.lora!r} and the guide has {sorted(loras) or 'none'}. "
            f"Pass it to the guide: RegionalAttention(loras={{{region.lora!r}: artaug.LoRA.load(...)}})."
        )
    return loras[region.lora]


def check_loras(owner: str, loras: object) -> None:
    """Refuse what is no LoRA by name.

    Raises:
        InvalidValueError: naming the first that is none, such as the path of one.
    """
    if not isinstance(loras, Mapping):
        raise argument_error(owner, "loras", loras, expected="a LoRA by name", advice="Such as {'ink': lora}.")
    for name, lora in loras.items():
        check_argument(owner, f"loras[{name!r}]", lora, LoRA)


@contextmanager
def token_loras_applied(
    denoiser: AttentiveDenoiser, loras: Mapping[str, LoRA], *, current: CurrentCall, split_grid: SplitGrid
) -> Iterator[None]:
    """Apply the LoRAs of regions to their own tokens inside the ``with`` block.

    An image token gets the part of a LoRA's update that is the region's share of the token, up to all; a region's prompt
    gets all of it, and other prompts nothing. The output pixels of a convolution are such tokens, on a grid of their own.

    Args:
        denoiser: the model whose layers are updated.
        loras: those that regions name, by name.
        current: the call under way.
        split_grid: how regions split a grid.
    """
    with ExitStack() as applied:
        for name, lora in loras.items():
            _check_layers(name, lora, denoiser)
            scales = _TokenScales(name, denoiser, current, split_grid)
            applied.enter_context(lora.applied_to(denoiser.module, output_weights=scales))
        yield


class _TokenScales:
    """The factor of one LoRA's update for every token, layer by layer."""

    def __init__(self, name: str, denoiser: AttentiveDenoiser, current: CurrentCall, split_grid: SplitGrid) -> None:
        self._name = name
        self._denoiser = denoiser
        self._current = current
        self._split_grid = split_grid
        self._grids = {grid[0] * grid[1]: grid for grid in (site.grid for site in denoiser.sites) if grid is not None}
        self._cache: dict[object, Tensor] = {}

    def __call__(self, layer: str, outputs: Tensor) -> Tensor | None:
        """Factors that broadcast against a layer's outputs, or None if the layer gets no update."""
        rows, stream = self._current.value.rows, self._denoiser.token_stream(layer)
        if not rows or stream is None:
            return None
        # A convolution gives (batch, channels, height, width), every other layer (batch, tokens, channels).
        pixels = (outputs.shape[2], outputs.shape[3]) if outputs.ndim == 4 else None
        count = math.prod(pixels) if pixels else outputs.shape[1]
        key = (rows, stream, pixels or count, outputs.device)
        if key not in self._cache:
            # A UNet's layers have grids of several sizes; the number of tokens identifies them.
            grid = self._grids.get(count, self._denoiser.token_grid) if stream == "image" else self._denoiser.token_grid
            scales = torch.stack([self._row_scales(row, stream, pixels or grid) for row in rows])
            if scales.shape[1] != count:
                raise GuideError(
                    f"layer {layer!r} has {count} tokens, and its {stream} tokens should be {scales.shape[1]}: "
                    f"{type(self._denoiser).__name__}.token_stream does not fit the model. Correct what it returns."
                )
            scales = scales.to(outputs.device)
            if pixels:
                scales = rearrange(scales, "batch (height width) -> batch 1 height width", height=pixels[0])
            else:
                scales = rearrange(scales, "batch tokens -> batch tokens 1")
            self._cache[key] = scales
        return self._cache[key]

    def _row_scales(self, row: GuidedRow, stream: str, grid: tuple[int, int]) -> Tensor:
        """Factors of the tokens of one row: (tokens,), in [0, 1]."""
        prompts = [number for number, region in enumerate(row.regions, start=1) if region.lora == self._name]
        regions = [number for number, region in enumerate(row.lora_regions, start=1) if region.lora == self._name]
        # Dividing by the region's weight gives its share p_i of each token: how strongly a prompt counts in attention
        # is no reason to apply a LoRA more than once.
        region_weights = torch.tensor([1.0, *(region.weight for region in row.lora_regions)])
        shares = self._split_grid(row.lora_regions, grid).weights / region_weights[:, None]
        image_scales = shares[regions].sum(dim=0).clamp(max=1)
        parts = []
        for span in row.spans:
            if span.kind == "image" and stream != "text":
                parts.append(image_scales)
            elif span.kind == "reference" and stream != "text":
                parts.append(torch.zeros(span.length))
            elif span.kind in {"text", "padding"} and stream != "image":
                parts.append(torch.full((span.length,), float(span.kind == "text" and span.prompt in prompts)))
        if stream == "image" and not parts:  # cross-attention: the sequence of a row holds its prompts only
            parts.append(image_scales)
        return torch.cat(parts)


def _check_layers(name: str, lora: LoRA, denoiser: AttentiveDenoiser) -> None:
    """Warn of layers without tokens, which no region can update; refuse a LoRA that has no others."""
    skipped = [layer for layer in lora.layers if denoiser.token_stream(layer) is None]
    if len(skipped) == len(lora.layers):
        raise GuideError(
            f"no layer of the LoRA {name!r} works on tokens in a {type(denoiser.module).__name__} (its first is "
            f"{skipped[0]!r}), so it cannot be applied to a region. Apply it to the whole picture: "
            "synthesizer.with_lora(...)."
        )
    if skipped:
        warnings.warn(
            f"{len(skipped)} of {len(lora.layers)} layers of the LoRA {name!r} act on the whole picture "
            f"(first: {skipped[0]!r}). They cannot be applied to a region, so they are left out.",
            stacklevel=2,
        )
