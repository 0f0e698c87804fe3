"""Scores of pictures: a `Scorer` gives a picture a number, as a metric, a reward, a filter threshold or a stop rule."""

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
        """The scorer's name in tables and verdicts."""
        return type(self).__name__

    @property
    def depends_on(self) -> frozenset[str]:
        """Names of the scorers that this one is computed from, its own included."""
        return frozenset({self.name})

    @abstractmethod
    def score(self, image: Image, prompt: str) -> float:
        """Score ``image``, which was drawn from ``prompt``."""

    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """Score many pictures. Override it where a batch is faster than a loop.

        An exception raised by `score` gets a note that names the scorer and the prompt.
        """
        scores = []
        for image, prompt in zip(images, prompts, strict=True):
            try:
                scores.append(self.score(image, prompt))
            except Exception as error:
                error.add_note(f"Raised by the scorer {self.name!r}, for the prompt {prompt!r}.")
                raise
        return scores


def score_images(scorer: Scorer, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
    """Call a scorer and check what it returned: one finite number for each picture.

    Raises:
        ContractError: if it returned another number of scores, or something that is not a number.
        NonFiniteError: if a score is NaN or infinite, naming the prompt.

    What the scorer raises is raised as it is, with a note that names the scorer and the prompt.
    """
    try:
        answers = scorer.score_batch(images, prompts)
    except Exception as error:
        if type(scorer).score_batch is not Scorer.score_batch:  # the loop there has named the very prompt
            first = next(iter(prompts), None)
            error.add_note(
                f"Raised by the scorer {scorer.name!r}, for {len(prompts)} picture(s), first prompt {first!r}."
            )
        raise
    return check_numbers(scorer.name, "score_batch", answers, count=len(images), per="picture", prompts=prompts)
