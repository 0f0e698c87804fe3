"""Losses that ask each phrase to appear somewhere: Attend-and-Excite's, and SepEn's Enhance."""

import torch
from jaxtyping import Float
from torch import Tensor

from artaug._internal.annotations import checked
from artaug.regional.attention_losses.maps import ATTEND_AND_EXCITE, Smoothing, check_grid, phrase_maps


@checked
def attend_and_excite_loss(
    maps: Float[Tensor, "batch *phrases tokens"],
    grid: tuple[int, int],
    *,
    smoothing: Smoothing | None = ATTEND_AND_EXCITE,
) -> Float[Tensor, " batch"]:
    """How far the most neglected phrase is from a full response anywhere in the picture.

    Attend-and-Excite (arXiv 2301.13826): L = max_i max(0, 1 - max_xy G(A_i)), with G a small Gaussian blur. Paper and code
    take maps of 16 x 16 tokens, averaged over layers and heads, and `sharpen` them before. The gradient acts on one phrase
    at a time. The largest value of a map is compared with 1, so maps that are small by nature, such as those of a text
    token beside a thousand image tokens in a joint softmax, have to be sharpened or scaled, or the loss is near 1 always.

    Args:
        maps: shape (batch, phrases, image tokens), or (batch, image tokens) of one phrase; values in [0, 1].
        grid: rows and columns of image tokens.
        smoothing: the blur, the published one unless given; None for none.

    Returns:
        Shape (batch,), values in [0, 1]; 0 where every phrase has the value 1 somewhere.

    Raises:
        InvalidValueError: if the maps are empty or not of this grid.

    >>> import torch
    >>> from artaug.regional.attention_losses import attend_and_excite_loss
    >>> maps = torch.tensor([[[0.9, 0.0], [0.3, 0.1]]])  # one sample, two phrases, two tokens
    >>> attend_and_excite_loss(maps, (1, 2), smoothing=None)
    tensor([0.7000])
    """
    return (1 - _peaks(phrase_maps(maps), grid, smoothing)).clamp(min=0).amax(dim=1)


@checked
def enhance_loss(
    maps: Float[Tensor, "batch phrases *heads tokens"],
    grid: tuple[int, int],
    *,
    smoothing: Smoothing | None = ATTEND_AND_EXCITE,
) -> Float[Tensor, " batch"]:
    """One minus the peak of the most neglected phrase, over heads and tokens.

    Separate-and-Enhance (arXiv 2312.06712): L_en = 1 - min_i max_{h,xy} G(M_i), without Attend-and-Excite's second softmax.
    The code keeps the heads apart, in maps of 16 x 16 tokens averaged over layers, and weighs the loss by 0.5.

    Args:
        maps: shape (batch, phrases, heads, image tokens), or without heads if they are averaged.
        grid: rows and columns of image tokens.
        smoothing: the blur, the published one unless given; None for none.

    Returns:
        Shape (batch,), values in [0, 1] for maps in [0, 1]; it may fall below 0 for maps above 1, as in the code.

    Raises:
        InvalidValueError: if the maps are empty or not of this grid.
    """
    return 1 - _peaks(phrase_maps(maps, heads=True), grid, smoothing).amin(dim=1)


def _peaks(maps: Tensor, grid: tuple[int, int], smoothing: Smoothing | None) -> Tensor:
    """The largest blurred value of each phrase, shape (batch, phrases). Equal peaks share the gradient."""
    check_grid(maps, grid)
    blurred = maps if smoothing is None else smoothing.blur(maps, grid)
    return torch.amax(blurred, dim=tuple(range(2, blurred.ndim)))
