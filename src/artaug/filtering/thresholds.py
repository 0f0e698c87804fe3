"""Filters by one scorer: what it gained, what it reached, and who gained most."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import final

from artaug.errors import InvalidValueError
from artaug.filtering.algebra import PairFilter
from artaug.filtering.deltas import check_finite, score_deltas
from artaug.pairs import ImagePair, Verdict
from artaug.scoring import Scorer, score_images


@final
@dataclass(frozen=True)
class Gain(PairFilter):
    """Keeps a pair whose score rose by at least ``at_least``; a negative number allows a loss.

    Raises:
        InvalidValueError: if ``at_least`` is not finite.

    >>> import artaug as aa
    >>> from artaug.scorers import Chroma
    >>> from PIL import Image
    >>> grey, red = Image.new("RGB", (8, 8), "grey"), Image.new("RGB", (8, 8), "red")
    >>> pair = aa.ImagePair(prompt="a rose", seed=0, before=grey, after=red, plan=aa.Plan("a rose"))
    >>> print(aa.Gain(Chroma(), at_least=0.1).judge(pair).reason)
    Chroma rose by 0.785, threshold 0.1
    """

    scorer: Scorer
    at_least: float = 0.0
    """In the scorer's own units."""

    def __post_init__(self) -> None:
        check_finite(self, self.at_least)

    @property
    def scorers(self) -> frozenset[str]:
        return self.scorer.depends_on

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        return [
            Verdict(change.gain >= self.at_least, f"{change}, threshold {self.at_least:.3g}", change.scores)
            for change in score_deltas(self.scorer, pairs)
        ]


@final
@dataclass(frozen=True)
class Floor(PairFilter):
    """Keeps a pair whose second picture scores at least ``at_least``, whatever the first one scored.

    Raises:
        InvalidValueError: if ``at_least`` is not finite.
    """

    scorer: Scorer
    at_least: float
    """In the scorer's own units."""

    def __post_init__(self) -> None:
        check_finite(self, self.at_least)

    @property
    def scorers(self) -> frozenset[str]:
        return self.scorer.depends_on

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        name = self.scorer.name
        after = score_images(self.scorer, [pair.after for pair in pairs], [pair.prompt for pair in pairs])
        return [
            Verdict(
                score >= self.at_least,
                f"{name} is {score:.3g}, threshold {self.at_least:.3g}",
                {f"{name} after": score},
            )
            for score in after
        ]


@final
@dataclass(frozen=True)
class TopFraction(PairFilter):
    """Keeps the pairs that gained most: the best ``ceil(fraction * n)`` of n judged together, the first of equals.

    Together means: in one call of `judge_batch`. `improve` judges a chunk of ``batch_size`` prompts at a time, so a
    larger batch compares more widely. A pair judged alone is the best there is, and is kept, even if it lost; to keep
    only gains, write ``TopFraction(scorer, 0.5) & Gain(scorer)``. Parts of ``&`` and ``|`` see the same pairs, those
    the other part drops included.

    Raises:
        InvalidValueError: unless ``0 < fraction <= 1``.
    """

    scorer: Scorer
    fraction: float
    """Of the pairs judged together, in (0, 1]."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise InvalidValueError(f"{self!r} keeps no sensible share: need a fraction in (0, 1], such as 0.5.")

    @property
    def scorers(self) -> frozenset[str]:
        return self.scorer.depends_on

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        seen = score_deltas(self.scorer, pairs)
        wanted = math.ceil(Fraction(str(self.fraction)) * len(seen))  # 0.1 of 30 is 3; in floats it is above 3
        order = sorted(range(len(seen)), key=lambda index: -seen[index].gain)
        ranks = {index: rank for rank, index in enumerate(order, start=1)}
        return [
            Verdict(
                ranks[index] <= wanted,
                f"{change}, rank {ranks[index]} of {len(seen)}, keeps the best {wanted}",
                change.scores,
            )
            for index, change in enumerate(seen)
        ]
