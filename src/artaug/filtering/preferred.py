"""The filter by a judge of two pictures, which is asked in both orders."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

from artaug._internal.annotations import checked
from artaug._internal.arguments import check_argument, check_number
from artaug.critique import Abstention
from artaug.errors import InvalidValueError
from artaug.evaluation.comparison.position_bias import PositionBias
from artaug.filtering.algebra import PairFilter
from artaug.image_files import LoadedImages
from artaug.pairs import ImagePair, Verdict
from artaug.pairwise import Judgment, PairwiseJudge, Preference, judge_images

if TYPE_CHECKING:
    from torch import nn

_LOG = logging.getLogger(__name__)
_ALPHA = 0.001
"""Of the test for position bias. It is made after every call of the filter, so one of 0.05 would find what is not there."""


@dataclass
class _BiasMonitor:
    """What a filter's judge has said so far, until it is found to be biased."""

    pairs: int = 0
    first: int = 0
    second: int = 0
    """See `PositionBias`."""
    is_reported: bool = False

    def add(self, judge: str, judgments: Sequence[Judgment]) -> None:
        if self.is_reported:
            return
        more = PositionBias.of(judge, judgments)
        self.pairs, self.first, self.second = (
            self.pairs + more.pairs,
            self.first + more.first,
            self.second + more.second,
        )
        bias = PositionBias(judge, pairs=self.pairs, first=self.first, second=self.second)
        if bias.p_value < _ALPHA:
            self.is_reported = True
            _LOG.warning("%s Without at_least, the filter drops the pairs about which it contradicts itself.", bias)


@checked
@final
@dataclass(frozen=True)
class Preferred(PairFilter):
    """Keeps a pair if a judge prefers ``after``, asked in both orders.

    Without ``at_least``, it has to be preferred in each of them, so that a judge that takes sides by position keeps nothing. A
    pair about which the judge has no answer is dropped, with the reason. A judge with a position bias is reported once, as a
    logged warning.

    Raises:
        InvalidValueError: for a judge that is none, or unless ``0 <= at_least <= 1``.

    >>> import artaug as aa
    >>> from PIL import Image
    >>> class Redder(aa.PairwiseJudge):
    ...     def prefer(self, first, second, prompt):
    ...         return float(first.getpixel((0, 0))[0] > second.getpixel((0, 0))[0])
    >>> grey, red = Image.new("RGB", (8, 8), "grey"), Image.new("RGB", (8, 8), "red")
    >>> pair = aa.ImagePair(prompt="a rose", seed=0, before=grey, after=red, plan=aa.Plan("a rose"))
    >>> print(aa.Preferred(Redder()).judge(pair).reason)
    Redder prefers after in both orders: 1.00 shown first, 1.00 shown second
    """

    by: PairwiseJudge
    at_least: float | None = None
    """The least probability that ``after`` is better, as the mean of both orders, in [0, 1]; the threshold is inclusive. None to
    require that each order prefers it."""
    _monitor: _BiasMonitor = field(init=False, repr=False, compare=False, default_factory=_BiasMonitor)

    def __post_init__(self) -> None:
        check_argument("Preferred", "by", self.by, PairwiseJudge)
        if self.at_least is None:
            return
        check_number("Preferred", "at_least", self.at_least)
        if not 0 <= self.at_least <= 1:
            raise InvalidValueError(
                f"{self!r} has no such threshold: need a probability in [0, 1], such as 0.7, or None."
            )

    @property
    def scorers(self) -> frozenset[str]:
        return self.by.depends_on

    @property
    def models(self) -> "Sequence[nn.Module]":
        return self.by.models

    def judge(self, pair: ImagePair) -> Verdict:
        return self.judge_batch([pair])[0]

    def rehearse(self, pair: ImagePair) -> None:
        """Ask about a stand-in, of which nothing is kept; a judge without an answer to it is reported as a logged warning."""
        (judgment,) = judge_images(self.by, [pair.after], [pair.before], [pair.prompt])
        if isinstance(judgment, Abstention):
            _LOG.warning(
                "%s had no answer about the plain pictures that are shown before a run: %s. Pairs without an answer are "
                "dropped.",
                self.by.name,
                judgment.reason,
            )

    def judge_batch(self, pairs: Sequence[ImagePair]) -> list[Verdict]:
        before, after = (LoadedImages([pair.references[side] for pair in pairs]) for side in (0, 1))
        judgments = judge_images(self.by, after, before, [pair.prompt for pair in pairs])
        self._monitor.add(self.by.name, judgments)
        return [self._verdict(judgment) for judgment in judgments]

    def _verdict(self, judgment: Judgment) -> Verdict:
        name = self.by.name
        if isinstance(judgment, Abstention):
            return Verdict(keep=False, reason=f"{name} had no answer: {judgment.reason}", scores={})
        first, second = judgment.forward, 1 - judgment.backward
        scores = {name: judgment.score, f"{name} shown first": first, f"{name} shown second": second}
        orders = f"{first:.2f} shown first, {second:.2f} shown second"
        if self.at_least is None:
            return Verdict(judgment.winner == "first", f"{name} {_in_words(judgment)}: {orders}", scores)
        reason = f"{name} prefers after with probability {judgment.score:.3g} ({orders}), threshold {self.at_least:.3g}"
        return Verdict(judgment.score >= self.at_least, reason, scores)


def _in_words(preference: Preference) -> str:
    """What a judge says of a pair, of which ``after`` is the first picture."""
    if preference.winner != "tie":
        return f"prefers {'after' if preference.winner == 'first' else 'before'} in both orders"
    if preference.position:
        return f"contradicts itself, it leans to the picture shown {'first' if preference.position > 0 else 'second'}"
    return "calls it a tie"
