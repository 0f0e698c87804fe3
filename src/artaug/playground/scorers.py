"""Ground truth as a scorer: is what the prompt asked for in the picture?"""

from dataclasses import dataclass
from typing import Literal

from PIL.Image import Image

from artaug.playground.detection import alignment
from artaug.scoring import Scorer


@dataclass(frozen=True)
class Accuracy(Scorer):
    """The share of asked things whose colour, shape or place is right in the picture, in [0, 1].

    It plays the part that CLIP or a question-answering model plays in the world outside, without their errors.

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
