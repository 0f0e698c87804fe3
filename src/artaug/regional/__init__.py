"""What acts on a model while it samples: regions, attention, the guides. Pure torch, it knows no model."""

from artaug.regional.attention_layers import Attended, AttentionComputer, AttentionLayers
from artaug.regional.attention_probe import AttentionMaps, AttentionProbe, LayerMaps
from artaug.regional.bias import Bias
from artaug.regional.coverage import token_weights
from artaug.regional.denoiser import (
    AttentionFn,
    AttentionLayer,
    AttentionSite,
    AttentiveDenoiser,
    Branches,
    Conditioning,
    Denoiser,
    EncodedPrompt,
    Span,
)
from artaug.regional.guide import Guide, Together
from artaug.regional.guided_run import DenoiserCall, EncodedPlan, EncodedRegion, GuidedRun
from artaug.regional.isolation import BALANCED, ELIGEN, INSTANTX, INVOKEAI, OPEN, Isolation
from artaug.regional.latent_guide import LatentGuide, LatentStep, Predict
from artaug.regional.output_mix import OutputMix
from artaug.regional.regional_attention import RegionalAttention

__all__ = [
    "BALANCED",
    "ELIGEN",
    "INSTANTX",
    "INVOKEAI",
    "OPEN",
    "Attended",
    "AttentionComputer",
    "AttentionFn",
    "AttentionLayer",
    "AttentionLayers",
    "AttentionMaps",
    "AttentionProbe",
    "AttentionSite",
    "AttentiveDenoiser",
    "Bias",
    "Branches",
    "Conditioning",
    "Denoiser",
    "DenoiserCall",
    "EncodedPlan",
    "EncodedPrompt",
    "EncodedRegion",
    "Guide",
    "GuidedRun",
    "Isolation",
    "LatentGuide",
    "LatentStep",
    "LayerMaps",
    "OutputMix",
    "Predict",
    "RegionalAttention",
    "Span",
    "Together",
    "token_weights",
]
