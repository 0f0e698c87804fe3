"""Drawing and training with diffusers: one synthesizer, and one short file a model family. Only here: diffusers."""

from artaug.diffusion.family import Family
from artaug.diffusion.flux import Flux
from artaug.diffusion.synthesizer import DiffusersSynthesizer, WornLoRA

__all__ = ["DiffusersSynthesizer", "Family", "Flux", "WornLoRA"]
