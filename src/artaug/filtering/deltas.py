"""The scores of the two pictures of a pair, and their difference."""

from collections.abc import Sequence
from dataclasses import dataclass

from artaug.image_files import LoadedImages
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
    """Score both pictures of every pair, those before first. Pictures on disk are loaded as the scorer comes to them."""
    before_files, after_files = zip(*(pair.references for pair in pairs), strict=True) if pairs else ((), ())
    images = LoadedImages([*before_files, *after_files])
    numbers = score_images(scorer, images, [pair.prompt for pair in pairs] * 2)
    before, after = numbers[: len(pairs)], numbers[len(pairs) :]
    return [ScoreDelta(scorer.name, *scores) for scores in zip(before, after, strict=True)]
