"""The statistics of the ablation: gain at a given drift, passes to a given gain, and which arm dominates which.

A curve is what an arm does at rising strengths of its LoRA, from 0, where it is the base model. Intervals are of a two-stage
bootstrap (Davison and Hinkley 1997, section 3.8; Saravanan et al. 2020): seeds are drawn with replacement, and for each drawn
seed its prompts, since every seed has its own pairs, training and prompts. All arms of a comparison share the draws, so that
what a seed or a prompt does to all of them cancels in their difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BETTER: Mapping[str, int] = {"gain": 1, "drift": -1, "alignment": 1, "diversity": 1}
"""The measures of a comparison, and whether more (1) or less (-1) of one is better."""
DRIFTS = (0.0005, 0.001, 0.002, 0.004, 0.008)
"""At which gains are compared."""
LEVEL = 0.95
ROUNDING = 1e-9
"""Differences up to it are rounding."""
SAME_PASSES = 0.02
"""Passes within this part of each other are the same: equal budgets differ by the rounding of steps."""


@dataclass(frozen=True, eq=False)
class Curves:
    """What an arm does, seed by seed."""

    strengths: Sequence[float]
    """Ascending from 0."""
    seeds: Sequence[int]
    measures: Mapping[str, Array]
    """Of every measure: (seeds, strengths, prompts)."""
    passes: float
    """Denoiser calls, the mean over seeds."""

    @property
    def means(self) -> Mapping[str, Array]:
        """Of every measure: (seeds, strengths)."""
        return {name: values.mean(axis=-1) for name, values in self.measures.items()}


def at_drift(drifts: Array, values: Array, level: float) -> Array:
    """Values at the strength where the drift first reaches a level above 0, linear in the drift's root between strengths.

    The drift is a squared change, so its root grows as the strength does, and what is measured nearly so too.

    Args:
        drifts: (..., strengths), at ascending strengths from 0, where it is 0.
        values: same shape.
        level: of the drift.

    Returns:
        (...): NaN where the drift stays below the level.
    """
    reached = drifts >= level
    after = np.maximum(reached.argmax(axis=-1), 1)[..., None]
    low, high = (np.take_along_axis(drifts, at, axis=-1) for at in (after - 1, after))
    first, second = (np.take_along_axis(values, at, axis=-1) for at in (after - 1, after))
    found = reached.any(axis=-1, keepdims=True)
    low, high = np.sqrt(low), np.sqrt(high)
    part = np.divide(np.sqrt(level) - low, high - low, where=found & (high > low), out=np.zeros_like(low))
    return np.where(found, first + part * (second - first), np.nan)[..., 0]


def passes_to_gain(passes: Sequence[float], gains: Sequence[float], gain: float) -> float | None:
    """Passes at which a gain is first reached, linear between rising numbers of passes from 0; None if it never is."""
    curve = [(0.0, 0.0), *zip(passes, gains, strict=True)]
    for (before, low), (after, high) in pairwise(curve):
        if low < gain <= high:
            return before + (after - before) * (gain - low) / (high - low)
    return None


@dataclass(frozen=True)
class Advantage:
    """By how much one arm is better than another, with its interval; below 0 it is worse."""

    measure: str
    drift: float | None
    """The drift at which both are measured; None: where their LoRAs are drawn with at strength 1."""
    mean: float
    low: float
    high: float
    surely_above: float
    """The lower end of a wider interval, such that those of all quantities of the comparison hold together."""

    @property
    def worse(self) -> bool:
        """Whether the whole interval is below 0."""
        return self.high < -ROUNDING

    @property
    def better(self) -> bool:
        """Whether the whole wider interval is above 0."""
        return self.surely_above > ROUNDING


@dataclass(frozen=True)
class Comparison:
    """One arm beside another by one of two claims."""

    advantages: tuple[Advantage, ...]
    reaches_as_far: bool
    """Whether the first arm reaches every drift that the second does."""
    passes: float
    """Those of the first arm, as a share of the second's."""

    @property
    def dominates(self) -> bool:
        """Whether the first arm is no worse in anything, and better in something.

        No worse: no quantity's 95% interval of the difference is wholly below 0, it reaches every drift that the other
        reaches, and it takes no more passes. Better: a quantity's interval is wholly above 0, at a level at which the
        intervals of all quantities hold together (Bonferroni), or it takes fewer passes. So an arm that is not dominated is
        one that nothing beats *as far as these seeds and prompts tell*; and where arms differ little, none dominates.
        """
        worse = not self.reaches_as_far or self.passes > 1 + SAME_PASSES or any(one.worse for one in self.advantages)
        fewer = self.passes < 1 / (1 + SAME_PASSES)
        return bool(self.advantages) and not worse and (fewer or any(one.better for one in self.advantages))


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """Compares curves; what it has drawn for one is kept for its other comparisons."""

    resamples: int = 4000
    points: dict[tuple[Curves, tuple[int, ...]], "Points"] = field(default_factory=dict)

    def at_strength_1(self, arm: Curves, other: Curves) -> Comparison:
        """The claim about the LoRA as it was trained: gain, drift, alignment, diversity and passes at strength 1."""
        return self._compare(arm, other, [(name, None) for name in BETTER], reaches_as_far=True)

    def along_the_front(self, arm: Curves, other: Curves) -> Comparison:
        """The claim about the whole curve: gain, alignment and diversity at every drift that both reach, and passes.

        A drift of `DRIFTS` is reached where every seed reaches it. How strong the LoRA has to be drawn with for it does not
        count: strength costs nothing.
        """
        mine, theirs = ({level for level in DRIFTS if reaches(curves, level)} for curves in (arm, other))
        quantities = [(name, level) for level in sorted(mine & theirs) for name in BETTER if name != "drift"]
        return self._compare(arm, other, quantities, reaches_as_far=theirs <= mine)

    def estimate(self, curves: Curves, measure: str, drift: float | None) -> tuple[float, float, float]:
        """The mean over seeds of a measure, at a drift or at strength 1, and the ends of its 95% interval."""
        means = _mean_of_slots(self._points(curves, tuple(curves.seeds))[measure, drift])
        low, high = np.nanquantile(means[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(means[0]), float(low), float(high)

    def _compare(
        self, arm: Curves, other: Curves, quantities: Sequence[tuple[str, float | None]], *, reaches_as_far: bool
    ) -> Comparison:
        common = tuple(sorted(set(arm.seeds) & set(other.seeds)))
        ours, theirs = (self._points(curves, common) for curves in (arm, other))
        joint = 1 - (1 - LEVEL) / max(len(quantities), 1)
        advantages = []
        for name, drift in quantities if common else ():
            differences = _mean_of_slots(BETTER[name] * (ours[name, drift] - theirs[name, drift]))
            ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2, (1 - joint) / 2]
            advantages.append(
                Advantage(name, drift, float(differences[0]), *map(float, np.nanquantile(differences[1:], ends)))
            )
        return Comparison(tuple(advantages), reaches_as_far, passes=arm.passes / other.passes)

    def _points(self, curves: Curves, seeds: tuple[int, ...]) -> "Points":
        if seeds and (curves, seeds) not in self.points:
            self.points[curves, seeds] = _draw_points(curves, seeds, self.resamples)
        return self.points.get((curves, seeds), {})


Points: TypeAlias = Mapping[tuple[str, float | None], Array]
"""Of every measure at every drift, and at strength 1 (None): the data first, then every bootstrap sample, (1 + resamples,
seeds). NaN where a drift is not reached."""


def _draw_points(curves: Curves, seeds: Sequence[int], resamples: int) -> Points:
    where = [curves.seeds.index(seed) for seed in seeds]
    means = {}  # over prompts: (1 + resamples, seeds, strengths)
    for name in BETTER:
        values = curves.measures[name][where].transpose(0, 2, 1)
        weights = _weights(len(seeds), values.shape[1], resamples)
        means[name] = np.concatenate([values.mean(axis=1)[None], weights @ values.reshape(-1, values.shape[2])])
    one = list(curves.strengths).index(1.0)
    points: dict[tuple[str, float | None], Array] = {(name, None): means[name][..., one] for name in BETTER}
    for level in DRIFTS:
        points |= {(name, level): at_drift(means["drift"], means[name], level) for name in BETTER}
    return points


def reaches(curves: Curves, level: float) -> bool:
    """Whether every seed reaches a drift."""
    return bool((curves.means["drift"].max(axis=-1) >= level).all())


@cache
def _weights(seeds: int, prompts: int, resamples: int) -> Array:
    """What every prompt of every seed counts in a seed that was drawn: (resamples, seeds drawn, seeds * prompts)."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(seeds, size=(resamples, seeds))
    counts = generator.multinomial(prompts, [1 / prompts] * prompts, size=(resamples, seeds)) / prompts
    weights = np.zeros((resamples, seeds, seeds, prompts))
    np.put_along_axis(weights, drawn[:, :, None, None], counts[:, :, None], axis=2)
    flat: Array = weights.reshape(resamples, seeds, seeds * prompts)
    return flat


def _mean_of_slots(values: Array) -> Array:
    """The mean over the seeds drawn, without those that do not reach a drift: prompts drawn otherwise may fall just short."""
    reached = np.isfinite(values)
    counts = reached.sum(axis=1)
    sums = np.where(reached, values, 0).sum(axis=1)
    means: Array = np.divide(sums, counts, where=counts > 0, out=np.full(len(values), np.nan))
    return means
