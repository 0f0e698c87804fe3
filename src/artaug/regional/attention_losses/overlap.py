"""Losses that keep phrases apart, and where they were: SepEn's Separate, A-STAR's segregation and retention."""

import torch
from jaxtyping import Float
from torch import Tensor

from artaug._internal.annotations import checked
from artaug.errors import InvalidValueError
from artaug.regional.attention_losses.maps import phrase_maps, phrase_masks, ratio


@checked
def separate_loss(maps: Float[Tensor, "batch phrases *heads tokens"]) -> Float[Tensor, " batch"]:
    """The worst overlap of phrases, over heads and tokens.

    Separate-and-Enhance (arXiv 2312.06712): L_sep = max_{h,xy} ( prod_i M_i / sum_i M_i ). The code has two phrases only;
    for more, this is the same formula, and since maps are below 1 the product counts tokens that all of them claim. For
    every pair of several phrases, take the maximum over `separate_loss` of pairs, or `segregation_loss`. Where no phrase has
    any attention, which is 0/0 in the code, the overlap is 0.

    Args:
        maps: shape (batch, phrases, heads, image tokens), or without heads if they are averaged; two phrases or more.

    Returns:
        Shape (batch,), values in [0, 1/2] for two maps in [0, 1]; 0 where no token has attention to all phrases.

    Raises:
        InvalidValueError: if the maps are empty, or of one phrase.

    >>> import torch
    >>> from artaug.regional.attention_losses import separate_loss
    >>> separate_loss(torch.tensor([[[0.6, 0.0], [0.3, 0.5]]]))  # 0.18 / 0.9 at the first token
    tensor([0.2000])
    """
    maps = _several(phrase_maps(maps, heads=True))
    return ratio(maps.prod(dim=1), maps.sum(dim=1)).amax(dim=(1, 2))


@checked
def segregation_loss(maps: Float[Tensor, "batch phrases tokens"]) -> Float[Tensor, " batch"]:
    """The overlap of phrases, summed over their pairs.

    A-STAR (arXiv 2306.14544, equation 2): L_seg = sum_{m>n} sum_ij min(A_m, A_n) / sum_ij (A_m + A_n), on maps of 16 x 16
    tokens. Maps that are equal overlap by 1/2.

    Args:
        maps: shape (batch, phrases, image tokens), two phrases or more.

    Returns:
        Shape (batch,), values in [0, 1/2] for each pair, so at most p (p - 1) / 4 for p phrases.

    Raises:
        InvalidValueError: if the maps are empty, or of one phrase.

    >>> import torch
    >>> from artaug.regional.attention_losses import segregation_loss
    >>> segregation_loss(torch.tensor([[[0.6, 0.0], [0.3, 0.5]]]))  # 0.3 / 1.4
    tensor([0.2143])
    """
    maps = _several(phrase_maps(maps))
    first, second = torch.combinations(torch.arange(maps.shape[1], device=maps.device)).T
    return _overlap(maps[:, first], maps[:, second]).sum(dim=1)


@checked
def retention_loss(
    maps: Float[Tensor, "batch *phrases tokens"], previous_masks: Float[Tensor, "*batch_phrases tokens"]
) -> Float[Tensor, " batch"]:
    """How little of each phrase's place in the step before is left.

    A-STAR (arXiv 2306.14544, equation 3): L_ret = sum_m [ 1 - sum_ij min(A_m, B_m) / sum_ij (A_m + B_m) ], with A the maps
    of this step and B the binary masks of the step before (`high_activation_masks`). The fraction is at most 1/2, so a
    phrase's share never falls below 1/2. With masks that a user gives instead, it is a control of the layout.

    Args:
        maps: shape (batch, phrases, image tokens), or (batch, image tokens) of one phrase.
        previous_masks: of the same shape, or of one sample for all; values in [0, 1].

    Returns:
        Shape (batch,), values in [1/2, 1] for each phrase.

    Raises:
        InvalidValueError: if the maps are empty or the masks do not fit them.

    >>> import torch
    >>> from artaug.regional.attention_losses import retention_loss
    >>> retention_loss(torch.tensor([[0.6, 0.2]]), torch.tensor([1.0, 0.0]))  # 1 - 0.6 / 1.8
    tensor([0.6667])
    """
    phrases = phrase_maps(maps)
    return (1 - _overlap(phrases, phrase_masks(previous_masks, phrases, maps))).sum(dim=1)


def _overlap(first: Tensor, second: Tensor) -> Tensor:
    """Their minimum over their sum, each summed over tokens: (batch, phrases), in [0, 1/2]."""
    return ratio(torch.minimum(first, second).sum(dim=-1), (first + second).sum(dim=-1))


def _several(maps: Tensor) -> Tensor:
    """The maps, if they are of two phrases or more."""
    if maps.shape[1] < 2:
        raise InvalidValueError(
            "One phrase cannot be kept apart from others. Give maps of two phrases or more, shape (batch, phrases, tokens)."
        )
    return maps
