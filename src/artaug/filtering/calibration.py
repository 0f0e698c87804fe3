"""Thresholds that let through a wanted share of the pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from operator import and_
from typing import final

import numpy as np

from artaug.errors import InvalidValueError
from artaug.evaluation.statistics import Interval, share_interval
from artaug.filtering.algebra import PairFilter, judge_pairs
from artaug.filtering.deltas import score_deltas
from artaug.filtering.thresholds import Gain
from artaug.pairs import ImagePair
from artaug.scoring import Scorer


@final
@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Thresholds proposed for a wanted yield, and the yield to expect of them. ``print`` it to read it."""

    keep: PairFilter
    """The filter with the proposed thresholds."""
    thresholds: Mapping[str, float]
    """By scorer, the gain it asks for, in the scorer's own units."""
    fraction: float
    """The wanted share of pairs to keep."""
    kept: int
    """How many of the pairs it was calibrated on it keeps; more than asked for where several are equal."""
    pairs: int
    """How many pairs it was calibrated on."""
    interval: Interval
    """Where, with 95% confidence, the share of new pairs lies that it keeps."""

    @property
    def expected(self) -> float:
        """Share it keeps of the pairs it was calibrated on."""
        return self.kept / self.pairs

    def __str__(self) -> str:
        gains = " and ".join(f"{name} gain >= {number:.4g}" for name, number in self.thresholds.items())
        losing = [name for name, number in self.thresholds.items() if number <= 0]
        text = (
            f"{gains}: keeps {self.kept} of {self.pairs} pairs, {self.expected:.1%} (wanted {self.fraction:.1%}); of new "
            f"pairs, {self.interval.low:.1%} to {self.interval.high:.1%} (95% interval)."
        )
        return f"{text} It keeps pairs that did not gain by {', '.join(losing)}." if losing else text


def calibrate(
    pairs: Sequence[ImagePair],
    scorers: Sequence[Scorer],
    *,
    fraction: float = 0.02,
    also: PairFilter | None = None,
) -> Calibration:
    """Propose thresholds for `Gain` that let through a wanted share of pairs; the paper keeps 1 to 2 in 100.

    With several scorers, all are equally strict: each asks for the same rank among the pairs, and that rank is as
    high as the yield allows. The interval is that of an order statistic (``share_interval``): exact for one scorer, close
    for several. Draw the pairs from prompts like those to come, and leave them out of the training.

    Args:
        pairs: what to calibrate on, from a run with a filter that keeps everything; at least ``1 / fraction``.
        scorers: judge the gain; their names must differ.
        fraction: wanted share of pairs to keep, in (0, 1].
        also: a filter that stays as it is and has to agree, such as `Similarity`; the yield counts it in.

    Raises:
        InvalidValueError: for a yield outside (0, 1], for too few pairs to keep even one, without scorers or for
            scorers of one name, or if ``also`` alone keeps fewer pairs than asked for.
        NonFiniteError: if a score is NaN or infinite.

    >>> import artaug as aa
    >>> from artaug.scorers import Exposure
    >>> from PIL import Image
    >>> def lit(light):
    ...     before, after = Image.new("L", (8, 8), 40), Image.new("L", (8, 8), 40 + light)
    ...     return aa.ImagePair(prompt="a hill", seed=0, before=before, after=after, plan=aa.Plan("a hill"))
    >>> print(aa.calibrate([lit(light) for light in range(50)], [Exposure()], fraction=0.1))
    Exposure gain >= 0.4771: keeps 5 of 50 pairs, 10.0% (wanted 10.0%); of new pairs, 3.3% to 19.2% (95% interval).
    """
    wanted = _wanted(pairs, scorers, fraction)
    gains = np.array([[change.gain for change in score_deltas(scorer, pairs)] for scorer in scorers])
    agreed = np.ones(len(pairs), dtype=bool)
    if also is not None:
        agreed = np.array([verdict.keep for verdict in judge_pairs(also, pairs)])
        if agreed.sum() < wanted:
            raise InvalidValueError(
                f"{also!r:.120} alone keeps {agreed.sum()} of {len(pairs)} pairs, and {wanted} are asked for. "
                "Loosen it, or ask for a lower yield."
            )
    ranks = np.array([np.searchsorted(np.sort(row), row, side="right") for row in gains])
    level = np.sort(ranks.min(axis=0)[agreed])[-wanted]
    thresholds = {
        scorer.name: float(row[rank >= level].min()) for scorer, row, rank in zip(scorers, gains, ranks, strict=True)
    }
    kept = int(((ranks >= level).all(axis=0) & agreed).sum())
    gates: list[PairFilter] = [Gain(scorer, at_least=thresholds[scorer.name]) for scorer in scorers]
    return Calibration(
        keep=reduce(and_, gates if also is None else [*gates, also]),
        thresholds=thresholds,
        fraction=fraction,
        kept=kept,
        pairs=len(pairs),
        interval=share_interval(kept, len(pairs)),
    )


def _wanted(pairs: Sequence[ImagePair], scorers: Sequence[Scorer], fraction: float) -> int:
    """How many pairs to keep."""
    names = [scorer.name for scorer in scorers]
    if not names or len(set(names)) < len(names):
        raise InvalidValueError(
            f"calibrate received scorers named {names}. Expected at least one, and different names."
        )
    if not 0 < fraction <= 1:
        raise InvalidValueError(f"calibrate(fraction={fraction}): need a share in (0, 1], such as 0.02.")
    share = Fraction(str(fraction))  # 0.07 of 100 is 7; in floats it is above 7
    if share * len(pairs) < 1:
        raise InvalidValueError(
            f"{fraction:.1%} of {len(pairs)} pairs is less than one pair: need at least {-(-1 // share)} pairs, or a higher "
            "fraction."
        )
    return int(share * len(pairs))
