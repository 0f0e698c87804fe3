"""Statistics of paired differences: bootstrap intervals, sign-flip p-values, Holm's correction, win rates and shares.

All are pure functions. A difference d[i] = candidate[i] - base[i] belongs to prompt i, and prompts are the sample.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from math import comb, lgamma, log

import numpy as np

from artaug._internal.values import value
from artaug.errors import InvalidValueError, NonFiniteError

_CHUNK_DRAWS = 1_000_000  # random numbers held in memory at a time
_SUM_TOLERANCE = 1e-9  # relative: sums of the same numbers in another order count as equal
_FEW = 50  # prompts; from here on the interval of percentiles is as good
_Z_95 = 1.959963984540054  # the normal distribution has 95% of its mass between -z and z
_BISECTIONS = 60  # 2 ** -60 is below the spacing of float64 near 1


@value
class Interval:
    """A confidence interval, both ends included."""

    low: float
    high: float


def paired_bootstrap(
    differences: Sequence[float] | np.ndarray, *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Bootstrap interval of a mean difference: studentised for fewer than 50 differences, else of percentiles.

    Prompts are resampled with replacement. The percentile interval holds the middle ``level`` of the resampled means
    (Efron and Tibshirani 1993, section 13.3). It is narrow for few prompts, and never leaves their range: at 2 prompts a
    mean of zero lies below it in a quarter of samples. The studentised one (section 12.5) holds the means that are no
    further from the sample's than the resampled means are, in standard errors of their own sample. It is nearly that of
    Student's t for symmetric differences, and follows skewed ones further.

    Equal differences have no spread, and their interval is a point, however few they are: see their p-value too.

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
    if len(values) < _FEW:
        return _studentised_interval(values, seed=seed, resamples=resamples, level=level)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for chunk in _chunks(resamples, len(values)):
        # Each row of indices is one bootstrap sample of prompts: (chunk, prompts). A prompt keeps its pair of scores.
        indices = generator.integers(len(values), size=(len(means[chunk]), len(values)))
        means[chunk] = values[indices].mean(axis=1)
    # The percentile interval: quantiles alpha / 2 and 1 - alpha / 2 of the means, alpha = 1 - level.
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(low, high)


def _studentised_interval(values: np.ndarray, *, seed: int, resamples: int, level: float) -> Interval:
    """The smoothed bootstrap-t interval of a mean.

    With mean m and standard error e of the sample, and m*, e* of a bootstrap sample, the quantiles of
    t* = (m* - m) / e* stand in for those of t = (m - mu) / e, so that mu lies in [m - t*_high e, m - t*_low e]. A sample of
    few often repeats one value, and e* = 0 would make the interval infinite: each resampled value gets normal noise of the
    variance e^2 (Polansky and Schucany 1997; Hesterberg 2015, section 4.4.4). At n = 2 the interval is then nearly that of
    Student's t.
    """
    count, mean = len(values), values.mean()
    error = values.std(ddof=1) / count**0.5
    if np.ptp(values) <= _SUM_TOLERANCE * np.abs(values).max():  # equal, but for rounding
        return Interval(mean, mean)
    generator, centered = np.random.default_rng(seed), values - mean
    (noise,) = generator.spawn(1)  # of its own, so that the size of the chunks changes nothing
    ratios = np.empty(resamples)
    for chunk in _chunks(resamples, count):
        shape = (len(ratios[chunk]), count)
        samples = centered[generator.integers(count, size=shape)] + error * noise.standard_normal(shape)
        ratios[chunk] = samples.mean(axis=1) / (samples.std(axis=1, ddof=1) / count**0.5)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean - high * error, mean - low * error)


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


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of so many wins and losses if both are equally likely: the exact binomial test.

    Ties are not counted (Dixon and Mood 1946). It is 1 without wins and losses.

    Raises:
        InvalidValueError: for a count below 0.

    >>> from artaug.evaluation.statistics import sign_test
    >>> sign_test(6, 0), sign_test(3, 3)
    (0.03125, 1.0)
    """
    if wins < 0 or losses < 0:
        raise InvalidValueError(f"sign_test({wins}, {losses}): need counts of at least 0.")
    # The sum over k >= max(wins, losses) of C(total, k), in whole numbers; C(total, k + 1) = C(total, k) (total - k) / (k + 1).
    total, tail = wins + losses, 0
    term = comb(total, max(wins, losses))
    for hits in range(max(wins, losses), total + 1):
        tail += term
        term = term * (total - hits) // (hits + 1)
    return min(1.0, float(2 * tail / 2**total))


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


def wilson_interval(hits: int, total: int) -> Interval:
    """95% interval of a share of which ``hits`` of ``total`` were counted (Wilson 1927); all of [0, 1] for a total of 0.

    Raises:
        InvalidValueError: unless ``0 <= hits <= total``.

    >>> from artaug.evaluation.statistics import wilson_interval
    >>> interval = wilson_interval(2, 8)
    >>> round(interval.low, 3), round(interval.high, 3)
    (0.071, 0.591)
    """
    if not 0 <= hits <= total:
        raise InvalidValueError(f"wilson_interval({hits}, {total}): need 0 <= hits <= total.")
    if total == 0:
        return Interval(0.0, 1.0)
    # The shares p for which (hits / total - p)^2 <= z^2 p (1 - p) / total.
    share, ratio = hits / total, _Z_95**2 / total
    middle = (share + ratio / 2) / (1 + ratio)
    half = (ratio * share * (1 - share) + ratio**2 / 4) ** 0.5 / (1 + ratio)
    return Interval(max(middle - half, 0.0), min(middle + half, 1.0))


