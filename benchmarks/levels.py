"""Nominal levels: how often intervals miss, and how often a verdict calls a change where there is none, by prompts."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from matplotlib.figure import Figure

from artaug.evaluation.comparison.rows import exceeds
from artaug.evaluation.statistics import paired_bootstrap
from benchmarks import _record as record

PROMPTS = (2, 5, 8, 20, 50)
PICTURES = (1, 4)
GAINS = (0.25, 0.5, 1.0)
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def _alike(draw: Draw) -> Draw:
    """Differences of two arms whose scores have the same distribution: what a round without effect gives."""
    return lambda generator, shape: draw(generator, shape) - draw(generator, shape)


DIFFERENCES: dict[str, Draw] = {
    "normal": lambda generator, shape: generator.normal(size=shape),
    "no effect, skewed scores": _alike(lambda generator, shape: generator.lognormal(size=shape)),
    "no effect, scores of 0 or 1": _alike(lambda generator, shape: generator.integers(2, size=shape).astype(float)),
    "mean 0, few large gains": lambda generator, shape: generator.exponential(size=shape) - 1,
    "mean 0, few large losses": lambda generator, shape: 1 - generator.exponential(size=shape),
}
"""Paired differences of pictures, all with a mean of 0. The last two are not exchangeable: a change that evens out."""


def measure(*, quick: bool) -> Iterator[record.Row]:
    """Simulate comparisons without a gain, then with one.

    ``above`` and ``below`` are shares of intervals on one side of the true mean, ``accepted`` that of rounds that a
    `StopRule` accepts: 0.025 nominally. ``percentiles above`` is that of the percentile interval. With a gain, in standard
    deviations of a picture's difference, ``accepted`` is the power.
    """
    runs = 40 if quick else 2000
    for name, draw in DIFFERENCES.items():
        for prompts in PROMPTS:
            for pictures in PICTURES:
                yield {"differences": name, "gain": 0.0, **_row(draw, 0.0, prompts, pictures, runs)}
    for gain in GAINS:
        for prompts in (8, 16, 32, 64, 128):
            yield {"differences": "normal", "gain": gain, **_row(DIFFERENCES["normal"], gain, prompts, 1, runs // 4)}


def _row(draw: Draw, gain: float, prompts: int, pictures: int, runs: int) -> record.Row:
    generator = np.random.default_rng([prompts, pictures])
    above = below = percentiles = accepted = 0
    for run in range(runs):
        values = gain + draw(generator, (pictures, prompts)).mean(axis=0)
        interval = paired_bootstrap(values, seed=run, resamples=1000)
        above += interval.low > gain
        below += interval.high < gain
        means = values[generator.integers(prompts, size=(1000, prompts))].mean(axis=1)
        percentiles += bool(np.quantile(means, 0.025) > gain)
        accepted += exceeds(np.zeros(prompts), values, 0.0, seed=run) if interval.low > 0 else 0
    counts = {"above": above, "below": below, "percentiles above": percentiles, "accepted": accepted}
    shares = {name: count / runs for name, count in counts.items()}
    return {"prompts": prompts, "pictures": pictures, "runs": runs, **shares}


def plot(rows: Sequence[record.Row]) -> Figure:
    """Shares of intervals above a true mean of 0, by prompts; the nominal share is a line."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for place, key in enumerate(("percentiles above", "above", "accepted"), start=1):
        axes = figure.add_subplot(1, 3, place, title=key, xlabel="prompts", xscale="log", ylim=(0, 0.3))
        for name in DIFFERENCES:
            line = [row for row in rows if (row["differences"], row["gain"], row["pictures"]) == (name, 0.0, 1)]
            axes.plot([row["prompts"] for row in line], [row[key] for row in line], marker="o", label=name)
        axes.set_xticks(PROMPTS, [str(count) for count in PROMPTS])
        axes.minorticks_off()
        axes.axhline(0.025, color="#888", linewidth=0.8)
    figure.axes[0].legend(fontsize=7)
    return figure


if __name__ == "__main__":
    record.run("levels", measure, plot)
