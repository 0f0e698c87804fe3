"""Filters by several scorers, and by the similarity of the two pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from artaug._internal.annotations import checked
from artaug._internal.arguments import check_argument, check_finite_number, check_items, check_number
from artaug.errors import InvalidValueError
from artaug.filtering.algebra import PairFilter
from artaug.filtering.deltas import ScoreDelta, score_deltas
from artaug.image_files import LoadedImages
from artaug.images.similarity import ImageSimilarity, SimilarityMetric, compare_pairs, metric_name
from artaug.pairs import ImagePair, Verdict
from artaug.scoring import Scorer

if TYPE_CHECKING:
    from torch import nn


@checked
@final
@dataclass(frozen=True)
class ParetoGain(PairFilter):
    """Keeps a pair if no score fell by more than its tolerance and at least one rose: a Pareto improvement.

    The tolerance is inclusive: a fall of exactly the tolerance is allowed. It does not apply to the rise: any positive
    gain counts, and a pair in which nothing rose is dropped however large the tolerance is.

    Raises:
        InvalidValueError: without scorers, for scorers of one name, or for tolerances that are negative, not finite,
            or not one for each scorer.

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
    """How far a score may fall, in the scorer's own units: one number for all scorers, or one for each."""

    def __post_init__(self) -> None:
        check_items("ParetoGain", "by", self.by, Scorer)
        names = [scorer.name for scorer in self.by]
        if not names or len(set(names)) < len(names):
            raise InvalidValueError(
                f"ParetoGain received scorers named {names}. Expected at least one, and different names."
            )
        object.__setattr__(self, "by", tuple(self.by))
        if isinstance(self.tolerance, Sequence):
            for limit in self.tolerance:
                check_number("ParetoGain", "tolerance", limit)
            object.__setattr__(self, "tolerance", tuple(self.tolerance))
        else:
            check_number("ParetoGain", "tolerance", self.tolerance)
        tolerances = self._tolerances()
        if len(tolerances) != len(names) or not all(math.isfinite(limit) and limit >= 0 for limit in tolerances):
            raise InvalidValueError(
                f"ParetoGain(tolerance={self.tolerance!r}) of scorers {names}: need a finite number of at least 0, or "
                "one such number for each scorer."
            )

    @property
    def scorers(self) -> frozenset[str]:
        return frozenset().union(*(scorer.depends_on for scorer in self.by))

    @property
    def models(self) -> "Sequence[nn.Module]":
        return [model for scorer in self.by for model in scorer.models]

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        by_scorer = [score_deltas(scorer, pairs) for scorer in self.by]
        return [self._verdict(deltas) for deltas in zip(*by_scorer, strict=True)]

    def _tolerances(self) -> tuple[float, ...]:
        if isinstance(self.tolerance, int | float):
            return (self.tolerance,) * len(self.by)
        return tuple(self.tolerance)

    def _verdict(self, deltas: Sequence[ScoreDelta]) -> Verdict:
        """Judge one pair by the deltas of all scorers."""
        scores = {name: number for delta in deltas for name, number in delta.scores.items()}
        fell = [
            f"{delta}, allowed {tolerance:.3g}"
            for delta, tolerance in zip(deltas, self._tolerances(), strict=True)
            if delta.gain < -tolerance
        ]
        if fell:
            return Verdict(keep=False, reason=" and ".join(fell), scores=scores)
        keep = any(delta.gain > 0 for delta in deltas)
        summary = ", ".join(map(str, deltas))
        return Verdict(keep, summary if keep else f"nothing rose: {summary}", scores)


@checked
@final
@dataclass(frozen=True)
class Similarity(PairFilter):
    """Keeps a pair if the similarity of its two pictures is at least ``at_least``: better, and still the same picture.

    The threshold is inclusive. ``~Similarity(metric, 0.99)`` keeps the pairs below it.

    Raises:
        InvalidValueError: if ``at_least`` is not finite.

    >>> import artaug as aa
    >>> from PIL import Image
    >>> grey, lit = (Image.new("RGB", (32, 32), color) for color in ("#808080", "#a0a0a0"))
    >>> pair = aa.ImagePair(prompt="a wall", seed=0, before=grey, after=lit, plan=aa.Plan("a wall"))
    >>> print(aa.Similarity(aa.StructuralSimilarity(), at_least=0.6).judge(pair).reason)
    StructuralSimilarity is 0.976, threshold 0.6
    """

    metric: SimilarityMetric
    """An `ImageSimilarity`, such as `StructuralSimilarity` or `EmbeddingSimilarity`, or any function of two pictures."""
    at_least: float
    """In the units of the metric; 1 is the same picture."""

    def __post_init__(self) -> None:
        if not callable(self.metric):
            check_argument("Similarity", "metric", self.metric, ImageSimilarity)
        check_finite_number("Similarity", "at_least", self.at_least)

    @property
    def models(self) -> "Sequence[nn.Module]":
        return getattr(self.metric, "models", ())

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        name = metric_name(self.metric)
        numbers = compare_pairs(
            self.metric,
            LoadedImages([pair.references[0] for pair in pairs]),
            LoadedImages([pair.references[1] for pair in pairs]),
        )
        return [
            Verdict(number >= self.at_least, f"{name} is {number:.3g}, threshold {self.at_least:.3g}", {name: number})
            for number in numbers
        ]
