"""How large a paired difference is, and how sure: pure functions of the differences, one a prompt."""

from collections.abc import Sequence
from itertools import product
from math import lgamma, log

import numpy as np

from artaug._internal.values import value
from artaug.errors import InvalidValueError, NonFiniteError

_DRAWS_AT_ONCE = 1_000_000
_NEARLY = 1e-9  # relative: sums of the same numbers in another order are the same
_HALVINGS = 60


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

    >>> from artaug.evaluation.statistics import paired_bootstrap
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

    >>> from artaug.evaluation.statistics import win_rate
    >>> win_rate([0.3, 0.1, 0.0, -0.2])
    0.625
    """
    values = _differences(differences)
    return float(((values > 0) + 0.5 * (values == 0)).mean())


def tie_rate(differences: Sequence[float] | np.ndarray) -> float:
    """Share of prompts that neither won nor lost, in [0, 1].

    >>> from artaug.evaluation.statistics import tie_rate
    >>> tie_rate([0.3, 0.1, 0.0, -0.2])
    0.25
    """
    return float((_differences(differences) == 0).mean())


def sign_flip(differences: Sequence[float] | np.ndarray, *, seed: int = 0, flips: int = 10_000) -> float:
    """Two-sided p-value of a mean difference: how often it would be as large if base and candidate were exchangeable.

    Every difference keeps its size and takes either sign (Fisher 1935, section 21). Where there are at most ``flips``
    ways to choose the signs all are tried, and the p-value is exact; else ``flips`` are drawn, and the one observed
    counts among them (Phipson and Smyth 2010), so that no p-value is ever zero.

    Args:
        differences: one paired difference a prompt. With fewer than 6 none can reach 0.05.
        seed: the same seed gives the same p-value.
        flips: how many ways to try at most.

    Raises:
        InvalidValueError: without differences, or without flips.
        NonFiniteError: if a difference is NaN or infinite.

    >>> from artaug.evaluation.statistics import sign_flip
    >>> sign_flip([0.2, 0.3, 0.1])
    0.25
    """
    values = _differences(differences)
    if flips < 1:
        raise InvalidValueError(f"sign_flip(flips={flips}) has no meaning: need at least 1.")
    observed = abs(values.sum()) * (1 - _NEARLY)
    if 2 ** len(values) <= flips:
        signs = np.array(list(product((-1, 1), repeat=len(values))))
        return float((abs(signs @ values) >= observed).mean())
    generator = np.random.default_rng(seed)
    rows, extreme = max(_DRAWS_AT_ONCE // len(values), 1), 1
    for start in range(0, flips, rows):
        signs = generator.integers(2, size=(min(rows, flips - start), len(values))) * 2 - 1
        extreme += int((abs(signs @ values) >= observed).sum())
    return extreme / (flips + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for asking several questions at once (Holm 1979), in their order.

    Calling what is below 0.05 then calls something wrongly in at most 5 of 100 families, however they depend.

    Raises:
        InvalidValueError: if one is outside [0, 1].

    >>> from artaug.evaluation.statistics import holm
    >>> holm([0.5, 0.125, 0.25])
    [0.5, 0.375, 0.5]
    """
    if not all(0 <= p_value <= 1 for p_value in p_values):
        raise InvalidValueError(f"holm received {list(p_values)}. Expected p-values, all in [0, 1].")
    adjusted, worst, count = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, index in enumerate(sorted(range(count), key=lambda at: p_values[at])):
        worst = max(worst, min((count - rank) * p_values[index], 1.0))
        adjusted[index] = worst
    return adjusted


