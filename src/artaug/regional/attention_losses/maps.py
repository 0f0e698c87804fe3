"""Attention maps of phrases: how they are checked, smoothed, sharpened, selected and turned into masks."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import conv2d, pad

from artaug._internal.annotations import checked
from artaug._internal.values import value
from artaug.errors import InvalidValueError
from artaug.plan import Region
from artaug.regional.coverage import coverage


@value
class Smoothing:
    """A Gaussian of few tokens, by which a map is blurred before its maximum is taken.

    One token that stands out by chance is no object: blurred, a maximum belongs to a token and its neighbours
    (Attend-and-Excite, arXiv 2301.13826). The defaults are the published ones.

    Raises:
        InvalidValueError: if a number is out of range, or ``size`` is even.

    >>> import torch
    >>> from artaug.regional.attention_losses import Smoothing
    >>> dot = torch.zeros(1, 1, 25)
    >>> dot[..., 12] = 1
    >>> Smoothing().blur(dot, (5, 5)).reshape(5, 5)[2]
    tensor([0.0000, 0.1221, 0.3319, 0.1221, 0.0000])
    """

    sigma_tokens: Annotated[float, Field(gt=0, allow_inf_nan=False)] = math.sqrt(0.5)
    """The Gaussian's standard deviation, in tokens. Attend-and-Excite and SepEn write ``sigma=0.5``, but their kernel is
    exp(-(d / 2 sigma)^2), which is that of a standard deviation of sigma sqrt(2), the default here. UDiffText's 0.5 is a
    standard deviation."""
    size: Annotated[int, Field(ge=1)] = 3
    """Tokens on a side of the kernel, an odd number; its values are scaled to sum to 1."""
    edge: Literal["reflect", "zeros"] = "reflect"
    """What lies outside the picture: the map reflected, or nothing (UDiffText), which weakens maxima at the edge."""

    def __post_init__(self) -> None:
        if self.size % 2 == 0:
            raise InvalidValueError(
                f"Smoothing(size={self.size}) has no middle. Give an odd number of tokens, such as 3."
            )

    def blur(self, maps: Float[Tensor, "*leading tokens"], grid: tuple[int, int]) -> Float[Tensor, "*leading tokens"]:
        """Blur each map.

        Args:
            maps: shape (..., image tokens), row by row of the grid.
            grid: rows and columns of image tokens.

        Raises:
            InvalidValueError: if the maps are not of this grid, or the grid is too small to be reflected.
        """
        check_grid(maps, grid)
        reach = self.size // 2
        if self.edge == "reflect" and reach >= min(grid):
            raise InvalidValueError(
                f"A kernel of {self.size} tokens reflects {reach}, which {grid[0]} x {grid[1]} tokens do not have. "
                'Take a smaller size, edge="zeros", or no smoothing.'
            )
        offsets = torch.arange(-reach, reach + 1, dtype=maps.dtype, device=maps.device)
        profile = torch.exp(-offsets.square() / (2 * self.sigma_tokens**2))
        kernel = torch.outer(profile, profile) / profile.sum() ** 2
        pictures = pad(
            maps.reshape(-1, 1, *grid), (reach,) * 4, mode="reflect" if self.edge == "reflect" else "constant"
        )
        blurred: Tensor = conv2d(pictures, kernel[None, None])
        return blurred.reshape(maps.shape)


ATTEND_AND_EXCITE = Smoothing()
UDIFFTEXT = Smoothing(sigma_tokens=0.5, edge="zeros")


@checked
def sharpen(
    token_maps: Float[Tensor, "batch text_tokens tokens"], *, scale: float = 100.0
) -> Float[Tensor, "batch text_tokens tokens"]:
    """Let text tokens compete for each image token: softmax over text tokens of ``scale`` times their maps.

    Attend-and-Excite (the authors' code) does so to maps that are attention probabilities already, once it has cut off the
    tokens that mean nothing: the start of the text, and, for Stable Diffusion 2.1, all from its end on. Cut them off before;
    for Stable Diffusion 1 the code keeps the padding. Select the tokens of interest after it: ``sharpen(maps)[:, positions]``.

    Args:
        token_maps: one map for each text token, shape (batch, text tokens, image tokens).
        scale: 100 in the code; larger is nearer to the strongest token alone.

    >>> import torch
    >>> from artaug.regional.attention_losses import sharpen
    >>> sharpen(torch.tensor([[[0.03], [0.01]]])).flatten()
    tensor([0.8808, 0.1192])
    """
    return torch.softmax(scale * at_least_float32(token_maps), dim=1)


@checked
def select_maps(
    maps: Float[Tensor, "batch phrases layers tokens"], *, count: int = 20, quantile: float = 0.99
) -> Float[Tensor, "batch phrases tokens"]:
    """Average the maps of a phrase that tell most, of all its layers and heads.

    ZestGuide for SDXL (the authors' code): few maps of a large model carry meaning, and those have high tops and low
    bottoms. Each is scored by q (1 - p), its upper and its lower quantile, and the best ``count`` are averaged.

    Args:
        maps: those of all layers and heads, resized to one grid, shape (batch, phrases, layers x heads, image tokens).
        count: how many are averaged, at most all; 20 in the code.
        quantile: the upper quantile; the lower one is 1 - ``quantile``.

    Raises:
        InvalidValueError: if ``count`` or ``quantile`` is out of range.
    """
    if count < 1 or not 0.5 <= quantile <= 1:
        raise InvalidValueError(f"count is {count}, quantile {quantile}. Give 1 or more, and a quantile in [0.5, 1].")
    maps = at_least_float32(maps)
    # As torch.quantile, which refuses more than 16 million values: the maps of one picture by a large model.
    ordered = maps.detach().sort(dim=-1).values
    upper, lower = (_at(ordered, share * (maps.shape[-1] - 1)) for share in (quantile, 1 - quantile))
    best = (upper * (1 - lower)).topk(min(count, maps.shape[2]), dim=2).indices
    return torch.take_along_dim(maps, best[..., None], dim=2).mean(dim=2)


def _at(ordered: Tensor, place: float) -> Tensor:
    """Values between two places of the last axis, linearly."""
    before = math.floor(place)
    after = min(before + 1, ordered.shape[-1] - 1)
    return torch.lerp(ordered[..., before], ordered[..., after], place - before)


@checked
def high_activation_masks(
    maps: Float[Tensor, "batch *phrases tokens"], *, threshold: float = 0.5
) -> Float[Tensor, "batch *phrases tokens"]:
    """Mark the tokens where a phrase is strong: 1 where its map is at least ``threshold`` times its maximum, else 0.

    They are what `retention_loss` wants the next step to keep (A-STAR, arXiv 2306.14544, section 3.4). The paper does not
    give its threshold; half the maximum is ours. The masks carry no gradient.

    Raises:
        InvalidValueError: if ``threshold`` is not in (0, 1].

    >>> import torch
    >>> from artaug.regional.attention_losses import high_activation_masks
    >>> high_activation_masks(torch.tensor([[0.1, 0.4, 0.2]]))
    tensor([[0., 1., 1.]])
    """
    if not 0 < threshold <= 1:
        raise InvalidValueError(f"threshold is {threshold}. Give a part of each map's maximum, in (0, 1].")
    maps = at_least_float32(maps.detach())
    tops = maps.amax(dim=-1, keepdim=True)
    strong: Bool[Tensor, "batch *phrases tokens"] = (maps >= threshold * tops) & (tops > 0)
    return strong.to(maps.dtype)


@checked
def region_masks(regions: Sequence[Region], grid: tuple[int, int]) -> Float[Tensor, "regions tokens"]:
    """Give the part of each image token that each region covers, as the losses of masks and boxes take it.

    Args:
        regions: their areas and feathers count, not their weights.
        grid: rows and columns of image tokens.

    Returns:
        Float32, shape (regions, image tokens), on the CPU, values in [0, 1].

    Raises:
        InvalidValueError: if there are no regions.

    >>> import artaug as aa
    >>> from artaug.regional.attention_losses import region_masks
    >>> region_masks([aa.Region(aa.Box(0, 0, 0.375, 1), "a window")], (1, 4))
    tensor([[1.0000, 0.5000, 0.0000, 0.0000]])
    """
    if not regions:
        raise InvalidValueError("There are no regions to make masks of. Give one for each phrase.")
    return torch.stack([coverage(region, grid).flatten() for region in regions]).float()


def at_least_float32(maps: Tensor) -> Tensor:
    """Maps in which a sum over thousands of tokens is exact enough: half precision becomes float32."""
    return maps.to(torch.promote_types(maps.dtype, torch.float32))


def phrase_maps(maps: Tensor, *, heads: bool = False) -> Tensor:
    """Maps as (batch, phrases, tokens), or (batch, phrases, heads, tokens) if ``heads``, in float32 or better.

    Raises:
        InvalidValueError: if they have another number of axes, or one of no length.
    """
    wanted = 3 + heads
    if not 2 <= maps.ndim <= wanted or not maps.numel():
        axes = "(batch, tokens), (batch, phrases, tokens)" + " or (batch, phrases, heads, tokens)" * heads
        raise InvalidValueError(f"Attention maps have the shape {tuple(maps.shape)}. Give {axes}, none of them empty.")
    maps = at_least_float32(maps)
    if maps.ndim == 2:
        maps = maps[:, None]
    return maps[:, :, None] if maps.ndim < wanted else maps


def phrase_masks(masks: Tensor, maps: Tensor, given: Tensor) -> Tensor:
    """Masks with the shape of ``maps``, which `phrase_maps` made of ``given``.

    Raises:
        InvalidValueError: if they have neither the shape of ``given`` nor that of one of its samples.
    """
    if masks.shape not in {given.shape, given.shape[1:]}:
        raise InvalidValueError(
            f"Masks of shape {tuple(masks.shape)} do not fit attention maps of shape {tuple(given.shape)}. "
            f"Give {tuple(given.shape)}, or {tuple(given.shape[1:])} for all samples."
        )
    return masks.to(maps).expand(given.shape).reshape(maps.shape)


def check_grid(maps: Tensor, grid: tuple[int, int]) -> None:
    """Refuse maps that have not one number for each token of the grid.

    Raises:
        InvalidValueError: naming both.
    """
    rows, columns = grid
    if maps.shape[-1] != rows * columns:
        raise InvalidValueError(
            f"Attention maps of {maps.shape[-1]} tokens are not of a grid of {rows} x {columns}. Give its rows and columns."
        )


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """The quotient, and 0 where the whole is 0, with a finite gradient there."""
    return part / torch.where(whole > 0, whole, 1.0)
