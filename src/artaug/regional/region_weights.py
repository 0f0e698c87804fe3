"""Region weights: how much every prompt of a plan counts on every image token."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from artaug._internal.unique_rows import unique_rows
from artaug.errors import GuideError
from artaug.plan import Region
from artaug.regional.coverage import coverage

_NEGLIGIBLE = 1 / 256
"""A share of a token below this counts as 0, if its weight is below this part of the token's weights, too. The tail of a
feathered edge never ends: without a limit nearly every token would have a little of every region, and each region would
cost attention over the whole picture."""


@dataclass(frozen=True, eq=False)
class RegionWeights:
    """The weight of every prompt on every image token of a grid."""

    weights: Float[Tensor, "prompts tokens"]
    """Row 0 is the plan's prompt, row i the i-th region's. Float32; every token has a positive weight in its column."""

    members: Bool[Tensor, "prompts tokens"]
    """Which tokens belong to each prompt, see `Isolation`: what a region covers, however many others cover it as well."""

    @classmethod
    def of_one_token(cls, prompts: int) -> "RegionWeights":
        """Every prompt with weight 1 on a single token."""
        return cls(torch.ones(prompts, 1), torch.ones(prompts, 1, dtype=torch.bool))

    @cached_property
    def _patterns(self) -> tuple[Tensor, Tensor]:
        """The different sets of prompts that tokens are members of, (classes, prompts), and which of them each token has."""
        return unique_rows(self.members.T)

    @property
    def token_classes(self) -> Int[Tensor, " tokens"]:
        """A number from 0 for each image token, equal for tokens that are members of the same prompts."""
        return self._patterns[1]

    @property
    def num_classes(self) -> int:
        """How many token classes there are."""
        return int(self.token_classes.max()) + 1

    def class_visibility(self, image_to_image: str) -> Bool[Tensor, "classes classes"]:
        """Whether tokens of one class attend to those of another, for an `Isolation.image_to_image`."""
        # (classes, regions): without the column of the plan's prompt, which all tokens may be members of.
        regions = self._patterns[0][:, 1:].float()
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

    A token is a member of region i if c_i is at least half of its largest where p_i is not 0. Sharing decides how much a
    prompt weighs on a token, not whether it reaches the token: with p_i, none of three regions would have what all cover.

    Args:
        regions: of one picture, from back to front.
        grid: rows and columns of image tokens.
        base_weight: of the plan's prompt where regions cover all, in [0, 1].
        overlap: whether overlapping regions ``"share"`` a token or later ones lie ``"over"`` earlier ones.

    Raises:
        GuideError: if a region covers so little of every token that its prompt would have no effect. A region that lies
            under others everywhere has weight 0 on every token instead.

    >>> import artaug as aa
    >>> from artaug.regional.region_weights import split_grid
    >>> split_grid([aa.Region(aa.Box(0, 0, 0.5, 1), "ivy", weight=2.0)], (1, 4), base_weight=0.25).weights
    tensor([[0.2500, 0.2500, 1.0000, 1.0000],
            [2.0000, 2.0000, 0.0000, 0.0000]])
    """
    if not regions:
        tokens = grid[0] * grid[1]
        return RegionWeights(torch.ones(1, tokens), torch.ones(1, tokens, dtype=torch.bool))
    covered = torch.stack([coverage(region, grid).flatten() for region in regions])  # c_i: (regions, tokens)
    shares = covered
    if overlap == "over":
        # prod_{j>i} (1 - c_j) for all i at once: a cumulative product from the front, moved on by one region.
        uncovered = torch.cumprod(1 - covered.flip(0), dim=0).flip(0)
        shares = covered * torch.cat([uncovered[1:], torch.ones_like(uncovered[:1])])
    # After "over" the shares of a token add up to at most 1, so that the division only acts on "share".
    shares = shares / shares.sum(dim=0).clamp(min=1)
    strengths = torch.tensor([region.weight for region in regions], dtype=shares.dtype)[:, None]  # s_i
    total = _base_share(shares, base_weight) + (strengths * shares).sum(dim=0)
    shares = _drop_negligible(shares, strengths * shares, total)
    weights = strengths * shares
    base = _base_share(shares, base_weight)
    # A negligible rest of the plan's prompt counts as 0 too, but never on a token that no region has: a token without
    # any prompt would be a softmax over nothing.
    base = _drop_negligible(base, base, base + weights.sum(dim=0))
    for region, parts, region_weights in zip(regions, covered, weights, strict=True):
        if not region_weights.any() and (parts < _NEGLIGIBLE).all():
            raise GuideError(
                f"{region!r} covers less than {_NEGLIGIBLE:.1%} of every one of {grid[0]} x {grid[1]} image tokens: its "
                "prompt would have no effect. Enlarge the region."
            )
    return RegionWeights(
        weights=torch.cat([base[None], weights]).float(),
        members=_at_least_half(torch.cat([base[None], covered * (shares > 0)]).float()),
    )


def _base_share(shares: Tensor, base_weight: float) -> Tensor:
    """The weight of the plan's prompt, (tokens,)."""
    return 1 - (1 - base_weight) * shares.sum(dim=0).clamp(max=1)


def _drop_negligible(shares: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    """Shares with 0 for those that count as nothing, by their weights beside the ``total`` of their token."""
    # By the weight, since attention reads nothing else: 1/300 of a token at weight 100 is a quarter of what it reads. And
    # by the share, which the plan's prompt gets instead, and so that a weak region keeps the tokens that are all its own.
    negligible = (shares < _NEGLIGIBLE) & (torch.maximum(shares, weights) < _NEGLIGIBLE * total)
    return torch.where(negligible, 0, shares)


def _at_least_half(values: Tensor) -> Bool[Tensor, "prompts tokens"]:
    """Which values, (prompts, tokens), are positive and at least half of their prompt's largest."""
    largest = values.amax(dim=1, keepdim=True)
    return (values >= largest / 2) & (values > 0)
