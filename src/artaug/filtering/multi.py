"""Filters by more than one number: nothing may get worse, and the two pictures must still show the same."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from artaug.errors import InvalidValueError
from artaug.filtering.algebra import PairFilter
from artaug.filtering.deltas import ScoreDelta, check_finite, score_deltas
from artaug.images.similarity import SimilarityMetric, compare_pairs, metric_name
from artaug.pairs import ImagePair, Verdict
from artaug.scoring import Scorer


@final
@dataclass(frozen=True)
class ParetoGain(PairFilter):
    """Keeps a pair if no scorer fell by more than its tolerance and at least one rose.

    Raises:
        InvalidValueError: without scorers, for scorers of one name, or for tolerances that are negative, not finite
            or not one a scorer.

    >>> import artaug as aa
    >>> from artaug.scorers import Chroma, Exposure
    >>> from PIL import Image
    >>> grey, red = Image.new("RGB", (8, 8), "grey"), Image.new("RGB", (8, 8), "red")
    >>> pair = aa.ImagePair(prompt="a rose", seed=0, before=grey, after=red, plan=aa.Plan("a rose"))
    >>> print(aa.ParetoGain([Chroma(), Exposure()], tolerance=0.1).judge(pair).reason)
    Exposure fell by 0.644, allowed 0.1
    """

    by: Sequence[Scorer]
    """None of them may fall."""
    tolerance: float | Sequence[float] = 0.0
    """How far a score may fall, in the scorer's own units: one number for all, or one a scorer."""

    def __post_init__(self) -> None:
        names = [scorer.name for scorer in self.by]
        if not names or len(set(names)) < len(names):
            raise InvalidValueError(f"ParetoGain received scorers named {names}. Expected at least one, all different.")
        object.__setattr__(self, "by", tuple(self.by))
        if not isinstance(self.tolerance, int | float):
            object.__setattr__(self, "tolerance", tuple(self.tolerance))
        allowed = self._allowed()
        if len(allowed) != len(names) or not all(math.isfinite(one) and one >= 0 for one in allowed):
            raise InvalidValueError(
                f"ParetoGain(tolerance={self.tolerance!r}) of scorers {names}: need a finite number of at least 0, or "
                "one such number a scorer."
            )

    @property
    def scorers(self) -> frozenset[str]:
        return frozenset().union(*(scorer.depends_on for scorer in self.by))

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        return [self._verdict(row) for row in zip(*(score_deltas(scorer, pairs) for scorer in self.by), strict=True)]

    def _allowed(self) -> tuple[float, ...]:
        one_for_all = isinstance(self.tolerance, int | float)
        return (self.tolerance,) * len(self.by) if one_for_all else tuple(self.tolerance)  # type: ignore[arg-type, return-value]

    def _verdict(self, row: Sequence[ScoreDelta]) -> Verdict:
        scores = {name: number for change in row for name, number in change.scores.items()}
        fell = [
            f"{change}, allowed {allowed:.3g}"
            for change, allowed in zip(row, self._allowed(), strict=True)
            if change.gain < -allowed
        ]
        if fell:
            return Verdict(keep=False, reason=" and ".join(fell), scores=scores)
        keep = any(change.gain > 0 for change in row)
        said = ", ".join(map(str, row))
        return Verdict(keep, said if keep else f"nothing rose: {said}", scores)


@final
@dataclass(frozen=True)
class Similarity(PairFilter):
    """Keeps a pair whose two pictures are alike enough: better, and still the same picture.

    ``~Similarity(metric, 0.99)`` keeps those that differ.

    Raises:
        InvalidValueError: if ``at_least`` is not finite.

    >>> import artaug as aa
    >>> from PIL import Image
    >>> grey, lit = (Image.new("RGB", (32, 32), colour) for colour in ("#808080", "#a0a0a0"))
    >>> pair = aa.ImagePair(prompt="a wall", seed=0, before=grey, after=lit, plan=aa.Plan("a wall"))
    >>> print(aa.Similarity(aa.StructuralSimilarity(), at_least=0.6).judge(pair).reason)
    StructuralSimilarity is 0.976, threshold 0.6
    """

    metric: SimilarityMetric
    """A `ImageSimilarity`, such as `StructuralSimilarity` or `EmbeddingSimilarity`, or any function of two pictures."""
    at_least: float
    """In the units of the metric; 1 is the same picture."""

    def __post_init__(self) -> None:
        check_finite(self, self.at_least)

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        name = metric_name(self.metric)
        numbers = compare_pairs(self.metric, [pair.before for pair in pairs], [pair.after for pair in pairs])
        return [
            Verdict(number >= self.at_least, f"{name} is {number:.3g}, threshold {self.at_least:.3g}", {name: number})
            for number in numbers
        ]
