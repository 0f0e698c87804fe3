"""Colours of detected objects, named by a CLIP as GenEval does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from PIL import Image
from torch.nn.functional import normalize

from artaug._internal.annotations import checked
from artaug._internal.images import as_rgb
from artaug.errors import InvalidValueError
from artaug.evaluation.suites import Detection
from artaug.scorers.encoders import DualEncoder

if TYPE_CHECKING:
    from torch import nn

GENEVAL_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
_BACKGROUND = "#999"


@checked
@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ClipColors:
    """Names colours for `artaug.evaluation.suites.ObjectScore`, by the rule of GenEval (Ghosh et al. 2023), with ViT-L/14.

    The pixels outside a detection's mask become grey, its box is cut out, and the colour is the one with the highest
    cosine between the picture and the mean of its three sentences' vectors.

    Raises:
        InvalidValueError: for fewer than two colours, or one twice.
    """

    encoder: DualEncoder
    """The CLIP, which scorers can share."""
    colors: tuple[str, ...] = GENEVAL_COLORS
    """The colours to choose from."""

    def __post_init__(self) -> None:
        if len(set(self.colors)) < max(len(self.colors), 2):
            raise InvalidValueError(f"ClipColors(colors={self.colors!r}): need two or more, all different.")

    @property
    def models(self) -> "Sequence[nn.Module]":
        """Those of the encoder, see `artaug.Scorer.models`."""
        return self.encoder.models

    def __call__(self, image: Image.Image, detections: Sequence[Detection]) -> list[str]:
        """One colour for each detection."""
        if not detections:
            return []
        crops = self.encoder.embed_images([_cut_out(image, detection) for detection in detections])
        names = []
        for crop, detection in zip(crops, detections, strict=True):
            sentences = [
                template.format(color=color, label=detection.label) for color in self.colors for template in _TEMPLATES
            ]
            # (colors x templates, features) to (colors, templates, features): the mean over templates is the classifier.
            vectors = self.encoder.embed_texts(sentences).reshape(len(self.colors), len(_TEMPLATES), -1)
            cosines = normalize(vectors.mean(dim=1), dim=-1) @ crop
            names.append(self.colors[int(cosines.argmax())])
        return names


def _cut_out(image: Image.Image, detection: Detection) -> Image.Image:
    picture = as_rgb(image)
    if detection.mask is not None:
        if detection.mask.size != image.size:
            raise InvalidValueError(
                f"the mask of {detection.label} is {detection.mask.size}, in a picture of {image.size}: need the same."
            )
        inside = detection.mask.convert("L").point(lambda level: 255 if level else 0)
        picture = Image.composite(picture, Image.new("RGB", image.size, _BACKGROUND), inside)
    return picture.crop(detection.box.to_pixels(image.size))
