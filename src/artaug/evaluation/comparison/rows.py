"""The rows of a comparison, its guardrails, and what both say in words."""

from math import ceil, floor, isfinite, log2, log10
from sys import float_info
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field

from artaug._internal.values import value
from artaug.errors import InvalidValueError
from artaug.evaluation.statistics import Interval, paired_bootstrap, share_bootstrap, sign_flip, tie_rate, win_rate

_ALPHA = 0.05
_FILTERED = " (no evidence of a gain: the training pairs were filtered by it)"
FEWEST_PROMPTS = ceil(log2(2 / _ALPHA))
"""With fewer prompts no row can be significant: the smallest p-value of n sign flips is 2 / 2^n."""


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
    """Number of different prompts; one that is listed more than once counts once, by its mean."""
    filtered_by: bool = False
    """Whether the training pairs were filtered by this scorer or a part of it, which then says less than the others."""
    tie_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of prompts on which both score the same."""
    p_value: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Two-sided sign-flip p-value of the difference, after Holm's correction over the scorers of this candidate."""
    judged: bool = False
    """Whether a `PairwiseJudge` compared the candidate's pictures to the base's. Then ``enhanced`` is the candidate's win rate,
    with ties as half, ``base`` is 0.5, the base's win rate against itself, and the interval lies within [0, 1] of the rate."""

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
        judged: bool = False,
    ) -> Self:
        """The row of two arms' scores of the same prompts, (prompts,) each; ``seed`` is the bootstrap's."""
        deltas = enhanced - base
        if judged:
            share = share_bootstrap([np.stack([enhanced, np.ones_like(enhanced)])], seed=seed)
            interval = Interval(share.low - base.mean(), share.high - base.mean())
        else:
            interval = paired_bootstrap(deltas, seed=seed)
        return cls(
            scorer=scorer,
            candidate=candidate,
            base=base.mean(),
            enhanced=enhanced.mean(),
            delta=deltas.mean(),
            ci_low=interval.low,
            ci_high=interval.high,
            win_rate=win_rate(deltas),
            n=len(deltas),
            filtered_by=filtered_by,
            tie_rate=tie_rate(deltas),
            p_value=p_value,
            judged=judged,
        )

    @property
    def decimals(self) -> int:
        """Decimals worth printing: those that show the first digit of the interval's half width, from 3 to 8."""
        half_width = (self.ci_high - self.ci_low) / 2
        rounding = 16 * float_info.epsilon * max(abs(self.base), abs(self.enhanced))  # of means of equal differences
        return min(max(-floor(log10(half_width)), 3), 8) if half_width > rounding else 3

    @property
    def direction(self) -> int:
        """1 if the whole interval lies above zero, -1 if it lies below, else 0."""
        return int(self.ci_low > 0) - int(self.ci_high < 0)

    @property
    def significant(self) -> bool:
        """Whether the whole interval lies on one side of zero and the p-value, corrected, is below 0.05."""
        return self.direction != 0 and self.p_value < _ALPHA


def exceeds(base: np.ndarray, enhanced: np.ndarray, at_least: float, *, seed: int, judged: bool = False) -> bool:
    """Whether the gain lies above ``at_least`` by the criterion of `ScoreRow.significant`, with a single scorer.

    The whole interval of the differences less ``at_least`` has to lie above zero, and their p-value below 0.05.
    """
    p_value = sign_flip(enhanced - base - at_least, seed=seed)
    shifted = ScoreRow.of(
        "", "", base=base + at_least, enhanced=enhanced, p_value=p_value, filtered_by=False, seed=seed, judged=judged
    )
    return shifted.significant and shifted.direction > 0


