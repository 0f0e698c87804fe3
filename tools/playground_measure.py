"""Quality of a playground model: alignment with captions, and the effect of adjectives."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from artaug.playground.detection import alignment
from artaug.playground.rendering import render
from artaug.playground.world import ADJECTIVES, prompts
from artaug.scorers import Chroma, Contrast, Exposure, Sharpness
from playground_pipeline import MAX_SEQUENCE_LENGTH

_BATCH = 32
_SCORERS = (Exposure(), Chroma(), Contrast(), Sharpness())


def measure(pipeline: FluxPipeline, *, count: int, steps: int, seed: int) -> dict[str, list[float]]:
    """Measure `count` held-out captions: alignment of plain ones, photometry of plain and praised ones.

    Alignment is colour, shape, place, and surplus things a picture. Photometry is exposure, chroma,
    contrast, sharpness; `rendered` rows are what the renderer makes of the same captions.
    """
    plain = prompts(count, seed=seed, held_out=True)
    praised = [", ".join([caption, *ADJECTIVES]) for caption in plain]
    pictures, better = (draw(pipeline, captions, steps=steps) for captions in (plain, praised))
    truth, best = ([render(caption, seed=i) for i, caption in enumerate(captions)] for captions in (plain, praised))
    return {
        "alignment": _alignment(pictures, plain),
        "alignment praised": _alignment(better, praised),
        "photometry": _photometry(pictures),
        "photometry rendered": _photometry(truth),
        "photometry praised": _photometry(better),
        "photometry praised rendered": _photometry(best),
    }


def draw(pipeline: FluxPipeline, captions: Sequence[str], *, steps: int) -> list[Image.Image]:
    """Draw captions with the seeds 0, 1, 2, ..."""
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for start in range(0, len(captions), _BATCH):
        part = list(captions[start : start + _BATCH])
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        pictures += pipeline(
            part,
            height=64,
            width=64,
            num_inference_steps=steps,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            generator=generators,
        ).images
    return pictures


def _alignment(pictures: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
    rows = [alignment(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
    return _mean([[row.color, row.shape, row.place, float(row.surplus)] for row in rows])


def _photometry(pictures: Sequence[Image.Image]) -> list[float]:
    return _mean([[scorer.score(picture, "") for scorer in _SCORERS] for picture in pictures])


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [round(float(value), 3) for value in np.mean(rows, axis=0)]
