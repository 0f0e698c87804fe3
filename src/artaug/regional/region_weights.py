"""How regions divide an image among prompts: every token has a weight for each, and none is left without a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from artaug.errors import GuideError
from artaug.plan import Region
from artaug.regional.coverage import coverage

_NEGLIGIBLE = 1 / 256


@dataclass(frozen=True, eq=False)
class Shares:
    """How regions divide a grid of image tokens."""

    weights: Float[Tensor, "prompts tokens"]
    """Of the plan's prompt, in the first row, and of each region's, float32; every token sees at least one."""

    @property
    def reached(self) -> Tensor:
        """Where each prompt weighs at least half of what it weighs anywhere, and something: bool, (prompts, tokens)."""
        greatest = self.weights.amax(dim=1, keepdim=True)
        reached: Tensor = (self.weights >= greatest / 2) & (self.weights > 0)
        return reached

    @cached_property
    def signatures(self) -> Tensor:
        """A number for each image token, the same for tokens that the same prompts reach: (tokens,), from 0."""
        numbers: Tensor = torch.unique(self.reached.T, dim=0, return_inverse=True)[1]
        return numbers

    def meeting(self, how: str) -> Tensor:
        """Whether tokens of one signature see those of another, bool (signatures, signatures)."""
        member = torch.unique(self.reached.T, dim=0)[:, 1:].float()
        background = member.sum(dim=1) == 0
        shared: Tensor = (member @ member.T > 0) | (background[:, None] & background)
        if how == "background":
            shared = shared | background[:, None] | background
        return shared


def divided(
    regions: Sequence[Region],
    grid: tuple[int, int],
    *,
    base_weight: float,
    overlap: Literal["share", "over"] = "share",
) -> Shares:
    """Divide a grid of image tokens among a plan's prompt and its regions.

    With c_i the part of a token that region i covers (feathered), where regions overlap either all that cover it get
    ``c_i / max(1, sum_j c_j)`` of it, or a later region lies over the earlier ones, ``c_i prod_{j>i} (1 - c_j)``. That
    times the region's weight is its prompt's; the plan's prompt has ``1 - (1 - base_weight) min(1, sum_i c_i)``.

    Args:
        regions: of one picture, from back to front.
        grid: rows and columns of image tokens.
        base_weight: of the plan's prompt where regions cover all, in [0, 1].
        overlap: ``"share"`` it or lie ``"over"``.

    Raises:
        GuideError: if a region gets nothing of any token, since its prompt would go unread.

    >>> import artaug as aa
    >>> from artaug.regional.region_weights import divided
    >>> divided([aa.Region(aa.Box(0, 0, 0.5, 1), "ivy", weight=2.0)], (1, 4), base_weight=0.25).weights
    tensor([[0.2500, 0.2500, 1.0000, 1.0000],
            [2.0000, 2.0000, 0.0000, 0.0000]])
    """
    covers = [coverage(region, grid).flatten() for region in regions]
    if not covers:
        return Shares(torch.ones(1, grid[0] * grid[1]))
    parts = torch.stack(covers)
    if overlap == "over":
        above = torch.cumprod(1 - parts.flip(0), dim=0).flip(0)
        parts = parts * torch.cat([above[1:], torch.ones_like(above[:1])])
    parts = torch.where(parts < _NEGLIGIBLE, 0, parts / parts.sum(dim=0).clamp(min=1))
    for region, part in zip(regions, parts, strict=True):
        if not part.any():
            raise GuideError(
                f"{region!r} lies under other regions everywhere, or covers less than {_NEGLIGIBLE:.1%} of every one of "
                f"{grid[0]} x {grid[1]} image tokens: nobody would read its prompt. Make it larger, or bring it forward."
            )
    base = 1 - (1 - base_weight) * parts.sum(dim=0).clamp(max=1)
    base = torch.where((base < _NEGLIGIBLE) & parts.any(dim=0), 0, base)
    weights = torch.tensor([region.weight for region in regions], dtype=parts.dtype)[:, None] * parts
    return Shares(torch.cat([base[None], weights]).float())
