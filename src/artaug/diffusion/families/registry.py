"""The published families, and which of them a pipeline belongs to."""

import os
from pathlib import Path

from diffusers import DiffusionPipeline

from artaug.diffusion.families.base import Family
from artaug.diffusion.families.chroma.family import Chroma1
from artaug.diffusion.families.flux.family import Flux
from artaug.diffusion.families.flux2.family import Flux2, Flux2Klein
from artaug.diffusion.families.qwen_image.family import QwenImage
from artaug.diffusion.families.sd3.family import StableDiffusion3
from artaug.diffusion.families.unet.family import StableDiffusion, StableDiffusionXL
from artaug.diffusion.families.z_image.family import ZImage
from artaug.errors import ModelError

FAMILIES: tuple[type[Family], ...] = (
    Flux,
    Flux2,
    Flux2Klein,
    StableDiffusion3,
    StableDiffusionXL,
    StableDiffusion,
    QwenImage,
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
        if isinstance(pipeline, family.pipeline_class):
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
    try:
        index = DiffusionPipeline.load_config(source)
    except (OSError, ValueError) as error:
        files = sorted(entry.name for entry in Path(source).iterdir()) if Path(source).is_dir() else None
        state = "could not be read" if files is None else f"is a folder that holds {files or 'nothing'}"
        raise ModelError(f"{text!r} {state}: {error} {_EXPECTED} {_known_families()}") from error
    for family in FAMILIES:
        if index.get("_class_name") == family.pipeline_class.__name__:
            return family
    raise ModelError(f"{text!r} holds a {index.get('_class_name')!r}. {_known_families()}")


def _known_families() -> str:
    names = ", ".join(family.pipeline_class.__name__ for family in FAMILIES)
    return (
        f"Known families: {names}. For another, write a Family and use DiffusersSynthesizer(pipeline=..., family=...)."
    )
