"""What the servers behind a run's parts have counted so far: of a part itself, and of the parts that it is made of."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from artaug.critique import Critic
from artaug.filtering import BestOf, PairFilter
from artaug.pairwise import PairwiseJudge
from artaug.run.stop_rule import StopRule
from artaug.scoring import Scorer
from artaug.training import Validation

_PARTS = (Critic, Scorer, PairwiseJudge, PairFilter, BestOf, StopRule, Validation)


@runtime_checkable
class CountsUsage(Protocol):
    """What a client of a server has counted, as `artaug.critics.Usage` does."""

    replies: int
    retries: int
    failures: int
    input_tokens: int
    output_tokens: int
    uncounted: int


@dataclass(frozen=True)
class UsageCount:
    """What servers counted, or will."""

    requests: float = 0
    retries: float = 0
    input_tokens: float = 0
    output_tokens: float = 0
    uncounted: float = 0

    def __add__(self, other: "UsageCount") -> "UsageCount":
        return UsageCount(**{name: count + getattr(other, name) for name, count in vars(self).items()})

    def __sub__(self, before: "UsageCount") -> "UsageCount":
        return self + before.times(-1)

    def times(self, factor: float) -> "UsageCount":
        """All counts, multiplied."""
        return UsageCount(**{name: factor * count for name, count in vars(self).items()})


def find_usages(*parts: object) -> list[CountsUsage]:
    """What parts have counted, and those that they are made of (a wrapped critic, the scorers of a filter), each once.

    >>> import artaug as aa
    >>> from artaug.run.planning.usage_counts import find_usages
    >>> from artaug.scorers import OpenAIVQAScore
    >>> served = OpenAIVQAScore(base_url="http://127.0.0.1:8000/v1", model="judge")
    >>> [usage.replies for usage in find_usages(aa.Gain(served, at_least=0) & aa.Floor(served, 0.5))]
    [0]
    """
    seen: set[int] = set()
    return list(_find(parts, seen))


def _find(parts: tuple[object, ...], seen: set[int]) -> Iterator[CountsUsage]:
    for part in parts:
        if id(part) in seen:
            continue
        seen.add(id(part))
        usage = getattr(part, "usage", None)
        if isinstance(usage, CountsUsage):
            yield usage
        else:
            yield from _find(tuple(_inner(part)), seen)


def _inner(part: object) -> Iterator[object]:
    """The parts that an object holds."""
    for held in getattr(part, "__dict__", {}).values():
        for one in held if isinstance(held, tuple | list) else (held,):
            if isinstance(one, _PARTS):
                yield one


def count_usage(*parts: object) -> UsageCount | None:
    """The sum of what the servers of parts have counted; None if nothing counts."""
    usages = find_usages(*parts)
    if not usages:
        return None
    return UsageCount(
        requests=sum(usage.replies + usage.retries + usage.failures for usage in usages),
        retries=sum(usage.retries for usage in usages),
        input_tokens=sum(usage.input_tokens for usage in usages),
        output_tokens=sum(usage.output_tokens for usage in usages),
        uncounted=sum(usage.uncounted for usage in usages),
    )


def counted_since(before: UsageCount | None, *parts: object) -> UsageCount | None:
    """What the servers of parts have counted since ``before``, which `count_usage` gave."""
    now = count_usage(*parts)
    return None if now is None else now - (before or UsageCount())
