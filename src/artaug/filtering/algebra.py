"""The seam of filters and its algebra: ``&``, ``|`` and ``~`` of filters are filters."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from artaug._internal.contracts import check_batch
from artaug.errors import ContractError
from artaug.pairs import ImagePair, Verdict


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
        raise ContractError(
            f"{self!r} is neither true nor false. Combine filters with &, | and ~, not and, or and not."
        )


def judge_pairs(keep: PairFilter, pairs: Sequence[ImagePair]) -> list[Verdict]:
    """Judge pairs together and check that the filter answered as its seam promises: one `Verdict` a pair.

    Raises:
        ContractError: if it returned too few or too many answers, or something that is no `Verdict`.
    """
    if not pairs:
        return []
    return check_batch(
        f"{keep!r:.120}",
        "judge_batch",
        keep.judge_batch(pairs),
        of=Verdict,
        count=len(pairs),
        per="pair",
        prompts=[pair.prompt for pair in pairs],
    )


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
        verdicts = zip(judge_pairs(self.first, pairs), judge_pairs(self.second, pairs), strict=True)
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
            for verdict in judge_pairs(self.opposed, pairs)
        ]
