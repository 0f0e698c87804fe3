"""Losses that ask each phrase to be in its box: layout guidance's coverage, BoxDiff's constraints."""

import torch
from jaxtyping import Float
from torch import Tensor

from artaug._internal.annotations import checked
from artaug.errors import InvalidValueError
from artaug.regional.attention_losses.maps import (
    ATTEND_AND_EXCITE,
    Smoothing,
    check_grid,
    phrase_maps,
    phrase_masks,
    ratio,
)


@checked
def box_coverage_loss(
    maps: Float[Tensor, "batch *phrases tokens"], masks: Float[Tensor, "*batch_phrases tokens"]
) -> Float[Tensor, " batch"]:
    """The part of each phrase's attention that is outside its box, squared.

    Layout guidance (arXiv 2304.03373; backward guidance in the authors' code): the mean over phrases of
    (1 - sum_{xy in B} A / sum_xy A)^2. It does not change if a map is scaled, so it needs no normaliser on any backbone.
    There the loss is averaged over the layers of the mid block and the first up block, each on its own grid.

    Args:
        maps: shape (batch, phrases, image tokens), or (batch, image tokens) of one phrase.
        masks: of the same shape, or of one sample for all; 1 inside the box, such as `region_masks`.

    Returns:
        Shape (batch,), values in [0, 1]; 0 where all attention is inside, 1 where none is, or none is anywhere.

    Raises:
        InvalidValueError: if the shapes do not fit.

    >>> import torch
    >>> from artaug.regional.attention_losses import box_coverage_loss
    >>> box_coverage_loss(torch.tensor([[0.3, 0.1]]), torch.tensor([1.0, 0.0]))  # (1 - 3/4)^2
    tensor([0.0625])
    """
    phrases = phrase_maps(maps)
    inside = (phrases * phrase_masks(masks, phrases, maps)).sum(dim=-1)
    return (1 - ratio(inside, phrases.sum(dim=-1))).square().mean(dim=1)


@checked
def box_constraint_loss(
    maps: Float[Tensor, "batch *phrases tokens"],
    masks: Float[Tensor, "*batch_phrases tokens"],
    grid: tuple[int, int],
    *,
    fraction: float = 0.8,
    corner_tokens: int = 6,
    smoothing: Smoothing | None = ATTEND_AND_EXCITE,
) -> Float[Tensor, " batch"]:
    """BoxDiff's three constraints: strong inside the box, weak outside, and as wide and as high as the box.

    BoxDiff (arXiv 2307.10816; the authors' code), summed over phrases: 1 - the mean of the strongest ``fraction`` of the
    tokens inside (of as many as the box has, times the fraction), plus the mean of the strongest fraction of those outside,
    plus, along each axis and within ``corner_tokens`` of the box's two edges, the distance of the map's projection
    (its maximum over the other axis) from the box's, averaged over the axis. Maps are those of Attend-and-Excite, sharpened.

    Args:
        maps: shape (batch, phrases, image tokens), or (batch, image tokens) of one phrase; values in [0, 1].
        masks: of the same shape, or of one sample for all. A token half covered or more is inside.
        grid: rows and columns of image tokens.
        fraction: 0.8 in the code.
        corner_tokens: 6 in the code, of 16 x 16 tokens.
        smoothing: the blur, the published one unless given; None for none.

    Returns:
        Shape (batch,), values in [0, 4] for each phrase; 0 where every map is its box.

    Raises:
        InvalidValueError: if the shapes do not fit, an argument is out of range, or a box or its outside has no tokens.
    """
    if not 0 < fraction <= 1 or corner_tokens < 0:
        raise InvalidValueError(f"fraction is {fraction}, corner_tokens {corner_tokens}. Give (0, 1], and 0 or more.")
    phrases = phrase_maps(maps)
    check_grid(phrases, grid)
    inside = (phrase_masks(masks, phrases, maps) >= 0.5).to(phrases)
    blurred = phrases if smoothing is None else smoothing.blur(phrases, grid)
    inner = (1 - _strongest(blurred, inside, fraction)).clamp(min=0)
    outer = _strongest(blurred, 1 - inside, fraction)
    pictures, boxes = blurred.unflatten(-1, grid), inside.unflatten(-1, grid)
    corners = sum(_edge_distance(pictures.amax(dim=axis), boxes.amax(dim=axis), corner_tokens) for axis in (-2, -1))
    return (inner + outer + corners).sum(dim=1)


def _strongest(maps: Tensor, where: Tensor, fraction: float) -> Tensor:
    """The mean of the largest values of maps within a place, a fraction of its tokens: (batch, phrases)."""
    counts = (where.sum(dim=-1) * fraction).long()
    if (counts < 1).any():
        raise InvalidValueError(
            f"A box, or what is outside it, has fewer than {1 / fraction:g} of {maps.shape[-1]} image tokens. "
            "Give boxes of several tokens that leave some outside, or use box_coverage_loss."
        )
    ordered = (maps * where).sort(dim=-1, descending=True).values
    rank = torch.arange(maps.shape[-1], device=maps.device)
    return torch.where(rank < counts[..., None], ordered, 0.0).sum(dim=-1) / counts


def _edge_distance(projection: Tensor, box: Tensor, reach: int) -> Tensor:
    """The mean over an axis of |projection - box|, counted near the edges of the box: (batch, phrases)."""
    position = torch.arange(box.shape[-1], device=box.device)
    inside = box > 0
    # The two edges, as the code counts them: the first token inside, and the first one after the last inside.
    start = torch.where(inside, position, box.shape[-1]).amin(dim=-1, keepdim=True)
    stop = torch.where(inside, position, -1).amax(dim=-1, keepdim=True) + 1
    near = ((position - start).abs() <= reach) | ((position - stop).abs() <= reach)
    return torch.where(near, (projection - box).abs(), 0.0).mean(dim=-1)
