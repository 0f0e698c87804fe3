"""A LoRA for each region, in one forward pass: every token takes the updates of the regions it belongs to."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from artaug.errors import GuideError
from artaug.lora.lora import LoRA
from artaug.plan import Region
from artaug.regional.denoiser import AttentiveDenoiser, Span
from artaug.regional.region_weights import Shares


@dataclass(frozen=True)
class Row:
    """One row of a call: what its sequence holds, and the regions whose prompts are there."""

    spans: tuple[Span, ...]
    regions: tuple[Region, ...]
    dressed: tuple[Region, ...]
    """All regions of the picture: their LoRAs count in the negative branch, too, or guidance would multiply them."""


def lora_of(region: Region, loras: Mapping[str, LoRA]) -> LoRA | None:
    """The LoRA a region asks for.

    Raises:
        GuideError: if the guide knows none of that name.
    """
    if region.lora is None:
        return None
    if region.lora not in loras:
        raise GuideError(
            f"a region wants the LoRA {region.lora!r} and the guide knows {sorted(loras) or 'none'}. "
            f"Hand it over: RegionalAttention(loras={{{region.lora!r}: artaug.LoRA.load(...)}})."
        )
    return loras[region.lora]


@contextmanager
def worn_in_regions(
    denoiser: AttentiveDenoiser,
    loras: Mapping[str, LoRA],
    *,
    rows: Callable[[], Sequence[Row]],
    shares: Callable[[tuple[Region, ...], tuple[int, int]], Shares],
) -> Iterator[None]:
    """Let every token wear the LoRAs of its regions inside the ``with`` block.

    An image token takes of a region's LoRA the region's share of it, up to all; a region's prompt takes all of it. The
    pixels that come out of a convolution are such tokens, of a grid of their own.

    Args:
        denoiser: whose layers wear them.
        loras: those in use, by name.
        rows: the rows of the call under way, none while no region counts.
        shares: how regions divide a grid, `artaug.regional.region_weights.divided` with the guide's options.
    """
    with ExitStack() as wardrobe:
        for name, lora in loras.items():
            _warn_of_layers_without_tokens(name, lora, denoiser)
            along = _Along(name, denoiser, rows, shares)
            wardrobe.enter_context(lora.applied_to(denoiser.module, output_weights=along))
        yield


class _Along:
    """How much of one LoRA each token takes, layer by layer."""

    def __init__(
        self,
        name: str,
        denoiser: AttentiveDenoiser,
        rows: Callable[[], Sequence[Row]],
        shares: Callable[[tuple[Region, ...], tuple[int, int]], Shares],
    ) -> None:
        self._name = name
        self._denoiser = denoiser
        self._rows = rows
        self._shares = shares
        self._grids = {grid[0] * grid[1]: grid for grid in (site.grid for site in denoiser.sites) if grid is not None}
        self._known: dict[object, Tensor] = {}

    def __call__(self, layer: str, outputs: Tensor) -> Tensor | None:
        rows, stream = tuple(self._rows()), self._denoiser.token_stream(layer)
        if not rows or stream is None:
            return None
        pixels = (outputs.shape[2], outputs.shape[3]) if outputs.ndim == 4 else None  # of a convolution
        count = math.prod(pixels) if pixels else outputs.shape[1]
        key = (rows, stream, pixels or count, outputs.device)
        if key not in self._known:
            grid = self._grids.get(count, self._denoiser.token_grid) if stream == "image" else self._denoiser.token_grid
            taken = torch.stack([self._taken(row, stream, pixels or grid) for row in rows])
            if taken.shape[1] != count:
                raise GuideError(
                    f"layer {layer!r} sees {count} tokens, and its {stream} tokens should be "
                    f"{taken.shape[1]}: {type(self._denoiser).__name__}.stream does not fit the model."
                )
            taken = taken.to(outputs.device)
            self._known[key] = taken.reshape(-1, 1, *pixels) if pixels else taken[..., None]
        return self._known[key]

    def _taken(self, row: Row, stream: str, grid: tuple[int, int]) -> Tensor:
        """What the tokens of one row take: (tokens,), in [0, 1]."""
        spoken = [number for number, region in enumerate(row.regions, start=1) if region.lora == self._name]
        wearing = [number for number, region in enumerate(row.dressed, start=1) if region.lora == self._name]
        weights = torch.tensor([1.0, *(region.weight for region in row.dressed)])
        shares = self._shares(row.dressed, grid).weights / weights[:, None]
        parts = []
        for span in row.spans:
            if span.kind == "image" and stream != "text":
                parts.append(shares[wearing].sum(dim=0).clamp(max=1))
            elif span.kind == "reference" and stream != "text":
                parts.append(torch.zeros(span.length))
            elif span.kind in {"text", "padding"} and stream != "image":
                parts.append(torch.full((span.length,), float(span.kind == "text" and span.prompt in spoken)))
        if stream == "image" and not parts:  # cross-attention: the sequence of a row holds its prompts only
            parts.append(shares[wearing].sum(dim=0).clamp(max=1))
        return torch.cat(parts)


def _warn_of_layers_without_tokens(name: str, lora: LoRA, denoiser: AttentiveDenoiser) -> None:
    left_out = [layer for layer in lora.layers if denoiser.token_stream(layer) is None]
    if len(left_out) == len(lora.layers):
        raise GuideError(
            f"no layer of the LoRA {name!r} works on tokens in a {type(denoiser.module).__name__} (its first is "
            f"{left_out[0]!r}), so no region can wear it. Wear it everywhere: synthesizer.with_lora(...)."
        )
    if left_out:
        warnings.warn(
            f"{len(left_out)} of {len(lora.layers)} layers of the LoRA {name!r} act on the whole picture "
            f"(first: {left_out[0]!r}). A region cannot wear them, so they are left out.",
            stacklevel=2,
        )
