"""Losses that ask each phrase to be in its place, a mask: ZestGuide, UDiffText, Break-A-Scene."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy

from artaug._internal.annotations import checked
from artaug.errors import InvalidValueError
from artaug.regional.attention_losses.maps import UDIFFTEXT, Smoothing, check_grid, phrase_maps, phrase_masks, ratio


@checked
def zest_loss(
    maps: Float[Tensor, "batch *phrases tokens"],
    masks: Float[Tensor, "*batch_phrases tokens"],
    *,
    power: float = 4.0,
    tolerance: float = 0.2,
    weights: Float[Tensor, " phrases"] | None = None,
) -> Float[Tensor, " batch"]:
    """How far maps are from masks, where they are far.

    ZestGuide (arXiv 2306.13754), as the authors' code for SDXL has it: the mean over phrases and tokens of
    ``abs(A - S)^power``, without gradient where the distance is below ``tolerance``. There the code has a constant; here it
    is subtracted, so that a map within the tolerance costs nothing: ``max(0, abs(A - S)^power - tolerance^power)``, with the
    same gradient. Its maps are the token-softmaxed ones of the conditional branch on 32 x 32 tokens, the tokens of a segment
    summed, the best averaged (`select_maps`). Its factor of 100 cancels in the step, which `normalize_gradient` scales.

    Args:
        maps: shape (batch, phrases, image tokens), or (batch, image tokens) of one phrase; values in [0, 1].
        masks: of the same shape, or of one sample for all; values in [0, 1], such as `region_masks`.
        power: 4 in the code; 2 is its other version.
        tolerance: 0.2 in the code; 0 for a gradient everywhere.
        weights: one of each phrase (segment), 1 unless given.

    Returns:
        Shape (batch,), values in [0, 1] for weights of 1; 0 where all maps are within the tolerance.

    Raises:
        InvalidValueError: if the shapes do not fit, ``power`` is not positive or ``tolerance`` is negative.

    >>> import torch
    >>> from artaug.regional.attention_losses import zest_loss
    >>> zest_loss(torch.tensor([[0.9, 0.6]]), torch.tensor([1.0, 0.0]))  # (0.6^4 - 0.2^4) / 2
    tensor([0.0640])
    """
    if power <= 0 or tolerance < 0:
        raise InvalidValueError(
            f"power is {power}, tolerance {tolerance}. Give a power above 0, a tolerance of 0 or more."
        )
    phrases = phrase_maps(maps)
    distance = (phrases - phrase_masks(masks, phrases, maps)).abs()
    # Raised only where it counts: |0|^power below a power of 1 has no gradient.
    far = distance > tolerance
    excess = torch.where(far, torch.where(far, distance, 1.0) ** power - tolerance**power, 0.0).mean(dim=-1)
    if weights is not None:
        if weights.shape != excess.shape[1:]:
            raise InvalidValueError(
                f"{tuple(weights.shape)} weights do not fit {excess.shape[1]} phrases. Give one of each phrase."
            )
        excess = excess * weights.to(excess)
    return excess.mean(dim=1)


@checked
def zest_bce_loss(
    maps: Float[Tensor, "batch *phrases tokens"],
    masks: Float[Tensor, "*batch_phrases tokens"],
    *,
    scale: float = 5.0,
    floor: float = 0.01,
    normalized_floor: float = 0.1,
    margin: float = 1e-3,
) -> Float[Tensor, " batch"]:
    """Binary cross-entropy of maps against masks, of the maps as they are and of each divided by its maximum.

    ZestGuide (arXiv 2306.13754), as the authors' code for Stable Diffusion 1.4 has it: the BCE of ``scale`` times the map,
    plus the BCE of the map over its maximum, which looks at its form alone. Values and masks are clipped to
    [``margin``, 1 - ``margin``]; where both a value and the mask are below the floor there is no gradient. An entropy has no
    zero: the smallest value is that of the clipped masks against themselves.

    Args:
        maps: shape (batch, phrases, image tokens), or (batch, image tokens) of one phrase; values in [0, 1].
        masks: of the same shape, or of one sample for all; values in [0, 1], such as `region_masks`.
        scale: of the map in the first term; 5 in the code.
        floor: of the first term, of the scaled map; 0.01 in the code.
        normalized_floor: of the second term; 0.1 in the code.
        margin: 1e-3 in the code.

    Returns:
        Shape (batch,): the mean over phrases and tokens, values of 0 or more.

    Raises:
        InvalidValueError: if the shapes do not fit, or ``margin`` is not in (0, 1/2).
    """
    if not 0 < margin < 0.5:
        raise InvalidValueError(f"margin is {margin}. Give a number between 0 and 1/2, such as 1e-3.")
    phrases = phrase_maps(maps)
    segments = phrase_masks(masks, phrases, maps)
    target = segments.clamp(margin, 1 - margin)

    def entropy(values: Tensor, least: float) -> Tensor:
        counted = torch.where((values > least) | (segments > least), values, 0.0)
        clipped = counted.clamp(margin, 1 - margin)
        return binary_cross_entropy(clipped, target, reduction="none").mean(dim=(1, 2))

    scaled = scale * phrases
    # 1e-4 as in the code, where it keeps a map of zeros from 0/0.
    normalized = scaled / (scaled.amax(dim=-1, keepdim=True) + 1e-4)
    return entropy(scaled, floor) + entropy(normalized, normalized_floor)


@checked
def local_attention_loss(
    maps: Float[Tensor, "batch *phrases tokens"],
    masks: Float[Tensor, "*batch_phrases tokens"],
    grid: tuple[int, int],
    *,
    smoothing: Smoothing | None = UDIFFTEXT,
) -> Float[Tensor, " batch"]:
    """How much stronger each phrase is outside its mask than inside, at their peaks.

    UDiffText (arXiv 2312.04884), in training (the authors' code): the mean over characters of
    max(G(A) (1 - S)) - max(G(A) S), on maps of 16 x 16 tokens or more averaged over heads, then over layers; its weight
    beside the denoising loss is 0.01.

    Args:
        maps: shape (batch, phrases, image tokens), or (batch, image tokens) of one phrase; values in [0, 1].
        masks: of the same shape, or of one sample for all; values in [0, 1], such as `region_masks`.
        grid: rows and columns of image tokens.
        smoothing: the blur, the published one unless given; None for none.

    Returns:
        Shape (batch,), values in [-1, 1]; below 0 where phrases are stronger inside.

    Raises:
        InvalidValueError: if the shapes do not fit.
    """
    inside, outside = _peaks_by_side(maps, masks, grid, smoothing)
    return (outside - inside).mean(dim=1)


@checked
def weakest_local_loss(
    maps: Float[Tensor, "batch *phrases tokens"],
    masks: Float[Tensor, "*batch_phrases tokens"],
    grid: tuple[int, int],
    *,
    smoothing: Smoothing | None = UDIFFTEXT,
) -> Float[Tensor, " batch"]:
    """Minus the peak inside its mask of the phrase that is weakest there.

    UDiffText (arXiv 2312.04884), at test time (the authors' code): -min_i max(G(A_i) S), descended as in Attend-and-Excite.
    There all characters share one mask, the text's box.

    Args:
        maps: shape (batch, phrases, image tokens), or (batch, image tokens) of one phrase; values in [0, 1].
        masks: of the same shape, or of one sample for all; values in [0, 1], such as `region_masks`.
        grid: rows and columns of image tokens.
        smoothing: the blur, the published one unless given; None for none.

    Returns:
        Shape (batch,), values in [-1, 0].

    Raises:
        InvalidValueError: if the shapes do not fit.
    """
    inside, _ = _peaks_by_side(maps, masks, grid, smoothing)
    return -inside.amin(dim=1)


@checked
def mask_matching_loss(
    maps: Float[Tensor, "batch *phrases tokens"], masks: Float[Tensor, "*batch_phrases tokens"]
) -> Float[Tensor, " batch"]:
    """Squared distance of each map, divided by its maximum, from its mask.

    Break-A-Scene (arXiv 2305.16311; the authors' code): the sum over concepts of MSE(S, A / max A), on maps of 16 x 16 tokens
    averaged over layers and heads; its weight beside the denoising loss is 0.01.

    Args:
        maps: shape (batch, phrases, image tokens), or (batch, image tokens) of one phrase.
        masks: of the same shape, or of one sample for all; values in [0, 1], such as `region_masks`.

    Returns:
        Shape (batch,), values in [0, 1] for each phrase; 0 where every map is a multiple of its mask.

    Raises:
        InvalidValueError: if the shapes do not fit.

    >>> import torch
    >>> from artaug.regional.attention_losses import mask_matching_loss
    >>> mask_matching_loss(torch.tensor([[0.4, 0.2]]), torch.tensor([1.0, 0.0]))  # (0 + 0.5^2) / 2
    tensor([0.1250])
    """
    phrases = phrase_maps(maps)
    normalized = ratio(phrases, phrases.amax(dim=-1, keepdim=True))
    return (normalized - phrase_masks(masks, phrases, maps)).square().mean(dim=-1).sum(dim=1)


def _peaks_by_side(
    maps: Tensor, masks: Tensor, grid: tuple[int, int], smoothing: Smoothing | None
) -> tuple[Tensor, Tensor]:
    """The largest blurred value of each phrase inside its mask, and outside it: each (batch, phrases)."""
    phrases = phrase_maps(maps)
    check_grid(phrases, grid)
    places = phrase_masks(masks, phrases, maps)
    blurred = phrases if smoothing is None else smoothing.blur(phrases, grid)
    return (blurred * places).amax(dim=-1), (blurred * (1 - places)).amax(dim=-1)
