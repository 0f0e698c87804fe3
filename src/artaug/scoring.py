"""Pictures to numbers: a metric, a reward, a filter threshold and a stop rule are all a `Scorer`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from PIL.Image import Image

from artaug._internal.contracts import check_numbers


class Scorer(ABC):
    """Gives a picture a number; higher is better.

    Subclass it and write `score`.

    >>> import artaug as aa
    >>> class Width(aa.Scorer):
    ...     def score(self, image, prompt):
    ...         return float(image.width)
    >>> Width().name
    'Width'
    """

    @property
    def name(self) -> str:
        """What tables and verdicts call this scorer."""
        return type(self).__name__

    @property
    def depends_on(self) -> frozenset[str]:
        """Names of the scorers whose numbers go into this one, its own included."""
        return frozenset({self.name})

    @abstractmethod
    def score(self, image: Image, prompt: str) -> float:
        """Score ``image``, which was drawn from ``prompt``."""

    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """Score many pictures. Override it where a batch is faster than a loop."""
        return [self._told(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def _told(self, image: Image, prompt: str) -> float:
        """Score one of many; an exception gets a note saying for which prompt it was raised."""
        try:
            return self.score(image, prompt)
        except Exception as fault:
            fault.add_note(f"Raised by the scorer {self.name!r}, for the prompt {prompt!r}.")
            raise


def score_images(scorer: Scorer, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
    """Score pictures and check that the scorer answered as its seam promises: one finite number a picture.

    Raises:
        ContractError: if it returned too few numbers, or something that is no number.
        NonFiniteError: if a score is NaN or infinite, naming the prompt.
    """
    answers = scorer.score_batch(images, prompts)
    return check_numbers(scorer.name, "score_batch", answers, count=len(images), per="picture", prompts=prompts)
