"""Filters by one scorer: by the gain, by the level reached, and by rank."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, final

from artaug._internal.annotations import checked
from artaug._internal.arguments import check_argument, check_finite_number, check_number
from artaug.errors import InvalidValueError
from artaug.filtering.algebra import PairFilter
from artaug.filtering.deltas import score_deltas
from artaug.image_files import LoadedImages
from artaug.pairs import ImagePair, Verdict
from artaug.scoring import Scorer, score_images

if TYPE_CHECKING:
    from torch import nn


@checked
@final
@dataclass(frozen=True)
class Gain(PairFilter):
    """Keeps a pair if ``score(after) - score(before) >= at_least``; a negative number allows a loss.

    The threshold is inclusive: with the default of 0, a pair whose score did not change is kept. To keep only what rose,
    ask for a gain that matters in the scorer's units, such as 0.01.

    Raises:
        InvalidValueError: for a scorer that is none, or if ``at_least`` is not finite.

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
        check_argument("Gain", "scorer", self.scorer, Scorer)
        check_finite_number("Gain", "at_least", self.at_least)

    @property
    def scorers(self) -> frozenset[str]:
        return self.scorer.depends_on

    @property
    def models(self) -> "Sequence[nn.Module]":
        return self.scorer.models

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        return [
            Verdict(delta.gain >= self.at_least, f"{delta}, threshold {self.at_least:.3g}", delta.scores)
            for delta in score_deltas(self.scorer, pairs)
        ]


@checked
@final
@dataclass(frozen=True)
class Floor(PairFilter):
    """Keeps a pair if ``score(after) >= at_least``, whatever ``before`` scored. The threshold is inclusive.

    Raises:
        InvalidValueError: for a scorer that is none, or if ``at_least`` is not finite.
    """

    scorer: Scorer
    at_least: float
    """In the scorer's own units."""

    def __post_init__(self) -> None:
        check_argument("Floor", "scorer", self.scorer, Scorer)
        check_finite_number("Floor", "at_least", self.at_least)

    @property
    def scorers(self) -> frozenset[str]:
        return self.scorer.depends_on

    @property
    def models(self) -> "Sequence[nn.Module]":
        return self.scorer.models

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        name = self.scorer.name
        pictures = LoadedImages([pair.references[1] for pair in pairs])
        after = score_images(self.scorer, pictures, [pair.prompt for pair in pairs])
        return [
            Verdict(
                score >= self.at_least,
                f"{name} is {score:.3g}, threshold {self.at_least:.3g}",
                {f"{name} after": score},
            )
            for score in after
        ]


@checked
@final
@dataclass(frozen=True)
class TopFraction(PairFilter):
    """Keeps the pairs that gained most: the best ``ceil(fraction * n)`` of n judged together; of equals, the first.

    Together means: in one call of `judge_batch`. `improve` judges all pairs of a round together, at its end. A pair judged alone ranks first and is kept even if its score fell; to keep only
    gains, write ``TopFraction(scorer, 0.5) & Gain(scorer)``. Both sides of ``&`` and ``|`` see the same pairs, also
    those that the other side drops.

    Raises:
        InvalidValueError: for a scorer that is none, or unless ``0 < fraction <= 1``.
    """

    scorer: Scorer
    fraction: float
    """Of the pairs judged together, in (0, 1]."""

    def __post_init__(self) -> None:
        check_argument("TopFraction", "scorer", self.scorer, Scorer)
        check_number("TopFraction", "fraction", self.fraction)
        if not 0 < self.fraction <= 1:
            raise InvalidValueError(f"{self!r} cannot rank pairs: need a fraction in (0, 1], such as 0.5.")

    @property
    def needs_all_pairs(self) -> bool:
        return True

    @property
    def scorers(self) -> frozenset[str]:
        return self.scorer.depends_on

    @property
    def models(self) -> "Sequence[nn.Module]":
        return self.scorer.models

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        deltas = score_deltas(self.scorer, pairs)
        # Rounded up, so that at least one pair is kept. As a fraction, since 0.1 * 30 is 3.0000000000000004 in floats.
        count = math.ceil(Fraction(str(self.fraction)) * len(deltas))
        order = sorted(range(len(deltas)), key=lambda index: -deltas[index].gain)  # stable: of equals, the first
        ranks = {index: rank for rank, index in enumerate(order, start=1)}
        return [
            Verdict(
                ranks[index] <= count,
                f"{delta}, rank {ranks[index]} of {len(deltas)}, keeps the best {count}",
                delta.scores,
            )
            for index, delta in enumerate(deltas)
        ]
