"""How regions steer sampling: the grid of image tokens, and the guides. Pure torch, it knows no model."""

from artaug.regional.guide import Denoiser, EncodedRegion, Guide
from artaug.regional.layout import token_weights
from artaug.regional.output_mix import OutputMix

__all__ = ["Denoiser", "EncodedRegion", "Guide", "OutputMix", "token_weights"]
