"""The base class of filters and its algebra: ``&``, ``|`` and ``~`` of filters are filters."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, final

from artaug._internal.annotations import Seam
from artaug._internal.arguments import check_argument
from artaug._internal.calls import call_part, describe_inputs
from artaug._internal.contracts import check_batch
from artaug.errors import ContractError
from artaug.pairs import ImagePair, Verdict

if TYPE_CHECKING:
    from torch import nn


class PairFilter(Seam):
    """Decides whether a pair got better. Filters combine: ``a & b``, ``a | b``, ``~a``.

    >>> import artaug as aa
    >>> class Seeded(aa.PairFilter):
    ...     def judge(self, pair):
    ...         return aa.Verdict(pair.seed > 0, f"the seed is {pair.seed}", {"seed": pair.seed})
    >>> keep = Seeded() & ~Seeded()
    """

    @abstractmethod
    def judge(self, pair: ImagePair) -> Verdict:
        """Keep the pair or not, with the reason and the numbers behind it."""

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        """Judge many pairs. Override it where a batch is faster, or where pairs are compared with each other."""
        return [self.judge(pair) for pair in pairs]

    def rehearse(self, pair: ImagePair) -> None:
        """Judge a stand-in for a pair before a run, so that a filter that cannot judge says so now.

        Override it, to do nothing, for a filter that asks a person.
        """
        judge_pairs(self, [pair])

    @property
    def needs_all_pairs(self) -> bool:
        """Whether a run is to judge all pairs of a round together, since a verdict depends on the other pairs."""
        return False

    @property
    def scorers(self) -> frozenset[str]:
        """Names of the scorers this filter decides by; they overrate the pairs that it kept."""
        return frozenset()

    @property
    def models(self) -> "Sequence[nn.Module]":
        """What it computes with on a device, for `OneAtATime`, which moves these; whatever is not named stays where it is."""
        return ()

    def __and__(self, other: "PairFilter") -> "PairFilter":
        """Keep what both keep."""
        return _Combined(self, other, require_both=True)

    def __or__(self, other: "PairFilter") -> "PairFilter":
        """Keep what either keeps."""
        return _Combined(self, other, require_both=False)

    def __invert__(self) -> "PairFilter":
        """Keep what this one drops."""
        return _Not(self)

    def __bool__(self) -> bool:
        """Refuse ``a and b``, of which Python would silently use only ``b``."""
        raise ContractError(f"{self!r} has no truth value. Combine filters with &, | and ~, not and, or and not.")


def judge_pairs(keep: PairFilter, pairs: Sequence[ImagePair]) -> list[Verdict]:
    """Judge pairs together and check that there is one `Verdict` for each; without pairs, the filter is not called.

    Every call of a filter goes through this function. A filter without a `PairFilter.judge_batch` of its own judges pair by
    pair. What passes by itself, such as a timeout, is tried again for ten minutes.

    Raises:
        PartError: if the filter raised; an `ArtAugError` of its own or of its scorers is raised as it is, with a note.
        ContractError: if it returned too few or too many answers, or something that is no `Verdict`.
    """
    owner, verdicts = f"{keep!r:.120}", list[Verdict]()
    size = 1 if type(keep).judge_batch is PairFilter.judge_batch else max(len(pairs), 1)
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        prompts = [pair.prompt for pair in part]
        answers = call_part(partial(keep.judge_batch, part), owner=owner, inputs=describe_inputs("pair", prompts))
        verdicts += check_batch(owner, "judge_batch", answers, of=Verdict, count=len(part), per="pair", prompts=prompts)
    return verdicts


@final
@dataclass(frozen=True, repr=False)
class _Combined(PairFilter):
    first: PairFilter
    second: PairFilter
    require_both: bool
    """True for ``&``, False for ``|``."""

    def __post_init__(self) -> None:
        check_argument("& or |", "left", self.first, PairFilter)
        check_argument("& or |", "right", self.second, PairFilter)

    def __repr__(self) -> str:
        return f"({self.first!r} {'&' if self.require_both else '|'} {self.second!r})"

    @property
    def needs_all_pairs(self) -> bool:
        return self.first.needs_all_pairs or self.second.needs_all_pairs

    @property
    def scorers(self) -> frozenset[str]:
        return self.first.scorers | self.second.scorers

    @property
    def models(self) -> "Sequence[nn.Module]":
        return (*self.first.models, *self.second.models)

    def rehearse(self, pair: ImagePair) -> None:
        self.first.rehearse(pair)
        self.second.rehearse(pair)

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        verdicts = zip(judge_pairs(self.first, pairs), judge_pairs(self.second, pairs), strict=True)
        return [self._merge(first, second) for first, second in verdicts]

    def _merge(self, first: Verdict, second: Verdict) -> Verdict:
        """One verdict of two: all scores, and the reasons of those that agree with the result."""
        keep = first.keep and second.keep if self.require_both else first.keep or second.keep
        deciding = dict.fromkeys(verdict.reason for verdict in (first, second) if verdict.keep == keep)
        scores = dict(first.scores)
        for name, number in second.scores.items():
            # Two scorers of one name with different numbers: both were used, so both are kept.
            scores[name if scores.get(name, number) == number else f"{name} (2)"] = number
        return Verdict(keep, " and ".join(deciding), scores)


@final
@dataclass(frozen=True, repr=False)
class _Not(PairFilter):
    inverted: PairFilter

    def __repr__(self) -> str:
        return f"~{self.inverted!r}"

    @property
    def needs_all_pairs(self) -> bool:
        return self.inverted.needs_all_pairs

    @property
    def scorers(self) -> frozenset[str]:
        return self.inverted.scorers

    @property
    def models(self) -> "Sequence[nn.Module]":
        return self.inverted.models

    def rehearse(self, pair: ImagePair) -> None:
        self.inverted.rehearse(pair)

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        return [
            Verdict(not verdict.keep, f"not ({verdict.reason})", verdict.scores)
            for verdict in judge_pairs(self.inverted, pairs)
        ]
