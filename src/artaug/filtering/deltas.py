"""The scores of the two pictures of a pair, and their difference."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL.Image import Image

from artaug._internal.memory import is_out_of_memory
from artaug.errors import ArtAugError, ScoringError
from artaug.pairs import ImagePair
from artaug.scoring import Scorer, score_images


@dataclass(frozen=True)
class ScoreDelta:
    """A scorer's numbers for one pair."""

    name: str
    before: float
    after: float

    @property
    def gain(self) -> float:
        return self.after - self.before

    @property
    def scores(self) -> dict[str, float]:
        return {f"{self.name} before": self.before, f"{self.name} after": self.after, f"{self.name} gain": self.gain}

    def __str__(self) -> str:
        return f"{self.name} {'fell' if self.gain < 0 else 'rose'} by {abs(self.gain):.3g}"


def score_deltas(scorer: Scorer, pairs: Sequence[ImagePair]) -> list[ScoreDelta]:
    """Score both pictures of every pair, in one call of the scorer."""
    images = [pair.before for pair in pairs] + [pair.after for pair in pairs]
    numbers = score_pictures(scorer, images, [pair.prompt for pair in pairs] * 2)
    before, after = numbers[: len(pairs)], numbers[len(pairs) :]
    return [ScoreDelta(scorer.name, *scores) for scores in zip(before, after, strict=True)]


def score_pictures(scorer: Scorer, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
    """Score pictures for a filter, and say which scorer it was if that raises.

    Raises:
        ScoringError: if the scorer raised; its exception is the cause. Where memory ran out, that error is raised.
        ContractError: if it returned something that is no number for each picture.
        NonFiniteError: if a score is NaN or infinite.
    """
    try:
        return score_images(scorer, images, prompts)
    except Exception as error:
        if isinstance(error, ArtAugError) or is_out_of_memory(error):
            raise
        notes = " ".join(getattr(error, "__notes__", ()))
        raise ScoringError(
            f"the scorer {scorer.name!r} raised {type(error).__name__}: {error}, in a filter that scored {len(images)} "
            f"picture(s), first prompt {prompts[0]!r}. {notes}".rstrip(),
        ) from error
