"""Which pairs are worth learning from: filters, each explaining itself, combined with ``&``, ``|`` and ``~``."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import final

from artaug.errors import InvalidValueError, SeamError
from artaug.pairs import ImagePair, Verdict
from artaug.scoring import Scorer, scored


class PairFilter(ABC):
    """Decides whether a pair got better. Filters combine: ``a & b``, ``a | b``, ``~a``.

    >>> import artaug as aa
    >>> class Seeded(aa.PairFilter):
    ...     def judge(self, pair):
    ...         return aa.Verdict(pair.seed > 0, f"the seed is {pair.seed}", {"seed": pair.seed})
    >>> keep = Seeded() & ~Seeded()
    """

    @abstractmethod
    def judge(self, pair: ImagePair) -> Verdict:
        """Keep the pair or not, with the reason and the numbers that rests on."""

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        """Judge many pairs. Override it where a batch is faster, or where pairs are judged against each other."""
        return [self.judge(pair) for pair in pairs]

    @property
    def scorers(self) -> frozenset[str]:
        """Names of the scorers this filter rests on: by them, what it kept looks better than it is."""
        return frozenset()

    def __and__(self, other: "PairFilter") -> "PairFilter":
        """Keep what both keep."""
        return _Combined(self, other, both=True)

    def __or__(self, other: "PairFilter") -> "PairFilter":
        """Keep what either keeps."""
        return _Combined(self, other, both=False)

    def __invert__(self) -> "PairFilter":
        """Keep what this one drops."""
        return _Not(self)

    def __bool__(self) -> bool:
        """Refuse ``a and b``, of which Python would quietly take only ``b``."""
        raise SeamError(f"{self!r} is neither true nor false. Combine filters with &, | and ~, not and, or and not.")


def judged(keep: PairFilter, pairs: Sequence[ImagePair]) -> list[Verdict]:
    """Judge pairs together and check that the filter answered as its seam promises: one `Verdict` a pair.

    Raises:
        SeamError: if it returned too few or too many answers, or something that is no `Verdict`.
    """
    if not pairs:
        return []
    answers = keep.judge_batch(pairs)
    if len(answers) != len(pairs):
        raise SeamError(f"{keep!r:.120}: judge_batch returned {len(answers)} verdicts for {len(pairs)} pairs.")
    for answer, pair in zip(answers, pairs, strict=True):
        if not isinstance(answer, Verdict):
            raise SeamError(
                f"{keep!r:.120} returned {type(answer).__name__} for {pair.prompt!r}: {answer!r:.120}. "
                "Expected artaug.Verdict."
            )
    return list(answers)


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
    Chroma rose by 0.785, asked 0.1
    """

    scorer: Scorer
    at_least: float = 0.0
    """In the scorer's own units."""

    def __post_init__(self) -> None:
        _check_finite(self, self.at_least)

    @property
    def scorers(self) -> frozenset[str]:
        return self.scorer.rests_on

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        return [
            Verdict(change.gain >= self.at_least, f"{change}, asked {self.at_least:.3g}", change.scores)
            for change in _changes(self.scorer, pairs)
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
        _check_finite(self, self.at_least)

    @property
    def scorers(self) -> frozenset[str]:
        return self.scorer.rests_on

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        name = self.scorer.name
        after = scored(self.scorer, [pair.after for pair in pairs], [pair.prompt for pair in pairs])
        return [
            Verdict(
                score >= self.at_least, f"{name} is {score:.3g}, asked {self.at_least:.3g}", {f"{name} after": score}
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
        return self.scorer.rests_on

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        changes = _changes(self.scorer, pairs)
        wanted = math.ceil(Fraction(str(self.fraction)) * len(changes))  # 0.1 of 30 is 3; in floats it is above 3
        order = sorted(range(len(changes)), key=lambda index: -changes[index].gain)
        ranks = {index: rank for rank, index in enumerate(order, start=1)}
        return [
            Verdict(
                ranks[index] <= wanted,
                f"{change}, rank {ranks[index]} of {len(changes)}, asked the best {wanted}",
                change.scores,
            )
            for index, change in enumerate(changes)
        ]


@dataclass(frozen=True)
class _Change:
    """What a scorer says of one pair."""

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


def _changes(scorer: Scorer, pairs: Sequence[ImagePair]) -> list[_Change]:
    """Score both pictures of every pair in one call, so that a model is loaded and batched once."""
    images = [pair.before for pair in pairs] + [pair.after for pair in pairs]
    numbers = scored(scorer, images, [pair.prompt for pair in pairs] * 2)
    before, after = numbers[: len(pairs)], numbers[len(pairs) :]
    return [_Change(scorer.name, one, other) for one, other in zip(before, after, strict=True)]


def _check_finite(pair_filter: PairFilter, at_least: float) -> None:
    if not math.isfinite(at_least):
        raise InvalidValueError(f"{pair_filter!r} can never change its mind: need a finite at_least.")


@final
@dataclass(frozen=True, repr=False)
class _Combined(PairFilter):
    first: PairFilter
    second: PairFilter
    both: bool
    """Whether both must agree to keep, or one is enough."""

    def __repr__(self) -> str:
        return f"({self.first!r} {'&' if self.both else '|'} {self.second!r})"

    @property
    def scorers(self) -> frozenset[str]:
        return self.first.scorers | self.second.scorers

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        verdicts = zip(judged(self.first, pairs), judged(self.second, pairs), strict=True)
        return [self._merged(first, second) for first, second in verdicts]

    def _merged(self, first: Verdict, second: Verdict) -> Verdict:
        """One verdict of two: all their scores, and the reasons of those who decided."""
        keep = first.keep and second.keep if self.both else first.keep or second.keep
        deciding = dict.fromkeys(verdict.reason for verdict in (first, second) if verdict.keep == keep)
        scores = dict(first.scores)
        for name, number in second.scores.items():
            # Two models behind one name: both numbers were looked at, so both are kept.
            scores[name if scores.get(name, number) == number else f"{name} (2)"] = number
        return Verdict(keep, " and ".join(deciding), scores)


@final
@dataclass(frozen=True, repr=False)
class _Not(PairFilter):
    opposed: PairFilter

    def __repr__(self) -> str:
        return f"~{self.opposed!r}"

    @property
    def scorers(self) -> frozenset[str]:
        return self.opposed.scorers

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        return [
            Verdict(not verdict.keep, f"not ({verdict.reason})", verdict.scores)
            for verdict in judged(self.opposed, pairs)
        ]
