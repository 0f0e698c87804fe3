"""Accuracy: a scorer that compares pictures with the ground truth of their prompts."""

from dataclasses import dataclass
from typing import Literal, final

from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug.playground.detection import alignment
from artaug.scoring import Scorer


@checked
@final
@dataclass(frozen=True)
class Accuracy(Scorer):
    """The share of the prompt's things whose colour, shape or place is right in the picture, in [0, 1].

    Here it takes the place of CLIP or a visual question answering model, without their errors.

    >>> from artaug import playground
    >>> prompt = "a red cone on the left and a blue ball on the right at night"
    >>> playground.Accuracy("color").score(playground.render(prompt, seed=0), prompt)
    1.0
    """

    of: Literal["color", "shape", "place"]

    @property
    def name(self) -> str:
        return self.of

    def score(self, image: Image, prompt: str) -> float:
        return float(getattr(alignment(image, prompt), self.of))
