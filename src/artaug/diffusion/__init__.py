"""Drawing and training with diffusers: one synthesizer, and one short file a model family. Only here: diffusers."""

from artaug.diffusion.checking import check_family
from artaug.diffusion.estimates import Estimate
from artaug.diffusion.estimating import estimate
from artaug.diffusion.family import Family
from artaug.diffusion.flux import Flux
from artaug.diffusion.flux2 import Flux2
from artaug.diffusion.flux2_klein import Flux2Klein
from artaug.diffusion.qwen_image import QwenImage
from artaug.diffusion.sd3 import StableDiffusion3
from artaug.diffusion.sd15 import StableDiffusion
from artaug.diffusion.sdxl import StableDiffusionXL
from artaug.diffusion.synthesizer import DiffusersSynthesizer, WornLoRA
from artaug.diffusion.verifying import verify_export
from artaug.diffusion.z_image import ZImage

__all__ = [
    "DiffusersSynthesizer",
    "Estimate",
    "Family",
    "Flux",
    "Flux2",
    "Flux2Klein",
    "QwenImage",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "WornLoRA",
    "ZImage",
    "check_family",
    "estimate",
    "verify_export",
]
