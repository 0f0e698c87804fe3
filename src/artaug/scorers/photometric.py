"""Photometric scorers, which need no model: exposure, colourfulness, contrast and sharpness, each in [0, 1].

The formulas, and where they come from, are those of `artaug.images.photometry`. None uses the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug.errors import InvalidValueError
from artaug.images.photometry import METRICS, chroma, contrast, exposure, sharpness, srgb
from artaug.scoring import Scorer, score_images

if TYPE_CHECKING:
    from torch import nn


@checked
@final
@dataclass(frozen=True)
class Exposure(Scorer):
    """How well exposed: mean of ``exp(-(Y - 0.5)^2 / 0.08)``, Y the luma in [0, 1] (Mertens et al. 2007).

    1 for mid-grey, 0.04 for pure black or pure white.

    >>> from artaug.scorers import Exposure
    >>> from PIL import Image
    >>> round(Exposure().score(Image.new("RGB", (8, 8), "black"), "night"), 3)
    0.044
    """

    def score(self, image: Image, prompt: str) -> float:
        return exposure(srgb(image))


@checked
@final
@dataclass(frozen=True)
class Chroma(Scorer):
    """How colourful: the index of Hasler and Suesstrunk (2003) divided by its "extremely colourful" 109, at most 1.

    0 for greys; a photograph has about 0.3 (moderately colourful) to 0.6.

    >>> from artaug.scorers import Chroma
    >>> from PIL import Image
    >>> Chroma().score(Image.new("L", (8, 8), 90), "fog")
    0.0
    """

    def score(self, image: Image, prompt: str) -> float:
        return chroma(srgb(image))


@checked
@final
@dataclass(frozen=True)
class Contrast(Scorer):
    """How far light and dark lie apart: twice the standard deviation of the luma (Peli 1990), at most 1.

    0 for a flat picture, 1 for one half black and half white.

    >>> from artaug.scorers import Contrast
    >>> from PIL import Image
    >>> Contrast().score(Image.linear_gradient("L"), "dawn") > Contrast().score(Image.new("L", (8, 8), 90), "fog")
    True
    """

    def score(self, image: Image, prompt: str) -> float:
        return contrast(srgb(image))


@checked
@final
@dataclass(frozen=True)
class Sharpness(Scorer):
    """How sharp: 1 minus the blur effect of Crete et al. (2007), that of ``skimage.measure.blur_effect``.

    0 where there is no edge at all. It depends on the size in pixels: compare pictures of one size.

    >>> from artaug.scorers import Sharpness
    >>> from PIL import Image, ImageFilter
    >>> picture = Image.effect_noise((64, 64), 60)
    >>> Sharpness().score(picture, "") > Sharpness().score(picture.filter(ImageFilter.GaussianBlur(2)), "")
    True
    """

    def score(self, image: Image, prompt: str) -> float:
        return sharpness(srgb(image))


@checked
@final
@dataclass(frozen=True)
class Photometric(Scorer):
    """The mean of `Exposure`, `Chroma`, `Contrast` and `Sharpness`, in [0, 1].

    >>> from artaug.scorers import Photometric
    >>> from PIL import Image
    >>> round(Photometric().score(Image.new("L", (8, 8), 128), "fog"), 2)
    0.25
    """

    @property
    def depends_on(self) -> frozenset[str]:
        return frozenset({"Photometric", "Exposure", "Chroma", "Contrast", "Sharpness"})

    def score(self, image: Image, prompt: str) -> float:
        pixels = srgb(image)
        return float(np.mean([measure(pixels) for measure in METRICS.values()]))


@checked
@final
@dataclass(frozen=True)
class MeanOf(Scorer):
    """The mean of several scorers. They should share a range, or the one with the widest range dominates.

    Raises:
        InvalidValueError: if there is no scorer.

    >>> from artaug.scorers import Chroma, Exposure, MeanOf
    >>> MeanOf((Exposure(), Chroma())).name
    'mean of Exposure and Chroma'
    """

    scorers: tuple[Scorer, ...]

    def __post_init__(self) -> None:
        if not self.scorers:
            raise InvalidValueError("MeanOf(()) has no scorers: need at least one.")

    @property
    def name(self) -> str:
        return "mean of " + " and ".join(scorer.name for scorer in self.scorers)

    @property
    def depends_on(self) -> frozenset[str]:
        return frozenset({self.name}).union(*(scorer.depends_on for scorer in self.scorers))

    @property
    def models(self) -> "Sequence[nn.Module]":
        return [model for scorer in self.scorers for model in scorer.models]

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        scores = [score_images(scorer, images, prompts) for scorer in self.scorers]  # (scorers, pictures)
        return [float(mean) for mean in np.mean(scores, axis=0)]
