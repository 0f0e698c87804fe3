"""Statistics of paired differences: bootstrap intervals, sign-flip p-values, Holm's correction, win rates and shares.

All are pure functions. A difference d[i] = candidate[i] - base[i] belongs to prompt i, and prompts are the sample.
"""

from collections.abc import Sequence
from itertools import product
from math import lgamma, log

import numpy as np

from artaug._internal.values import value
from artaug.errors import InvalidValueError, NonFiniteError

_CHUNK_DRAWS = 1_000_000  # random numbers held in memory at a time
_SUM_TOLERANCE = 1e-9  # relative: sums of the same numbers in another order count as equal
_BISECTIONS = 60  # 2 ** -60 is below the spacing of float64 near 1


@value
class Interval:
    """A confidence interval, both ends included."""

    low: float
    high: float


def paired_bootstrap(
    differences: Sequence[float] | np.ndarray, *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of a mean difference (Efron and Tibshirani 1993, section 13.3).

    Prompts are resampled with replacement; the interval holds the middle ``level`` of the resampled means. Below about
    twenty differences it is known to be somewhat too narrow.

    Args:
        differences: one paired difference a prompt, at least 2.
        seed: the same seed gives the same interval.
        resamples: number of bootstrap samples, each as large as the sample.
        level: share of the resampled means inside, in (0, 1).

    Raises:
        InvalidValueError: for fewer than two differences, since one says nothing about the spread.
        NonFiniteError: if a difference is NaN or infinite.

    >>> from artaug.evaluation.statistics import paired_bootstrap
    >>> paired_bootstrap([0.5, 0.5, 0.5])
    Interval(low=0.5, high=0.5)
    """
    values = _as_array(differences)
    if len(values) < 2:
        raise InvalidValueError("paired_bootstrap received 1 difference, which has no spread: need at least 2.")
    if resamples < 1 or not 0 < level < 1:
        raise InvalidValueError(
            f"paired_bootstrap(resamples={resamples}, level={level}): need at least 1 resample and a level in (0, 1)."
        )
    generator = np.random.default_rng(seed)
    chunk_size = max(_CHUNK_DRAWS // len(values), 1)
    means = np.empty(resamples)
    for start in range(0, resamples, chunk_size):
        chunk = means[start : start + chunk_size]
        # Each row of indices is one bootstrap sample of prompts: (chunk, prompts). A prompt keeps its pair of scores.
        indices = generator.integers(len(values), size=(len(chunk), len(values)))
        chunk[:] = values[indices].mean(axis=1)
    # The percentile interval: quantiles alpha / 2 and 1 - alpha / 2 of the means, alpha = 1 - level.
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(low, high)


def win_rate(differences: Sequence[float] | np.ndarray) -> float:
    """Share of prompts that got better, in [0, 1]; a tie counts half, as in the Mann-Whitney statistic.

    >>> from artaug.evaluation.statistics import win_rate
    >>> win_rate([0.3, 0.1, 0.0, -0.2])
    0.625
    """
    values = _as_array(differences)
    return float(((values > 0) + 0.5 * (values == 0)).mean())


def tie_rate(differences: Sequence[float] | np.ndarray) -> float:
    """Share of prompts that neither won nor lost, in [0, 1].

    >>> from artaug.evaluation.statistics import tie_rate
    >>> tie_rate([0.3, 0.1, 0.0, -0.2])
    0.25
    """
    return float((_as_array(differences) == 0).mean())


def sign_flip(differences: Sequence[float] | np.ndarray, *, seed: int = 0, flips: int = 10_000) -> float:
    """Two-sided p-value of a mean difference: how often it is as large if base and candidate are exchangeable.

    Every difference keeps its size and takes either sign (Fisher 1935, section 21). Where there are at most ``flips``
    assignments of signs, all are tried and the p-value is exact; else ``flips`` are drawn, and the observed one counts
    among them (Phipson and Smyth 2010), so that no p-value is zero.

    Args:
        differences: one paired difference a prompt. With fewer than 6 no p-value can be below 0.05.
        seed: the same seed gives the same p-value.
        flips: the largest number of sign assignments to try.

    Raises:
        InvalidValueError: without differences, or without flips.
        NonFiniteError: if a difference is NaN or infinite.

    >>> from artaug.evaluation.statistics import sign_flip
    >>> sign_flip([0.2, 0.3, 0.1])
    0.25
    """
    values = _as_array(differences)
    if flips < 1:
        raise InvalidValueError(f"sign_flip(flips={flips}): need at least 1.")
    # The statistic is |sum(s * d)| with signs s. As extreme means >=, so the observed assignment counts itself; it is
    # summed in another order below, hence the tolerance.
    observed = abs(values.sum()) * (1 - _SUM_TOLERANCE)
    if 2 ** len(values) <= flips:
        signs = np.array(list(product((-1, 1), repeat=len(values))))  # (2 ** prompts, prompts)
        return float((abs(signs @ values) >= observed).mean())
    generator = np.random.default_rng(seed)
    chunk_size = max(_CHUNK_DRAWS // len(values), 1)
    extreme = 1  # p = (1 + extreme draws) / (1 + draws)
    for start in range(0, flips, chunk_size):
        signs = generator.integers(2, size=(min(chunk_size, flips - start), len(values))) * 2 - 1
        extreme += int((abs(signs @ values) >= observed).sum())
    return extreme / (flips + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of a family of tests (Holm 1979); they come back in the order given.

    If every adjusted p-value below 0.05 is called significant, at most 5 of 100 families have a false one among them,
    however the tests depend on each other.

    Raises:
        InvalidValueError: if one is outside [0, 1].

    >>> from artaug.evaluation.statistics import holm
    >>> holm([0.5, 0.125, 0.25])
    [0.5, 0.375, 0.5]
    """
    if not all(0 <= p_value <= 1 for p_value in p_values):
        raise InvalidValueError(f"holm received {list(p_values)}. Expected p-values, all in [0, 1].")
    # In rising order p(1) <= ... <= p(m), the adjusted value is the running maximum of (m - i + 1) p(i), at most 1.
    count = len(p_values)
    adjusted, running_max = [0.0] * count, 0.0
    for rank, index in enumerate(sorted(range(count), key=lambda index: p_values[index])):
        running_max = max(running_max, min((count - rank) * p_values[index], 1.0))
        adjusted[index] = running_max
    return adjusted


def share_interval(kept: int, total: int, *, level: float = 0.95) -> Interval:
    """Interval of the share of future draws that reach a threshold set at the ``kept``-th best of ``total`` draws.

    The share above an order statistic is distributed as ``Beta(kept, total - kept + 1)``, whatever the distribution of
    the draws (David and Nagaraja 2003, section 2.1); the interval holds the middle ``level`` of it.

    Raises:
        InvalidValueError: unless ``1 <= kept <= total`` and ``0 < level < 1``.

    >>> from artaug.evaluation.statistics import share_interval
    >>> interval = share_interval(4, 200)
    >>> round(interval.low, 4), round(interval.high, 4)
    (0.0055, 0.0432)
    """
    if not 1 <= kept <= total or not 0 < level < 1:
        raise InvalidValueError(
            f"share_interval({kept}, {total}, level={level}): need 1 <= kept <= total and a level in (0, 1)."
        )
    return Interval(*(_beta_quantile(kept, total, tail) for tail in ((1 - level) / 2, (1 + level) / 2)))


def share_bootstrap(
    groups: Sequence[np.ndarray], *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of a share, or of the mean of several groups' shares.

    Prompts are resampled with replacement within each group; a group's share is the sum of its numerators over the sum
    of its denominators (a ratio estimate). If all shares are 0 or all are 1, every bootstrap sample is the same and the
    interval would be a point; its open end is then that of Clopper and Pearson (1934) for as many prompts,
    ``((1 - level) / 2) ** (1 / prompts)`` for all right, 1 less that for none.

    Args:
        groups: for each group the numerators and the denominators, a column a prompt: (2, prompts).
        seed: the same seed gives the same interval.
        resamples: number of bootstrap samples.
        level: share of the results inside, in (0, 1).

    Raises:
        InvalidValueError: without prompts, or for numerators outside [0, denominator].
        NonFiniteError: if a number is not finite, or a denominator is zero.

    >>> import numpy as np
    >>> from artaug.evaluation.statistics import share_bootstrap
    >>> interval = share_bootstrap([np.array([[1, 1, 0, 1], [1, 1, 1, 1]])])
    >>> interval.low, interval.high
    (0.25, 1.0)
    """
    if not groups or resamples < 1 or not 0 < level < 1:
        raise InvalidValueError(
            f"share_bootstrap({len(groups)} groups, resamples={resamples}, level={level}): need at least 1 group, at "
            "least 1 resample and a level in (0, 1)."
        )
    for group in groups:
        if group.ndim != 2 or len(group) != 2 or not group.size or not ((group[0] >= 0) & (group[0] <= group[1])).all():
            raise InvalidValueError(
                f"share_bootstrap: expected numerators and denominators, one a prompt, received {group!r:.120}."
            )
        if not (np.isfinite(group).all() and (group[1] > 0).all()):
            raise NonFiniteError(
                f"share_bootstrap: expected finite numerators and denominators above zero, received {group!r:.120}."
            )
    prompts, tail = sum(group.shape[1] for group in groups), (1 - level) / 2
    # Clopper and Pearson for k = n successes: the low end solves p ** n = tail; for k = 0 the high end (1 - p) ** n = tail.
    if all((group[0] == group[1]).all() for group in groups):
        return Interval(tail ** (1 / prompts), 1.0)
    if not any(group[0].any() for group in groups):
        return Interval(0.0, 1 - tail ** (1 / prompts))
    generator, summed_shares = np.random.default_rng(seed), np.zeros(resamples)
    for numerators, denominators in groups:
        count = len(numerators)
        chunk_size = max(_CHUNK_DRAWS // count, 1)
        for start in range(0, resamples, chunk_size):
            chunk = summed_shares[start : start + chunk_size]
            indices = generator.integers(count, size=(len(chunk), count))
            chunk += numerators[indices].sum(axis=1) / denominators[indices].sum(axis=1)
    low, high = np.quantile(summed_shares / len(groups), [tail, 1 - tail])
    return Interval(low, high)


def _beta_quantile(kept: int, total: int, probability: float) -> float:
    """Quantile of Beta(kept, total - kept + 1), by bisection.

    Its distribution function at x is a binomial tail: P(at least ``kept`` of ``total`` successes of probability x),
    sum over k >= kept of C(total, k) x^k (1 - x)^(total - k). The terms are taken in logarithms, as C(total, k)
    overflows.
    """
    counts = np.arange(kept, total + 1)
    log_binomials = np.array([lgamma(total + 1) - lgamma(k + 1) - lgamma(total - k + 1) for k in counts])
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        x = (low + high) / 2
        tail = np.exp(log_binomials + counts * log(x) + (total - counts) * log(1 - x)).sum() if x < 1 else 1.0
        low, high = (x, high) if tail < probability else (low, x)
    return (low + high) / 2


def _as_array(differences: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise InvalidValueError(f"expected a list of differences, one a prompt, received shape {values.shape}.")
    if not np.isfinite(values).all():
        raise NonFiniteError(f"difference {int((~np.isfinite(values)).argmax())} is not finite. Expected numbers.")
    return values
