"""How regions steer sampling: the grid of image tokens, and the guides. Pure torch, it knows no model."""

from artaug.regional.coverage import token_weights
from artaug.regional.denoiser import (
    AttentionLayer,
    AttentiveDenoiser,
    Branches,
    Conditioning,
    Denoiser,
    Site,
    Span,
    Text,
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
    "AttentiveDenoiser",
    "Branches",
    "Conditioning",
    "Denoiser",
    "EncodedRegion",
    "Guide",
    "Isolation",
    "OutputMix",
    "RegionalAttention",
    "Site",
    "Span",
    "Text",
    "token_weights",
]
