"""How large a paired difference is, and how sure: pure functions of the differences, one a prompt."""

from collections.abc import Sequence

import numpy as np

from artaug.errors import InvalidValueError, NonFiniteError
from artaug.values import value

_DRAWS_AT_ONCE = 1_000_000


@value
class Interval:
    """A range that is meant to hold the true value."""

    low: float
    high: float


def paired_bootstrap(
    differences: Sequence[float] | np.ndarray, *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of a mean difference (Efron and Tibshirani 1993, section 13.3).

    Prompts are drawn again with replacement; the interval holds the middle ``level`` of the means. Below about
    twenty differences it is known to be somewhat too narrow.

    Args:
        differences: one paired difference a prompt, at least 2.
        seed: the same seed gives the same interval.
        resamples: how often all prompts are drawn again.
        level: share of the means inside, in (0, 1).

    Raises:
        InvalidValueError: for fewer than two differences, since one says nothing about the spread.
        NonFiniteError: if a difference is NaN or infinite.

    >>> from artaug.statistics import paired_bootstrap
    >>> paired_bootstrap([0.5, 0.5, 0.5])
    Interval(low=0.5, high=0.5)
    """
    values = _differences(differences)
    if len(values) < 2:
        raise InvalidValueError("paired_bootstrap received 1 difference, which says nothing about the spread: need 2.")
    if resamples < 1 or not 0 < level < 1:
        raise InvalidValueError(
            f"paired_bootstrap(resamples={resamples}, level={level}) has no meaning: "
            "need at least 1 resample and a level in (0, 1)."
        )
    generator = np.random.default_rng(seed)
    rows = max(_DRAWS_AT_ONCE // len(values), 1)
    means = np.empty(resamples)
    for start in range(0, resamples, rows):
        part = means[start : start + rows]
        part[:] = values[generator.integers(len(values), size=(len(part), len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(low, high)


def win_rate(differences: Sequence[float] | np.ndarray) -> float:
    """Share of prompts that got better, in [0, 1]; a tie counts half.

    >>> from artaug.statistics import win_rate
    >>> win_rate([0.3, 0.1, 0.0, -0.2])
    0.625
    """
    values = _differences(differences)
    return float(((values > 0) + 0.5 * (values == 0)).mean())


def _differences(differences: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise InvalidValueError(f"expected a list of differences, one a prompt, received shape {values.shape}.")
    if not np.isfinite(values).all():
        raise NonFiniteError(f"difference {int((~np.isfinite(values)).argmax())} is not finite. Expected numbers.")
    return values
