"""Coverage: the part of each image token that a region covers. Boxes and masks are area-averaged exactly on any grid."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from artaug._internal.annotations import checked
from artaug.errors import GuideError
from artaug.geometry import Box, Mask
from artaug.plan import Region


@checked
def token_weights(region: Region, grid: tuple[int, int]) -> Float[Tensor, "rows columns"]:
    """Give a region's weight on every image token: its ``weight`` times the part of the token it covers.

    Nothing is sampled: a token half inside a box gets half the weight, and a mask coarser or finer than the grid is
    averaged over each token's area. The feather is a Gaussian integrated over the tokens, the picture's edge repeated
    outwards, so a region that touches the edge stays whole there and no grid is too small.

    Args:
        region: the area, its weight and its feather.
        grid: rows and columns of image tokens.

    Returns:
        Float32, shape (rows, columns), on the CPU, values in [0, ``region.weight``].

    Raises:
        GuideError: if no token gets any weight, since the region would have no effect.

    >>> import artaug as aa
    >>> from artaug.regional import token_weights
    >>> token_weights(aa.Region(aa.Box(0, 0, 0.375, 1), "a brightly lit window", weight=2.0), (1, 4))
    tensor([[2., 1., 0., 0.]])
    """
    weights = (coverage(region, grid) * region.weight).float()
    if not weights.any():
        raise GuideError(f"{region!r} gives no weight to any of {grid[0]} x {grid[1]} image tokens. Make it larger.")
    return weights


def coverage(region: Region, grid: tuple[int, int]) -> Float[Tensor, "rows columns"]:
    """The part of each image token that a region covers, feathered: float64, shape (rows, columns), in [0, 1]."""
    # All three steps are separable: what happens along rows does not depend on columns. So each is an outer product, or
    # one matrix from the left and one from the right.
    rows, columns = grid
    covered = area_coverage(region.area, grid)
    if region.feather:
        sigma = region.feather * min(rows, columns)
        covered = _gaussian_matrix(sigma, rows) @ covered @ _gaussian_matrix(sigma, columns).T
    return covered.clamp(0, 1)


def area_coverage(area: Box | Mask, grid: tuple[int, int]) -> Float[Tensor, "rows columns"]:
    """The part of each cell of a grid that an area covers: float64, shape (rows, columns), in [0, 1]."""
    rows, columns = grid
    if isinstance(area, Mask):
        mask = torch.from_numpy(area.to_array()).double()
        return _averaging_matrix(area.height, rows) @ mask @ _averaging_matrix(area.width, columns).T
    return torch.outer(
        _interval_overlap(area.top, area.bottom, rows), _interval_overlap(area.left, area.right, columns)
    )


def _interval_overlap(start: float, end: float, count: int) -> Tensor:
    """The part of each of ``count`` tokens on an axis that lies between two relative positions: (count,)."""
    token = torch.arange(count, dtype=torch.float64)
    return ((token + 1).clamp(max=end * count) - token.clamp(min=start * count)).clamp(min=0)


def _averaging_matrix(cells: int, count: int) -> Tensor:
    """The matrix (count, cells) that averages a mask's cells over each token's length; every row sums to 1."""
    # In units of 1 / (cells * count) every edge is a whole number, so the overlaps are exact.
    token = torch.arange(count)[:, None] * cells
    cell = torch.arange(cells)[None, :] * count
    overlap = torch.minimum(token + cells, cell + count) - torch.maximum(token, cell)
    return overlap.clamp(min=0).double() / cells


def _gaussian_matrix(sigma: float, count: int) -> Tensor:
    """The matrix (count, count) of a blur by ``sigma`` tokens; what falls off an end goes to the last token there."""
    # Row i holds the integrals over each token of a Gaussian around the centre of token i: differences of its
    # cumulative distribution at the token edges. With the outer edges at infinity every row sums to 1.
    edges = torch.arange(count + 1, dtype=torch.float64) - 0.5
    edges[0], edges[-1] = -math.inf, math.inf
    centers = torch.arange(count, dtype=torch.float64)
    cumulative: Tensor = torch.special.ndtr((edges[None, :] - centers[:, None]) / sigma)
    return cumulative.diff(dim=1)
