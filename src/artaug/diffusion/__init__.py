"""Drawing and training with diffusers: the synthesizer, a folder for each model family, and estimates of a training."""

from artaug.diffusion.checking import check_family
from artaug.diffusion.editing import EditingSynthesizer, measure_shift
from artaug.diffusion.estimation.estimate import estimate
from artaug.diffusion.estimation.report import Estimate
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.chroma.family import Chroma1
from artaug.diffusion.families.flux.family import Flux, FluxKontext
from artaug.diffusion.families.flux2.family import Flux2, Flux2Klein
from artaug.diffusion.families.qwen_image.family import QwenImage, QwenImageEdit
from artaug.diffusion.families.sd3.family import StableDiffusion3
from artaug.diffusion.families.tokenized import TokenizedPrompt, tokenize_chat, tokenize_prompt
from artaug.diffusion.families.unet.family import StableDiffusion, StableDiffusionXL
from artaug.diffusion.families.z_image.family import ZImage
from artaug.diffusion.synthesizer import ActiveLoRA, DiffusersSynthesizer
from artaug.diffusion.verification import verify_export
from artaug.tokens import InstalledTokens

__all__ = [
    "ActiveLoRA",
    "Chroma1",
    "DiffusersSynthesizer",
    "EditingSynthesizer",
    "Estimate",
    "Family",
    "Flux",
    "Flux2",
    "Flux2Klein",
    "FluxKontext",
    "InstalledTokens",
    "QwenImage",
    "QwenImageEdit",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "TokenizedPrompt",
    "ZImage",
    "check_family",
    "estimate",
    "measure_shift",
    "tokenize_chat",
    "tokenize_prompt",
    "verify_export",
]
