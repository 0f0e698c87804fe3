"""Position bias: how much a judge's answers depend on which picture is shown first."""

from collections.abc import Iterable
from typing import Annotated, Self

from pydantic import Field

from artaug._internal.values import value
from artaug.critique import Abstention
from artaug.evaluation.statistics import sign_test
from artaug.pairwise import Judgment

_ALPHA = 0.05


@value
class PositionBias:
    """A judge's answers in two orders, counted. Print it to read it.

    Where the two answers about a pair do not agree, the judge prefers a place, not a picture, and the pair counts as a tie. A
    judge that is only unsure prefers either place as often; one that is biased, one of them more often than chance has it.

    >>> import artaug as aa
    >>> judgments = [aa.Preference(1.0, 1.0)] * 9 + [aa.Preference(0.0, 0.0)] + [aa.Preference(1.0, 0.0)] * 20
    >>> bias = aa.PositionBias.of("MyJudge", judgments)
    >>> bias.significant, round(bias.consistency, 3)
    (True, 0.667)
    >>> print(bias)
    MyJudge has a position bias: it contradicts itself about 10 of 30 pairs, which count as ties, and prefers the picture shown \
first in 9 of these 10 (p = 0.021).
    """

    judge: str
    pairs: Annotated[int, Field(ge=0)]
    """Pairs about which it answered in both orders."""
    first: Annotated[int, Field(ge=0)] = 0
    """Of them, those about which it contradicts itself and leans to the picture shown first."""
    second: Annotated[int, Field(ge=0)] = 0
    """Likewise to the picture shown second."""
    unanswered: Annotated[int, Field(ge=0)] = 0
    """Pairs about which it had no answer; they count neither as wins nor as ties."""
    reason: str = ""
    """Why it had no answer about the first of these."""

    @classmethod
    def of(cls, judge: str, judgments: Iterable[Judgment]) -> Self:
        """Count the answers of one judge."""
        answers = list(judgments)
        positions = [answer.position for answer in answers if not isinstance(answer, Abstention)]
        reasons = [answer.reason for answer in answers if isinstance(answer, Abstention)]
        return cls(
            judge,
            pairs=len(positions),
            first=positions.count(1),
            second=positions.count(-1),
            unanswered=len(reasons),
            reason=reasons[0] if reasons else "",
        )

    @property
    def consistency(self) -> float:
        """Share of pairs about which both answers agree, in [0, 1]; 1 without pairs."""
        return 1 - (self.first + self.second) / self.pairs if self.pairs else 1.0

    @property
    def p_value(self) -> float:
        """Two-sided p-value of the exact binomial test of ``first`` against ``second``."""
        return sign_test(self.first, self.second)

    @property
    def significant(self) -> bool:
        """Whether the p-value is below 0.05."""
        return self.p_value < _ALPHA

    def __str__(self) -> str:
        contradictions, preferred = self.first + self.second, max(self.first, self.second)
        place = "first" if self.first >= self.second else "second"
        if not contradictions:
            text = f"{self.judge} answered consistently about all {self.pairs} pairs"
        else:
            text = (
                f"{self.judge} {'has a position bias: it ' if self.significant else ''}contradicts itself about "
                f"{contradictions} of {self.pairs} pairs, which count as ties, and prefers the picture shown {place} in "
                f"{preferred} of these {contradictions} (p = {self.p_value:.2g})"
            )
        if self.unanswered:
            text += f"; it had no answer about {self.unanswered} more, which are left out: {self.reason:.120}"
        return f"{text}."
