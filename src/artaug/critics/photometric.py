"""A critic that measures: it finds what stands out in a picture and asks for what a photographer would miss in it."""

from dataclasses import asdict, dataclass

import numpy as np
from PIL.Image import Image

from artaug._internal.images import as_rgb
from artaug.critics.salience import salient_boxes
from artaug.critique import Abstention, Critic, Critique, Suggestion
from artaug.errors import InvalidValueError
from artaug.geometry import Box
from artaug.images.photometry import MEASURES, srgb

_LEAST_PX = 16
_EVEN = 1 / 255  # one level of 8 bits


@dataclass(frozen=True, kw_only=True)
class PromptVocabulary:
    """What `PhotometricCritic` asks for where a picture falls short of something, in words the model knows.

    Raises:
        InvalidValueError: if one is blank.
    """

    exposure: str = "softly lit"
    chroma: str = "vivid"
    contrast: str = "glowing"
    sharpness: str = "sharp"

    def __post_init__(self) -> None:
        if blank := [measure for measure, words in asdict(self).items() if not words.strip()]:
            raise InvalidValueError(
                f"{self} says nothing for {', '.join(blank)}: need a word or two. "
                "To leave a measure out, set the critic's threshold for it to 0."
            )


@dataclass(frozen=True, kw_only=True)
class PhotometricCritic(Critic):
    """Asks for better light, colour, modelling or focus where a picture measurably lacks them.

    It measures exposure, chroma, contrast and sharpness (the numbers of the photometric scorers) in the whole picture
    and in the box of each part that stands out by its colour, and asks for what lies below the thresholds: the
    picture's own prompt with `PromptVocabulary` added, in that box. It does not know what is shown, so it asks for no other
    content, and a picture that is meant to be dark, pale or hazy is not to its taste. Where there is nothing to
    measure, below 16 x 16 pixels or in one even colour, it abstains.

    Raises:
        InvalidValueError: for a threshold or padding outside [0, 1], or if there is nothing it may ask for.

    >>> from artaug.critics import PhotometricCritic
    >>> from PIL import Image
    >>> picture = Image.new("RGB", (64, 64), (70, 74, 80))
    >>> picture.paste((96, 52, 48), (16, 16, 40, 40))
    >>> whole, brick = PhotometricCritic(chroma=0.25).critique(picture, "a brick").suggestions
    >>> whole.prompt, whole.reason
    ('a brick, vivid, glowing', 'chroma 0.20, below 0.25; contrast 0.03, below 0.15')
    >>> brick.box
    Box(left=0.234375, top=0.234375, right=0.640625, bottom=0.640625)
    """

    exposure: float = 0.45
    """Asks for better light below this, in the units of `Exposure`, [0, 1]; 0 never asks. So for the other three."""
    chroma: float = 0.3
    """In the units of `Chroma`; 0.3 is what Hasler and Suesstrunk call moderately colourful."""
    contrast: float = 0.15
    """In the units of `Contrast`."""
    sharpness: float = 0.5
    """In the units of `Sharpness`."""
    words: PromptVocabulary = PromptVocabulary()
    """What to ask for, by what falls short. The defaults are words that the playground's model knows."""
    whole: bool = True
    """Judge the picture as a whole too; its suggestion comes first."""
    max_regions: int = 3
    """At most this many parts, the most striking first."""
    padding: float = 1 / 64
    """How much wider than the part a box is on every side, as a fraction of the picture, in [0, 1]."""

    def __post_init__(self) -> None:
        for name in (*MEASURES, "padding"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidValueError(f"PhotometricCritic({name}={getattr(self, name)}): need a number in [0, 1].")
        if self.max_regions < 0 or not (self.whole or self.max_regions):
            raise InvalidValueError(
                f"PhotometricCritic(whole={self.whole}, max_regions={self.max_regions}) could ask for nothing: "
                "need whole=True or max_regions of at least 1."
            )

    def critique(self, image: Image, prompt: str) -> Critique | Abstention:
        if min(image.size) < _LEAST_PX:
            return Abstention(
                f"the picture has {image.width} x {image.height} pixels, and below {_LEAST_PX} x {_LEAST_PX} "
                "there is nothing to measure"
            )
        image = as_rgb(image)
        pixels = srgb(image)
        if pixels.std(axis=(0, 1)).max() < _EVEN:
            return Abstention("the picture is one even colour, so there is nothing in it to measure")
        boxes = [box.padded(self.padding) for box in salient_boxes(image, at_most=self.max_regions)]
        if self.whole:
            boxes.insert(0, Box(0, 0, 1, 1))
        asked = (self._suggestion(box, pixels, prompt) for box in boxes)
        measured = ", ".join(f"{name} {measure(pixels):.2f}" for name, measure in MEASURES.items())
        return Critique(tuple(one for one in asked if one), summary=measured)

    def _suggestion(self, box: Box, pixels: np.ndarray, prompt: str) -> Suggestion | None:
        """What a part of the picture lacks; None if nothing."""
        left, top, right, bottom = box.to_pixels((pixels.shape[1], pixels.shape[0]))
        found = {name: measure(pixels[top:bottom, left:right]) for name, measure in MEASURES.items()}
        short = [name for name, number in found.items() if number < getattr(self, name)]
        if not short:
            return None
        reasons = (f"{name} {found[name]:.2f}, below {getattr(self, name):.2f}" for name in short)
        asked = [getattr(self.words, name) for name in short]
        return Suggestion(box, ", ".join([prompt, *asked] if prompt.strip() else asked), "; ".join(reasons))
