"""Scores of pictures: a `Scorer` gives a picture a number, as a metric, a reward, a filter threshold or a stop rule."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL.Image import Image

from artaug._internal.annotations import Seam
from artaug._internal.calls import call_part, describe_inputs
from artaug._internal.contracts import check_numbers
from artaug._internal.memory import FittingBatches
from artaug.errors import InvalidValueError, ScoringError

_MAX_PICTURES_PER_CALL = 256
"""Pictures that a scorer gets at once, and that are in memory at once where they are loaded from disk: 0.8 GB at 1,024 px."""
_TOO_LARGE = "Load its model in lower precision or on another device, or free what else is on the device."

if TYPE_CHECKING:
    from torch import nn


class Scorer(Seam):
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

    @property
    def models(self) -> "Sequence[nn.Module]":
        """What it computes with on a device, for `OneAtATime`, which moves these; whatever is not named stays where it is."""
        return ()

    @abstractmethod
    def score(self, image: Image, prompt: str) -> float:
        """Score ``image``, which was drawn from ``prompt``."""

    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """Score many pictures. Override it where a batch is faster than a loop."""
        return [self.score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]


def score_images(scorer: Scorer, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
    """Call a scorer and check what it returned: one finite number for each picture; without pictures, it is not called.

    Every call of a scorer goes through this function. A scorer without a `Scorer.score_batch` of its own scores picture by
    picture, another one at most 256 at a time. Where memory runs out, the batch is halved. What passes by itself, such as a timeout, is tried again for ten
    minutes.

    Raises:
        InvalidValueError: if there is not one picture for each prompt.
        ScoringError: if the scorer raised; an `ArtAugError` of its own is raised as it is, with a note.
        ContractError: if it returned another number of scores, or something that is not a number.
        NonFiniteError: if a score is NaN or infinite, naming the prompt.
        MemoryError, RuntimeError: the scorer's own, if not even one picture fits into memory.
    """
    owner = f"the scorer {scorer.name!r}"
    if len(images) != len(prompts):
        raise InvalidValueError(
            f"received {len(images)} picture(s) for {len(prompts)} prompt(s), so {owner} was not called: need one picture for "
            "each prompt."
        )

    def call(members: Sequence[int]) -> list[float]:
        pictures, texts = [images[index] for index in members], [prompts[index] for index in members]
        scores = call_part(
            lambda: scorer.score_batch(pictures, texts),
            owner=owner,
            inputs=describe_inputs("picture", texts),
            error_class=ScoringError,
        )
        return check_numbers(scorer.name, "score_batch", scores, count=len(texts), per="picture", prompts=texts)

    batches = FittingBatches(1 if type(scorer).score_batch is Scorer.score_batch else _MAX_PICTURES_PER_CALL)
    parts = batches.run(call, range(len(images)), owner=owner, item="picture", remedy=_TOO_LARGE)
    return [score for _, scores in parts for score in scores]