def share_interval(kept: int, of: int, *, level: float = 0.95) -> Interval:
    """Where the share of new draws lies that reach the ``kept``-th best of ``of`` draws seen.

    A threshold set at an order statistic lets through a share of ``Beta(kept, of - kept + 1)``, whatever is
    distributed how (David and Nagaraja 2003, section 2.1); the interval holds the middle ``level`` of it.

    Raises:
        InvalidValueError: unless ``1 <= kept <= of`` and ``0 < level < 1``.

    >>> from artaug.evaluation.statistics import share_interval
    >>> interval = share_interval(4, 200)
    >>> round(interval.low, 4), round(interval.high, 4)
    (0.0055, 0.0432)
    """
    if not 1 <= kept <= of or not 0 < level < 1:
        raise InvalidValueError(
            f"share_interval({kept}, {of}, level={level}): need 1 <= kept <= of and a level in (0, 1)."
        )
    return Interval(*(_beta_quantile(kept, of, share) for share in ((1 - level) / 2, (1 + level) / 2)))


def share_bootstrap(
    groups: Sequence[np.ndarray], *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of a share, or of the mean of several groups' shares.

    Prompts are drawn again with replacement, each group's among themselves; a share is the sum of parts over the sum of
    wholes. Where nothing or everything is right the bootstrap would see no doubt at all; there the outer end is that of
    Clopper and Pearson (1934) for as many prompts, ``((1 - level) / 2) ** (1 / prompts)`` away from the other.

    Args:
        groups: for each group the parts and the wholes, a column a prompt: (2, prompts).
        seed: the same seed gives the same interval.
        resamples: how often all prompts are drawn again.
        level: share of the results inside, in (0, 1).

    Raises:
        InvalidValueError: without prompts, or for parts that are not within their wholes.

    >>> import numpy as np
    >>> from artaug.evaluation.statistics import share_bootstrap
    >>> interval = share_bootstrap([np.array([[1, 1, 0, 1], [1, 1, 1, 1]])])
    >>> interval.low, interval.high
    (0.25, 1.0)
    """
    if not groups or resamples < 1 or not 0 < level < 1:
        raise InvalidValueError(
            f"share_bootstrap({len(groups)} groups, resamples={resamples}, level={level}) has no meaning: need a group, "
            "at least 1 resample and a level in (0, 1)."
        )
    for group in groups:
        if group.ndim != 2 or len(group) != 2 or not group.size or not ((group[0] >= 0) & (group[0] <= group[1])).all():
            raise InvalidValueError(
                f"share_bootstrap: expected parts and wholes, one a prompt, received {group!r:.120}."
            )
        if not (np.isfinite(group).all() and (group[1] > 0).all()):
            raise NonFiniteError(
                f"share_bootstrap: expected finite parts of wholes above zero, received {group!r:.120}."
            )
    prompts, tail = sum(group.shape[1] for group in groups), (1 - level) / 2
    if all((group[0] == group[1]).all() for group in groups):
        return Interval(tail ** (1 / prompts), 1.0)
    if not any(group[0].any() for group in groups):
        return Interval(0.0, 1 - tail ** (1 / prompts))
    generator, total = np.random.default_rng(seed), np.zeros(resamples)
    for parts, wholes in groups:
        rows = max(_DRAWS_AT_ONCE // len(parts), 1)
        for start in range(0, resamples, rows):
            part = total[start : start + rows]
            drawn = generator.integers(len(parts), size=(len(part), len(parts)))
            part += parts[drawn].sum(axis=1) / wholes[drawn].sum(axis=1)
    low, high = np.quantile(total / len(groups), [tail, 1 - tail])
    return Interval(low, high)


def _beta_quantile(kept: int, of: int, share: float) -> float:
    """Quantile of Beta(kept, of - kept + 1), whose distribution function is a binomial tail: by halving."""
    counts = np.arange(kept, of + 1)
    ways = np.array([lgamma(of + 1) - lgamma(count + 1) - lgamma(of - count + 1) for count in counts])
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        tail = np.exp(ways + counts * log(middle) + (of - counts) * log(1 - middle)).sum() if middle < 1 else 1.0
        low, high = (middle, high) if tail < share else (low, middle)
    return (low + high) / 2


def _differences(differences: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise InvalidValueError(f"expected a list of differences, one a prompt, received shape {values.shape}.")
    if not np.isfinite(values).all():
        raise NonFiniteError(f"difference {int((~np.isfinite(values)).argmax())} is not finite. Expected numbers.")
    return values
