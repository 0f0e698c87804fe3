"""The published families, and which of them a pipeline belongs to."""

import os
from pathlib import Path

from diffusers import DiffusionPipeline

from artaug._internal.weights import model_errors
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.chroma.family import Chroma1
from artaug.diffusion.families.flux.family import Flux, FluxKontext
from artaug.diffusion.families.flux2.family import Flux2, Flux2Klein
from artaug.diffusion.families.qwen_image.family import QwenImage, QwenImageEdit
from artaug.diffusion.families.sd3.family import StableDiffusion3
from artaug.diffusion.families.unet.family import StableDiffusion, StableDiffusionXL
from artaug.diffusion.families.z_image.family import ZImage
from artaug.errors import ModelError

FAMILIES: tuple[type[Family], ...] = (
    Flux,
    FluxKontext,
    Flux2,
    Flux2Klein,
    StableDiffusion3,
    StableDiffusionXL,
    StableDiffusion,
    QwenImage,
    QwenImageEdit,
    ZImage,
    Chroma1,
)
"""The families that are recognised from a pipeline's class. The first whose layers fit a LoRA file reads it."""

_EXPECTED = "Expected a diffusers pipeline: a folder with model_index.json, or its name on the Hub."


def family_of(pipeline: DiffusionPipeline) -> type[Family]:
    """The family of a loaded pipeline.

    Raises:
        ModelError: if artaug does not know it.
    """
    for family in FAMILIES:
        if isinstance(pipeline, (family.pipeline_class, family.control_class or family.pipeline_class)):
            return family
    raise ModelError(f"artaug does not know {type(pipeline).__name__}. {_known_families()}")


def family_at(source: str | os.PathLike[str]) -> type[Family]:
    """The family of the pipeline in a folder or on the Hub, by its index; weights are not read.

    Raises:
        ModelError: if there is no pipeline, or one artaug does not know.
    """
    text = str(source)
    if not Path(source).exists() and (Path(source).is_absolute() or text.startswith(".") or text.count("/") > 1):
        raise ModelError(f"{text!r} does not exist, and is no name on the Hub either. {_EXPECTED} {_known_families()}")
    with model_errors(f"{text!r} {_state(Path(source))}", expected=f"{_EXPECTED} {_known_families()}"):
        class_name = DiffusionPipeline.load_config(source).get("_class_name")
    for family in FAMILIES:
        if class_name == family.pipeline_class.__name__:
            return family
    raise ModelError(f"{text!r} holds a {class_name!r}. {_known_families()}")


def _state(source: Path) -> str:
    """What a path is, for an error: a folder may be another than the user thinks."""
    try:
        files = sorted(entry.name for entry in source.iterdir())
    except OSError:
        return "could not be read"
    return f"is a folder that holds {files or 'nothing'}"


def _known_families() -> str:
    names = ", ".join(family.pipeline_class.__name__ for family in FAMILIES)
    return (
        f"Known families: {names}. For another, write a Family and use DiffusersSynthesizer(pipeline=..., family=...)."
    )
