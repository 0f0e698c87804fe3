"""Losses of attention maps: pure functions, which guides descend at inference and objectives in training.

A map says how much each image token attends to a phrase of the prompt. Maps have the shape (batch, phrases, image tokens),
row by row of the token grid, or (batch, image tokens) of one phrase; where a paper keeps heads apart, (batch, phrases, heads,
image tokens). Which text tokens a phrase has, which layers are averaged and whether the text's start, end and padding count
is decided by what makes the maps.

A loss has one value for each sample, shape (batch,). Sum them before the backward pass: a maximum or a mean over the batch
would let one picture change another's. Half precision is computed in float32.
"""

from artaug.regional.attention_losses.boxes import box_constraint_loss, box_coverage_loss
from artaug.regional.attention_losses.maps import (
    Smoothing,
    high_activation_masks,
    region_masks,
    select_maps,
    sharpen,
)
from artaug.regional.attention_losses.overlap import retention_loss, segregation_loss, separate_loss
from artaug.regional.attention_losses.places import (
    local_attention_loss,
    mask_matching_loss,
    weakest_local_loss,
    zest_bce_loss,
    zest_loss,
)
from artaug.regional.attention_losses.presence import attend_and_excite_loss, enhance_loss
from artaug.regional.attention_losses.steps import normalize_gradient

__all__ = [
    "Smoothing",
    "attend_and_excite_loss",
    "box_constraint_loss",
    "box_coverage_loss",
    "enhance_loss",
    "high_activation_masks",
    "local_attention_loss",
    "mask_matching_loss",
    "normalize_gradient",
    "region_masks",
    "retention_loss",
    "segregation_loss",
    "select_maps",
    "separate_loss",
    "sharpen",
    "weakest_local_loss",
    "zest_bce_loss",
    "zest_loss",
]
