"""The playground: a tiny world with ground truth, and a tiny real FLUX that draws it, for any laptop.

>>> from artaug import playground
>>> image = playground.render("a red cone on the left at night", seed=0)
>>> [(thing.color, thing.shape, thing.place) for thing in playground.detect(image)]
[('red', 'cone', 'on the left')]
"""

from pathlib import Path

import torch

from artaug._internal.annotations import checked
from artaug.diffusion import DiffusersSynthesizer
from artaug.playground.detection import Alignment, DetectedThing, alignment, detect
from artaug.playground.rendering import render
from artaug.playground.scorers import Accuracy
from artaug.playground.world import CaptionError, Scene, Thing, parse, prompts
from artaug.regional import Guide

WEIGHTS = Path(__file__).parent / "weights"
"""The pipeline's folder, in the layout of ``diffusers``."""


@checked
def synthesizer(
    *, guide: Guide | None = None, steps: int = 12, device: str | torch.device = "cpu"
) -> DiffusersSynthesizer:
    """The playground's own FLUX: 64 x 64 pixels, a few million weights in float32, loaded like any other model.

    Args:
        guide: how regions steer it; without one it draws plain pictures only.
        steps: sampling steps.
        device: where it draws: on the CPU, so that it draws the same everywhere, unless another is given.
    """
    return DiffusersSynthesizer.from_pretrained(
        WEIGHTS, guide=guide, device=device, width=64, height=64, steps=steps, max_sequence_length=24
    )


__all__ = [
    "WEIGHTS",
    "Accuracy",
    "Alignment",
    "CaptionError",
    "DetectedThing",
    "Scene",
    "Thing",
    "alignment",
    "detect",
    "parse",
    "prompts",
    "render",
    "synthesizer",
]
