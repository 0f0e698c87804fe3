"""The colours of things in a picture, named by a CLIP as GenEval does it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from PIL import Image
from torch.nn.functional import normalize

from artaug.errors import InvalidValueError
from artaug.evaluation.suites import Detection
from artaug.scorers.encoders import DualEncoder

GENEVAL_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_TEMPLATES = ("a photo of a {colour} {label}", "a photo of a {colour}-colored {label}", "a photo of a {colour} object")
_BEHIND = "#999"


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ClipColors:
    """Names colours for `artaug.evaluation.suites.ObjectScore`, by the rule of GenEval (Ghosh et al. 2023), which takes ViT-L/14.

    What a detection's mask leaves out is made grey, its box is cut out, and the colour is the one whose three sentences,
    their vectors averaged, are nearest.

    Raises:
        InvalidValueError: for fewer than two colours.
    """

    encoder: DualEncoder
    """The CLIP, which scorers can share."""
    colours: tuple[str, ...] = GENEVAL_COLORS
    """Those to choose from."""

    def __post_init__(self) -> None:
        if len(set(self.colours)) < max(len(self.colours), 2):
            raise InvalidValueError(f"ClipColors(colours={self.colours!r}): need two or more, all different.")

    def __call__(self, image: Image.Image, detections: Sequence[Detection]) -> list[str]:
        """One colour a detection."""
        if not detections:
            return []
        seen = self.encoder.embed_images([_cut_out(image, one) for one in detections])
        named = []
        for vector, one in zip(seen, detections, strict=True):
            words = [text.format(colour=colour, label=one.label) for colour in self.colours for text in _TEMPLATES]
            sentences = self.encoder.embed_texts(words).reshape(len(self.colours), len(_TEMPLATES), -1)
            nearest = normalize(sentences.mean(dim=1), dim=-1) @ vector
            named.append(self.colours[int(torch.argmax(nearest))])
        return named


def _cut_out(image: Image.Image, one: Detection) -> Image.Image:
    picture = image.convert("RGB")
    if one.mask is not None:
        if one.mask.size != image.size:
            raise InvalidValueError(f"the mask of {one.label} is {one.mask.size}, in a picture of {image.size}.")
        there = one.mask.convert("L").point(lambda level: 255 if level else 0)
        picture = Image.composite(picture, Image.new("RGB", image.size, _BEHIND), there)
    return picture.crop(one.box.to_pixels(image.size))
