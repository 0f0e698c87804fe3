"""How regions steer sampling: the grid of image tokens, and the guides. Pure torch, it knows no model."""

from artaug.regional.coverage import token_weights
from artaug.regional.denoiser import (
    AttentionLayer,
    AttentionSite,
    AttentiveDenoiser,
    Branches,
    Conditioning,
    Denoiser,
    EncodedPrompt,
    Span,
)
from artaug.regional.guide import EncodedRegion, Guide
from artaug.regional.isolation import BALANCED, ELIGEN, INSTANTX, INVOKEAI, OPEN, Isolation
from artaug.regional.output_mix import OutputMix
from artaug.regional.regional_attention import RegionalAttention

__all__ = [
    "BALANCED",
    "ELIGEN",
    "INSTANTX",
    "INVOKEAI",
    "OPEN",
    "AttentionLayer",
    "AttentionSite",
    "AttentiveDenoiser",
    "Branches",
    "Conditioning",
    "Denoiser",
    "EncodedPrompt",
    "EncodedRegion",
    "Guide",
    "Isolation",
    "OutputMix",
    "RegionalAttention",
    "Span",
    "token_weights",
]
