"""A critic that measures light, color, contrast and focus in the regions of a picture that stand out. It needs no model."""

from dataclasses import asdict, dataclass
from typing import final

import numpy as np
from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug._internal.images import as_rgb
from artaug._internal.text import short_repr
from artaug.critics.salience import salient_boxes
from artaug.critique import Abstention, Critic, Critique, Suggestion
from artaug.errors import InvalidValueError
from artaug.geometry import Box
from artaug.images.photometry import METRICS, srgb

_MIN_SIDE_PX = 16
_UNIFORM_STD = 1 / 255  # one level of 8 bits


@checked
@dataclass(frozen=True, kw_only=True)
class PromptVocabulary:
    """The words that `PhotometricCritic` adds to a prompt for each measure that is too low.

    Raises:
        InvalidValueError: if one of them is blank.
    """

    exposure: str = "softly lit"
    chroma: str = "vivid"
    contrast: str = "glowing"
    sharpness: str = "sharp"

    __repr__ = short_repr

    def __post_init__(self) -> None:
        if blank := [measure for measure, words in asdict(self).items() if not words.strip()]:
            raise InvalidValueError(
                f"{self} has no words for {', '.join(blank)}: need at least one word for each measure. "
                "To turn a measure off, set the critic's threshold for it to 0."
            )


@checked
@final
@dataclass(frozen=True, kw_only=True)
class PhotometricCritic(Critic):
    """Asks for better light, color, focus or contrast where a measurement is low.

    It measures exposure, chroma, sharpness and, if asked to, contrast (the numbers of the photometric scorers) in the whole picture
    and in the box of each region whose color stands out. Where a number is below its threshold, it suggests for that box
    the picture's own prompt with words of `PromptVocabulary` added. It does not know what is shown, so it never asks for
    other content, and it asks for changes in a picture that is dark, pale or hazy on purpose. It abstains where there is
    nothing to measure: below 16 x 16 pixels, or in a picture of one uniform color.

    Raises:
        InvalidValueError: for a threshold or padding outside [0, 1], or if neither the picture nor regions are judged.

    >>> from artaug.critics import PhotometricCritic
    >>> from PIL import Image
    >>> picture = Image.new("RGB", (64, 64), (70, 74, 80))
    >>> picture.paste((96, 52, 48), (16, 16, 40, 40))
    >>> whole, brick = PhotometricCritic(chroma=0.25).critique(picture, "a brick").suggestions
    >>> whole.prompt, whole.reason
    ('a brick, vivid', 'chroma 0.20, below 0.25')
    >>> brick.box
    Box(left=0.234375, top=0.234375, right=0.640625, bottom=0.640625)
    """

    exposure: float = 0.45
    """The threshold, in the units of `Exposure`, [0, 1]; 0 turns the measure off. The same holds for the next three."""
    chroma: float = 0.3
    """In the units of `Chroma`; 0.3 is what Hasler and Suesstrunk call moderately colourful."""
    contrast: float = 0.0
    """In the units of `Contrast`; 0.15 is a good threshold. Off by default: the playground's word for it, "glowing", draws a light
    around things, which a LoRA learns as halos."""
    sharpness: float = 0.5
    """In the units of `Sharpness`."""
    vocabulary: PromptVocabulary = PromptVocabulary()
    """The words to add. The defaults are words that the playground's model knows."""
    whole_image: bool = True
    """Whether to judge the picture as a whole too; its suggestion comes first."""
    max_regions: int = 3
    """The largest number of regions, the most salient first."""
    padding: float = 1 / 64
    """How far a box extends beyond its region on every side, as a fraction of the picture, in [0, 1]."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        for name in (*METRICS, "padding"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidValueError(f"PhotometricCritic({name}={getattr(self, name)}): need a number in [0, 1].")
        if self.max_regions < 0 or not (self.whole_image or self.max_regions):
            raise InvalidValueError(
                f"PhotometricCritic(whole_image={self.whole_image}, max_regions={self.max_regions}) would judge nothing: "
                "need whole_image=True or max_regions of at least 1."
            )

    def critique(self, image: Image, prompt: str) -> Critique | Abstention:
        if min(image.size) < _MIN_SIDE_PX:
            return Abstention(
                f"the picture has {image.width} x {image.height} pixels, and below {_MIN_SIDE_PX} x {_MIN_SIDE_PX} "
                "there is nothing to measure"
            )
        image = as_rgb(image)
        pixels = srgb(image)
        if pixels.std(axis=(0, 1)).max() < _UNIFORM_STD:
            return Abstention("the picture has one uniform color, so there is nothing in it to measure")
        boxes = [box.padded(self.padding) for box in salient_boxes(image, max_boxes=self.max_regions)]
        if self.whole_image:
            boxes.insert(0, Box(0, 0, 1, 1))
        suggestions = (self._suggestion(box, pixels, prompt) for box in boxes)
        summary = ", ".join(f"{name} {measure(pixels):.2f}" for name, measure in METRICS.items())
        return Critique(tuple(suggestion for suggestion in suggestions if suggestion), summary=summary)

    def _suggestion(self, box: Box, pixels: np.ndarray, prompt: str) -> Suggestion | None:
        """The suggestion for one box; None if every measure reaches its threshold."""
        left, top, right, bottom = box.to_pixels((pixels.shape[1], pixels.shape[0]))
        values = {name: measure(pixels[top:bottom, left:right]) for name, measure in METRICS.items()}
        low = [name for name, value in values.items() if value < getattr(self, name)]
        if not low:
            return None
        reasons = (f"{name} {values[name]:.2f}, below {getattr(self, name):.2f}" for name in low)
        words = [getattr(self.vocabulary, name) for name in low]
        return Suggestion(box, ", ".join([prompt, *words] if prompt.strip() else words), "; ".join(reasons))