def share_bootstrap(
    groups: Sequence[np.ndarray], *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Bootstrap interval of a share, or of the mean of several groups' shares.

    Prompts are resampled with replacement within each group; a group's share is the sum of its numerators over the sum
    of its denominators (a ratio estimate). The interval is that of percentiles if every group has at least 50 prompts that
    are not all alike. Else each group has an interval of its own, studentised as in `paired_bootstrap` and cut at 0 and 1,
    and the interval of their mean is put together of these (Zou and Donner 2008).

    Where all prompts of a group have one share p, no bootstrap sample differs, and the interval would be a point. It is
    then ``[p r, 1 - (1 - p) r]`` with ``r = ((1 - level) / 2) ** (1 / prompts)``: were more than 1 - r of all prompts
    unlike these, one would be among them. If all are right or none is, that is the interval of Clopper and Pearson (1934).

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
    >>> interval = share_bootstrap([np.array([[1, 1, 1, 1], [1, 1, 1, 1]])])
    >>> round(interval.low, 3), interval.high
    (0.398, 1.0)
    """
    _check_groups(groups, resamples, level)
    alike = [bool(np.ptp(group[0] / group[1]) == 0) for group in groups]
    if any(alike) or any(group.shape[1] < _FEW for group in groups):
        varying = [group for group, same in zip(groups, alike, strict=True) if not same]
        parts = [_share_interval(*group, seed=seed, resamples=resamples, level=level) for group in varying]
        if any(alike):
            parts.append(
                _alike_interval([group for group, same in zip(groups, alike, strict=True) if same], level=level)
            )
        return _mean_interval(parts, [1] * len(varying) + [sum(alike)])
    generator, summed_shares = np.random.default_rng(seed), np.zeros(resamples)
    for numerators, denominators in groups:
        count = len(numerators)
        for chunk in _chunks(resamples, count):
            indices = generator.integers(count, size=(len(summed_shares[chunk]), count))
            summed_shares[chunk] += numerators[indices].sum(axis=1) / denominators[indices].sum(axis=1)
    low, high = np.quantile(summed_shares / len(groups), [(1 - level) / 2, 1 - (1 - level) / 2])
    return Interval(low, high)


def _check_groups(groups: Sequence[np.ndarray], resamples: int, level: float) -> None:
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


def _share_interval(
    numerators: np.ndarray, denominators: np.ndarray, *, seed: int, resamples: int, level: float
) -> tuple[float, Interval]:
    """The share of one group whose prompts vary, and its interval."""
    share = float(numerators.sum() / denominators.sum())
    # The ratio estimate is, to first order, the mean of these.
    linearized = share + (numerators - share * denominators) / denominators.mean()
    interval = paired_bootstrap(linearized, seed=seed, resamples=resamples, level=level)
    return share, Interval(max(interval.low, 0.0), min(interval.high, 1.0))


def _alike_interval(groups: Sequence[np.ndarray], *, level: float) -> tuple[float, Interval]:
    """The mean share of groups whose prompts are all alike within a group, and its interval."""
    shares = np.array([numerators.sum() / denominators.sum() for numerators, denominators in groups])
    counts = np.array([group.shape[1] for group in groups])
    low, high = _least_mean(shares, counts, (1 - level) / 2), 1 - _least_mean(1 - shares, counts, (1 - level) / 2)
    return float(shares.mean()), Interval(low, high)


def _least_mean(shares: np.ndarray, counts: np.ndarray, tail: float) -> float:
    """The smallest mean of ``shares * a`` under which prompts like those seen are still seen with probability ``tail``.

    In group g a fraction a[g] of all prompts is like the n[g] seen, and the others are worth nothing, so that
    prod a[g]^n[g] = tail. By Lagrange a[g] = min(1, c n[g] / share[g]); c is found by bisection of its logarithm.
    """
    worth = shares > 0
    if not worth.any():
        return 0.0
    slopes = np.log(counts[worth] / shares[worth])
    low, high = log(tail) - slopes.max(), -slopes.min()
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        too_small = (counts[worth] * np.minimum(middle + slopes, 0)).sum() < log(tail)
        low, high = (middle, high) if too_small else (low, middle)
    return float((shares[worth] * np.exp(np.minimum((low + high) / 2 + slopes, 0))).sum() / len(shares))


def _mean_interval(parts: Sequence[tuple[float, Interval]], weights: Sequence[int]) -> Interval:
    """The interval of the weighted mean of independent estimates with intervals of their own (Zou and Donner 2008, MOVER).

    The squared distances to their lower ends act as variances of the mean's lower end, those to their upper ends as
    variances of its upper end: unlike standard errors, they keep intervals that reach further to one side.
    """
    shares = np.array(weights[: len(parts)]) / sum(weights)
    below = np.array([estimate - interval.low for estimate, interval in parts])
    above = np.array([interval.high - estimate for estimate, interval in parts])
    mean = float(shares @ [estimate for estimate, _ in parts])
    low, high = mean - float(np.linalg.norm(shares * below)), mean + float(np.linalg.norm(shares * above))
    return Interval(max(low, 0.0), min(high, 1.0))


def _chunks(resamples: int, count: int) -> Iterator[slice]:
    """Slices of the bootstrap samples, each small enough to be drawn at a time."""
    size = max(_CHUNK_DRAWS // count, 1)
    return (slice(start, start + size) for start in range(0, resamples, size))


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
