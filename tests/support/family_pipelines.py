"""The tiny pipeline of every family, and the family set to draw with it, with classifier-free guidance where it has any."""

from artaug.diffusion.families.chroma.family import Chroma1
from artaug.diffusion.families.flux.family import Flux
from artaug.diffusion.families.flux2.family import Flux2, Flux2Klein
from artaug.diffusion.families.qwen_image.family import QwenImage
from artaug.diffusion.families.sd3.family import StableDiffusion3
from artaug.diffusion.families.unet.family import StableDiffusion, StableDiffusionXL
from artaug.diffusion.families.z_image.family import ZImage
from support.family_laws import family_of
from support.tiny_chroma import tiny_chroma
from support.tiny_flux import tiny_flux
from support.tiny_flux2 import tiny_flux2, tiny_flux2_klein
from support.tiny_qwen_image import tiny_qwen_image
from support.tiny_sd3 import tiny_sd3
from support.tiny_unet import tiny_sd15, tiny_sdxl
from support.tiny_z_image import tiny_z_image

PIPELINES = {
    Chroma1: tiny_chroma,
    Flux: tiny_flux,
    Flux2: tiny_flux2,
    Flux2Klein: tiny_flux2_klein,
    QwenImage: tiny_qwen_image,
    StableDiffusion3: tiny_sd3,
    StableDiffusion: tiny_sd15,
    StableDiffusionXL: tiny_sdxl,
    ZImage: tiny_z_image,
}
OPTIONS = {
    Flux: {"negative_prompt": "blurry", "true_cfg_scale": 2.0},
    QwenImage: {"negative_prompt": "blurry", "true_cfg_scale": 2.0},
}


def tiny_family(kind):
    options = {"max_sequence_length": 96 if kind is ZImage else 128, **OPTIONS.get(kind, {})}
    return family_of(kind, PIPELINES[kind](), width=32, height=32, **options)
