"""Thresholds that keep a given fraction of the pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from operator import and_
from typing import final

import numpy as np

from artaug._internal.annotations import checked
from artaug.errors import InvalidValueError
from artaug.evaluation.statistics import Interval, share_interval
from artaug.filtering.algebra import PairFilter, judge_pairs
from artaug.filtering.deltas import score_deltas
from artaug.filtering.thresholds import Gain
from artaug.pairs import ImagePair
from artaug.scoring import Scorer


@checked
@final
@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Thresholds for a target yield, and the yield to expect. ``print`` it to read it."""

    keep: PairFilter
    """The filter with the proposed thresholds."""
    thresholds: Mapping[str, float]
    """By scorer, the gain required, in the scorer's own units."""
    fraction: float
    """The fraction of pairs to keep."""
    kept: int
    """How many of the calibration pairs ``keep`` keeps; more than the fraction where several are equal."""
    pairs: int
    """How many pairs there were to calibrate on."""
    interval: Interval
    """95% interval of the fraction of new pairs that ``keep`` keeps."""

    @property
    def expected(self) -> float:
        """Fraction of the calibration pairs that ``keep`` keeps."""
        return self.kept / self.pairs

    def __str__(self) -> str:
        gains = " and ".join(f"{name} gain >= {number:.4g}" for name, number in self.thresholds.items())
        without_gain = [name for name, number in self.thresholds.items() if number <= 0]
        text = (
            f"{gains}: keeps {self.kept} of {self.pairs} pairs, {self.expected:.1%} (target {self.fraction:.1%}); of new "
            f"pairs, {self.interval.low:.1%} to {self.interval.high:.1%} (95% interval)."
        )
        return f"{text} It keeps pairs that did not gain by {', '.join(without_gain)}." if without_gain else text


@checked
def calibrate(
    pairs: Sequence[ImagePair],
    scorers: Sequence[Scorer],
    *,
    fraction: float = 0.02,
    also: PairFilter | None = None,
) -> Calibration:
    """Propose thresholds for `Gain` that keep a given fraction of pairs; the paper keeps 1 to 2 in 100.

    With several scorers, all are equally strict: each requires the same rank among the pairs, as high as the fraction
    allows. The interval is that of an order statistic (``share_interval``): exact for one scorer, close for several.
    Draw the pairs from prompts like those of the run, and do not train on them.

    Args:
        pairs: what to calibrate on, from a run with a filter that keeps everything; at least ``1 / fraction``.
        scorers: measure the gain; their names must differ.
        fraction: of the pairs to keep, in (0, 1].
        also: a filter that has to agree and is not changed, such as `Similarity`; ``fraction`` includes its effect.

    Raises:
        InvalidValueError: for a fraction outside (0, 1], for too few pairs to keep even one, without scorers or for
            scorers of one name, or if ``also`` alone keeps fewer pairs than that.
        NonFiniteError: if a score is NaN or infinite.

    >>> import artaug as aa
    >>> from artaug.scorers import Exposure
    >>> from PIL import Image
    >>> def lit(light):
    ...     before, after = Image.new("L", (8, 8), 40), Image.new("L", (8, 8), 40 + light)
    ...     return aa.ImagePair(prompt="a hill", seed=0, before=before, after=after, plan=aa.Plan("a hill"))
    >>> print(aa.calibrate([lit(light) for light in range(50)], [Exposure()], fraction=0.1))
    Exposure gain >= 0.4771: keeps 5 of 50 pairs, 10.0% (target 10.0%); of new pairs, 3.3% to 19.2% (95% interval).
    """
    target_count = _target_count(pairs, scorers, fraction)
    gains = np.array([[delta.gain for delta in score_deltas(scorer, pairs)] for scorer in scorers])  # scorers x pairs
    agreed = np.ones(len(pairs), dtype=bool)
    if also is not None:
        agreed = np.array([verdict.keep for verdict in judge_pairs(also, pairs)])
        if agreed.sum() < target_count:
            raise InvalidValueError(
                f"{also!r:.120} alone keeps {agreed.sum()} of {len(pairs)} pairs, and {target_count} are needed. "
                "Loosen it, or choose a lower fraction."
            )
    # Gains of different scorers cannot be compared, their ranks can: rank k = how many pairs gained no more. A pair
    # passes all thresholds of rank k if its lowest rank is at least k, so the k that passes ``target_count`` pairs is
    # the ``target_count``-th highest of the lowest ranks. Equal gains have equal ranks and pass together.
    ranks = np.array([np.searchsorted(np.sort(row), row, side="right") for row in gains])
    required = np.sort(ranks.min(axis=0)[agreed])[-target_count]
    thresholds = {
        scorer.name: float(row[rank >= required].min()) for scorer, row, rank in zip(scorers, gains, ranks, strict=True)
    }
    kept = int(((ranks >= required).all(axis=0) & agreed).sum())
    filters: list[PairFilter] = [Gain(scorer, at_least=thresholds[scorer.name]) for scorer in scorers]
    return Calibration(
        keep=reduce(and_, filters if also is None else [*filters, also]),
        thresholds=thresholds,
        fraction=fraction,
        kept=kept,
        pairs=len(pairs),
        interval=share_interval(kept, len(pairs)),
    )


def _target_count(pairs: Sequence[ImagePair], scorers: Sequence[Scorer], fraction: float) -> int:
    """Check the arguments of `calibrate`; how many pairs to keep, rounded down."""
    names = [scorer.name for scorer in scorers]
    if not names or len(set(names)) < len(names):
        raise InvalidValueError(
            f"calibrate received scorers named {names}. Expected at least one, and different names."
        )
    if not 0 < fraction <= 1:
        raise InvalidValueError(f"calibrate(fraction={fraction}): need a fraction in (0, 1], such as 0.02.")
    exact = Fraction(str(fraction))  # 0.07 of 100 is 7; in floats it is above 7
    if exact * len(pairs) < 1:
        raise InvalidValueError(
            f"{fraction:.1%} of {len(pairs)} pairs is less than one pair: need at least {-(-1 // exact)} pairs, or a "
            "higher fraction."
        )
    return int(exact * len(pairs))
