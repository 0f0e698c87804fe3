"""Region weights: how much every prompt of a plan counts on every image token."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from artaug.errors import GuideError
from artaug.plan import Region
from artaug.regional.coverage import coverage

_NEGLIGIBLE_SHARE = 1 / 256
"""Shares of a token below this count as 0. The tail of a feathered edge never ends: without a limit nearly every token
would have a little of every region, and each region would cost attention over the whole picture."""


@dataclass(frozen=True, eq=False)
class RegionWeights:
    """The weight of every prompt on every image token of a grid."""

    weights: Float[Tensor, "prompts tokens"]
    """Row 0 is the plan's prompt, row i the i-th region's. Float32; every token has a positive weight in its column."""

    @property
    def members(self) -> Bool[Tensor, "prompts tokens"]:
        """Which tokens belong to each prompt: those with a positive weight of at least half the prompt's largest."""
        largest = self.weights.amax(dim=1, keepdim=True)
        members: Tensor = (self.weights >= largest / 2) & (self.weights > 0)
        return members

    @cached_property
    def token_classes(self) -> Int[Tensor, " tokens"]:
        """A number from 0 for each image token, equal for tokens that are members of the same prompts."""
        classes: Tensor = torch.unique(self.members.T, dim=0, return_inverse=True)[1]
        return classes

    @property
    def num_classes(self) -> int:
        """How many token classes there are."""
        return int(self.token_classes.max()) + 1

    def class_visibility(self, image_to_image: str) -> Bool[Tensor, "classes classes"]:
        """Whether tokens of one class attend to those of another, for an `Isolation.image_to_image`."""
        # (classes, regions): without the column of the plan's prompt, which all tokens may be members of.
        regions = torch.unique(self.members.T, dim=0)[:, 1:].float()
        background = regions.sum(dim=1) == 0
        visible: Tensor = (regions @ regions.T > 0) | (background[:, None] & background)
        if image_to_image == "background":
            visible = visible | background[:, None] | background
        return visible


def split_grid(
    regions: Sequence[Region],
    grid: tuple[int, int],
    *,
    base_weight: float,
    overlap: Literal["share", "over"] = "share",
) -> RegionWeights:
    """Split a grid of image tokens between a plan's prompt and its regions.

    Region i covers the part c_i of a token (feathered). Where regions overlap, its share of the token is either
    ``p_i = c_i / max(1, sum_j c_j)``, or, if later regions lie over earlier ones, ``p_i = c_i prod_{j>i} (1 - c_j)``.
    Its prompt weighs ``s_i p_i``, with s_i the region's weight; the plan's prompt weighs
    ``1 - (1 - base_weight) min(1, sum_i p_i)``.

    Args:
        regions: of one picture, from back to front.
        grid: rows and columns of image tokens.
        base_weight: of the plan's prompt where regions cover all, in [0, 1].
        overlap: whether overlapping regions ``"share"`` a token or later ones lie ``"over"`` earlier ones.

    Raises:
        GuideError: if a region gets no share of any token, since its prompt would have no effect.

    >>> import artaug as aa
    >>> from artaug.regional.region_weights import split_grid
    >>> split_grid([aa.Region(aa.Box(0, 0, 0.5, 1), "ivy", weight=2.0)], (1, 4), base_weight=0.25).weights
    tensor([[0.2500, 0.2500, 1.0000, 1.0000],
            [2.0000, 2.0000, 0.0000, 0.0000]])
    """
    if not regions:
        return RegionWeights(torch.ones(1, grid[0] * grid[1]))
    shares = torch.stack([coverage(region, grid).flatten() for region in regions])  # c_i: (regions, tokens)
    if overlap == "over":
        # prod_{j>i} (1 - c_j) for all i at once: a cumulative product from the front, moved on by one region.
        uncovered = torch.cumprod(1 - shares.flip(0), dim=0).flip(0)
        shares = shares * torch.cat([uncovered[1:], torch.ones_like(uncovered[:1])])
    # After "over" the shares of a token add up to at most 1, so that the division only acts on "share".
    shares = torch.where(shares < _NEGLIGIBLE_SHARE, 0, shares / shares.sum(dim=0).clamp(min=1))
    for region, share in zip(regions, shares, strict=True):
        if not share.any():
            raise GuideError(
                f"{region!r} lies under other regions everywhere, or covers less than {_NEGLIGIBLE_SHARE:.1%} of every "
                f"one of {grid[0]} x {grid[1]} image tokens: its prompt would have no effect. Enlarge the region, or "
                "move it later in the list."
            )
    base = 1 - (1 - base_weight) * shares.sum(dim=0).clamp(max=1)
    # A negligible rest of the plan's prompt counts as 0 too, but never on a token that no region has: a token without
    # any prompt would be a softmax over nothing.
    base = torch.where((base < _NEGLIGIBLE_SHARE) & shares.any(dim=0), 0, base)
    weights = torch.tensor([region.weight for region in regions], dtype=shares.dtype)[:, None] * shares
    return RegionWeights(torch.cat([base[None], weights]).float())
