"""What a comparison finds: a row a scorer and candidate, the guardrails beside it, and what both mean in words."""

from math import floor, isfinite, log10
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field

from artaug._internal.values import value
from artaug.errors import InvalidValueError
from artaug.evaluation.statistics import paired_bootstrap, tie_rate, win_rate

_SURE = 0.05


@value
class ScoreRow:
    """One scorer's answer to one question: is this candidate better than the base?"""

    scorer: str
    candidate: str
    base: float
    """Mean score of the base's pictures."""
    enhanced: float
    """Mean score of the candidate's pictures of the same prompts and seeds."""
    delta: float
    """Mean paired difference, candidate less base."""
    ci_low: float
    """Lower end of the 95% bootstrap interval of ``delta``."""
    ci_high: float
    """Upper end of it."""
    win_rate: Annotated[float, Field(ge=0, le=1)]
    """Share of prompts on which the candidate scores higher; ties count half."""
    n: Annotated[int, Field(gt=0)]
    """Number of prompts."""
    filtered_by: bool = False
    """Whether the training pairs were filtered by this scorer or a part of it, which then says less than the others."""
    tie_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of prompts on which both score the same."""
    p_value: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Two-sided sign-flip p-value of the difference, after Holm's correction over the scorers of this candidate."""

    @classmethod
    def of(
        cls,
        scorer: str,
        candidate: str,
        *,
        base: np.ndarray,
        enhanced: np.ndarray,
        p_value: float,
        filtered_by: bool,
        seed: int,
    ) -> Self:
        """Sum up the scores of the same prompts, base and candidate; ``seed`` is the bootstrap's."""
        gains = enhanced - base
        interval = paired_bootstrap(gains, seed=seed)
        return cls(
            scorer=scorer,
            candidate=candidate,
            base=base.mean(),
            enhanced=enhanced.mean(),
            delta=gains.mean(),
            ci_low=interval.low,
            ci_high=interval.high,
            win_rate=win_rate(gains),
            n=len(gains),
            filtered_by=filtered_by,
            tie_rate=tie_rate(gains),
            p_value=p_value,
        )

    @property
    def decimals(self) -> int:
        """Decimals worth printing: enough to show the interval's half width, from 3 to 8."""
        half = (self.ci_high - self.ci_low) / 2
        return min(max(-floor(log10(half)), 3), 8) if half > 0 else 3

    @property
    def direction(self) -> int:
        """1 if the whole interval lies above zero, -1 if it lies below, else 0: not settled."""
        return int(self.ci_low > 0) - int(self.ci_high < 0)

    @property
    def significant(self) -> bool:
        """Whether the whole interval lies on one side of zero and the p-value, corrected, is below 0.05."""
        return self.direction != 0 and self.p_value < _SURE


@value
class ScoringFailure:
    """A picture that a scorer raised on. The rows of that scorer rest on the other prompts."""

    scorer: str
    arm: str
    """Whose picture it is: ``base``, or the name of a candidate."""
    prompt: str
    seed: int
    error: str
    """The exception, in words."""


@value
class Guardrail:
    """How far one scorer may fall while others rise. It is a limit on the fall, not on chance: see `status`.

    Raises:
        InvalidValueError: if the limit is negative or not finite.

    >>> import artaug as aa
    >>> row = aa.ScoreRow("diversity", "round 1", 0.50, 0.48, -0.02, -0.03, -0.015, 0.4, 64, p_value=0.01)
    >>> aa.Guardrail("diversity", 0.02).status(row)
    'outside'
    """

    scorer: str
    """The name of the row it watches."""
    max_drop: float
    """As a share of the base's mean (0.02 for 2%), or in the scorer's own units if not ``relative``."""
    relative: bool = True

    def __post_init__(self) -> None:
        if not isfinite(self.max_drop) or self.max_drop < 0:
            raise InvalidValueError(f"{self!r}: need a finite max_drop of at least 0.")

    def margin(self, row: ScoreRow) -> float:
        """The largest fall allowed, in the scorer's own units.

        Raises:
            InvalidValueError: for a share of a base that is not above zero, which means nothing.
        """
        if not self.applies_to(row):
            raise InvalidValueError(
                f"{self!r}: a share of {row.scorer}'s base mean {row.base:.3g} means nothing. Use relative=False."
            )
        return self.max_drop * (row.base if self.relative else 1.0)

    def applies_to(self, row: ScoreRow) -> bool:
        """Whether there is a margin: a share of a base that is not above zero is none."""
        return not self.relative or row.base > 0

    def status(self, row: ScoreRow) -> Literal["inside", "outside", "inconclusive", "undefined"]:
        """``outside`` if the mean fell by more than allowed, ``inside`` if the whole interval did not, else ``inconclusive``.

        ``undefined`` if the limit is a share of a base mean that is not above zero.
        """
        if not self.applies_to(row):
            return "undefined"
        margin = self.margin(row)
        if row.delta < -margin:
            return "outside"
        return "inside" if row.ci_low >= -margin else "inconclusive"


def describe_row(row: ScoreRow, guardrail: Guardrail | None = None) -> str:
    """One row in words: which way, how far, how sure, and all that speaks against calling it a gain."""
    to = max(row.decimals - 1, 2)
    interval = f"[{row.ci_low:.{to}f}, {row.ci_high:.{to}f}]"
    guarded = guardrail if guardrail is not None and guardrail.applies_to(row) else None
    if row.significant:
        text = f"{row.scorer} {'up' if row.delta > 0 else 'down'} {_amount(row, guarded, to)} {interval}"
    elif guarded is not None and max(-row.ci_low, row.ci_high) <= guarded.margin(row):
        text = f"{row.scorer} unchanged {interval}"
    elif row.direction:
        text = f"{row.scorer} not settled: {row.delta:+.{to}f} {interval}, but p = {row.p_value:.2g} after Holm"
    else:
        text = f"{row.scorer} not clearly changed: {row.delta:+.{to}f} {interval}"
    if row.filtered_by and row.delta > 0:
        text += " (no evidence of a gain: the training pairs were filtered by it)"
    return text if guardrail is None else f"{text}, {_place(row, guardrail)}"


def _amount(row: ScoreRow, guardrail: Guardrail | None, to: int) -> str:
    absolute = f"{abs(row.delta):.{to}f}"
    return (
        absolute
        if guardrail is None or not guardrail.relative
        else f"{100 * abs(row.delta) / row.base:.2g}% ({absolute})"
    )


def _place(row: ScoreRow, guardrail: Guardrail) -> str:
    limit = f"{guardrail.max_drop:.3g}" if not guardrail.relative else f"{100 * guardrail.max_drop:.3g}%"
    said = {
        "inside": f"inside the guardrail of -{limit}",
        "outside": f"outside the guardrail of -{limit}",
        "inconclusive": f"perhaps outside the guardrail of -{limit}: more prompts would tell",
        "undefined": (
            f"its guardrail of -{limit} means nothing, as the base's mean is {row.base:.3g}: set one with relative=False"
        ),
    }
    return said[guardrail.status(row)]