def finite_pairs(
    base: np.ndarray, enhanced: np.ndarray, clusters: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The scores that both arms have, one a cluster of equal prompts, without those on which a scorer failed (NaN).

    Args:
        base: one score a prompt.
        enhanced: likewise.
        clusters: one number a prompt; prompts of one number are repetitions, and count once, by their mean: two pictures
            of a prompt are no independent evidence. None if all prompts are different.
    """
    both = np.isfinite(base) & np.isfinite(enhanced)
    if clusters is None:
        return base[both], enhanced[both]
    members = np.unique(clusters[both], return_inverse=True)[1]
    counts = np.bincount(members)
    base, enhanced = (np.bincount(members, weights=scores[both]) / counts for scores in (base, enhanced))
    return base, enhanced


@value
class ScoringFailure:
    """A picture on which a scorer raised. The rows of that scorer are computed from the other prompts."""

    scorer: str
    arm: str
    """Whose picture it is: ``base``, or the name of a candidate."""
    prompt: str
    seed: int
    error: str
    """Type and message of the exception."""


@value
class Guardrail:
    """How far one scorer may fall while others rise. It limits the fall, not the chance of one: see `status`.

    Raises:
        InvalidValueError: if the limit is negative or not finite.

    >>> import artaug as aa
    >>> row = aa.ScoreRow("diversity", "round 1", 0.50, 0.48, -0.02, -0.03, -0.015, 0.4, 64, p_value=0.01)
    >>> aa.Guardrail("diversity", 0.02).status(row)
    'outside'
    """

    scorer: str
    """The name of the row it limits."""
    max_drop: float
    """As a share of the base's mean (0.02 for 2%), or in the scorer's own units if not ``relative``."""
    relative: bool = True

    def __post_init__(self) -> None:
        if not isfinite(self.max_drop) or self.max_drop < 0:
            raise InvalidValueError(f"{self!r}: need a finite max_drop of at least 0.")

    def applies_to(self, row: ScoreRow) -> bool:
        """Whether the limit is defined: a share of a base mean that is not above zero is not."""
        return not self.relative or row.base > 0

    def margin(self, row: ScoreRow) -> float:
        """The largest fall allowed, in the scorer's own units.

        Raises:
            InvalidValueError: if the limit is a share of a base mean that is not above zero.
        """
        if not self.applies_to(row):
            raise InvalidValueError(
                f"{self!r}: a share of {row.scorer}'s base mean {row.base:.3g} is undefined. Use relative=False."
            )
        return self.max_drop * (row.base if self.relative else 1.0)

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
    """One row in words: which way it went, how far, how sure that is, and what speaks against calling it a gain."""
    if row.judged:
        text = _describe_win_rate(row)
        return text if guardrail is None else f"{text}, {_describe_status(row, guardrail)}"
    decimals = max(row.decimals - 1, 2)
    interval = f"[{row.ci_low:.{decimals}f}, {row.ci_high:.{decimals}f}]"
    limit = guardrail if guardrail is not None and guardrail.applies_to(row) else None
    if row.significant:
        amount = f"{abs(row.delta):.{decimals}f}"
        if limit is not None and limit.relative:
            amount = f"{100 * abs(row.delta) / row.base:.2g}% ({amount})"
        text = f"{row.scorer} {'up' if row.delta > 0 else 'down'} {amount} {interval}"
    elif limit is not None and max(-row.ci_low, row.ci_high) <= limit.margin(row):
        # An equivalence test: the whole interval lies within the margin, on both sides of zero.
        text = f"{row.scorer} unchanged {interval}"
    elif row.direction:
        text = (
            f"{row.scorer} not significant: {row.delta:+.{decimals}f} {interval}, but p = {row.p_value:.2g} after Holm"
        )
    else:
        text = f"{row.scorer} not clearly changed: {row.delta:+.{decimals}f} {interval}"
    if row.filtered_by and row.delta > 0:
        text += _FILTERED
    return text if guardrail is None else f"{text}, {_describe_status(row, guardrail)}"


def _describe_win_rate(row: ScoreRow) -> str:
    interval = f"[{100 * (row.base + row.ci_low):.1f}%, {100 * (row.base + row.ci_high):.1f}%]"
    rate = f"win rate {100 * row.enhanced:.1f}% {interval}"
    if row.significant:
        text = f"{row.scorer} prefers {'it' if row.delta > 0 else 'the base'}, {rate}"
    elif row.direction:
        text = f"{row.scorer} not significant: {rate}, but p = {row.p_value:.2g} after Holm"
    else:
        text = f"{row.scorer} without a clear preference: {rate}"
    return text + _FILTERED * (row.filtered_by and row.delta > 0)


def _describe_status(row: ScoreRow, guardrail: Guardrail) -> str:
    limit = f"{100 * guardrail.max_drop:.3g}%" if guardrail.relative else f"{guardrail.max_drop:.3g}"
    return {
        "inside": f"inside the guardrail of -{limit}",
        "outside": f"outside the guardrail of -{limit}",
        "inconclusive": f"perhaps outside the guardrail of -{limit}: more prompts would narrow the interval",
        "undefined": (
            f"its guardrail of -{limit} is undefined, as the base's mean is {row.base:.3g}: set one with relative=False"
        ),
    }[guardrail.status(row)]
