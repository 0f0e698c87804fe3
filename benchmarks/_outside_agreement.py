"""Where judges disagree: rank correlations over candidates, and changes of opposite sign."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from artaug.evaluation.statistics import paired_bootstrap
from benchmarks import _record as record
from benchmarks._outside_exam import Measures
from benchmarks._outside_judges import Array

SIGNED = (("gain", "toward"), ("gain", "brisque"), ("color", "probe color"), ("shape", "probe shape"))
"""A measure of ours and its counterpart that is not: both rise where pictures become better."""
SIZES = (("drift", "content"), ("drift", "frechet"), ("gain", "nearer to rendered"))
"""Likewise, where only the order of the candidates can be compared."""
RESAMPLES = 2000


def columns(measures: Measures, distances: Mapping[str, float]) -> dict[str, Any]:
    """The mean of each measure, its 95% interval over prompts, and the pairs of measures of opposite sign.

    ``opposite`` names pairs whose changes have opposite signs, both with an interval that excludes zero; ``one only``
    those of which one alone excludes it.
    """
    intervals = {name: paired_bootstrap(values) for name, values in measures.items()}
    signs = {name: (interval.low > 0) - (interval.high < 0) for name, interval in intervals.items()}
    products = {f"{ours} / {theirs}": (signs[ours], signs[theirs]) for ours, theirs in SIGNED}
    return {
        **{name: float(values.mean()) for name, values in measures.items()},
        **distances,
        "intervals": {name: [interval.low, interval.high] for name, interval in intervals.items()},
        "opposite": [name for name, (ours, theirs) in products.items() if ours * theirs < 0],
        "one only": [name for name, (ours, theirs) in products.items() if (ours == 0) != (theirs == 0)],
    }


def agreement(rows: Sequence[record.Row]) -> list[record.Row]:
    """Of each pair of measures: the rank correlation over LoRAs, its 95% interval, and how many disagree in sign.

    The interval is of percentiles of a bootstrap over LoRAs: it says nothing of other arms.
    """
    loras = [row for row in rows if row["kind"] == "LoRA"]
    results: list[record.Row] = []
    for ours, theirs in (*SIGNED, *SIZES):
        pair = np.array([[row[ours], row[theirs]] for row in loras])
        name = f"{ours} / {theirs}"
        results.append(
            {
                "ours": ours,
                "theirs": theirs,
                "loras": len(loras),
                **rank_correlation(pair),
                "opposite": sum(name in row["opposite"] for row in loras) if (ours, theirs) in SIGNED else None,
                "one only": sum(name in row["one only"] for row in loras) if (ours, theirs) in SIGNED else None,
            }
        )
    return results


def rank_correlation(pair: Array) -> dict[str, float | None]:
    """Spearman's, None where it has no value: of fewer than three candidates, or of equal numbers."""
    nothing: dict[str, float | None] = {"correlation": None, "low": None, "high": None}
    if len(pair) < 3 or not np.ptp(pair, axis=0).all():
        return nothing
    indices = np.random.default_rng(0).integers(0, len(pair), (RESAMPLES, len(pair)))
    low, high = np.nanquantile(_spearman(pair[indices]), [0.025, 0.975])
    return {"correlation": float(_spearman(pair[None])[0]), "low": float(low), "high": float(high)}


def _spearman(samples: Array) -> Array:
    """Of (samples, candidates, 2): one correlation a sample, NaN where all numbers are equal."""
    from scipy.stats import rankdata  # noqa: PLC0415 - comes with the judges, whose absence is told first

    ranks: Array = rankdata(samples, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    lengths = np.sqrt(np.square(ranks).sum(1)).prod(1)
    products = ranks.prod(2).sum(1)
    correlations: Array = np.divide(products, lengths, out=np.full_like(products, np.nan), where=lengths > 0)
    return correlations


def plot(rows: Sequence[record.Row]) -> Figure:
    """Every measure of ours beside its counterpart: a point a LoRA, a cross a control."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    pairs = [*SIGNED, *SIZES]
    for place, (ours, theirs) in enumerate(pairs):
        axes = figure.add_subplot(2, 4, place + 1, xlabel=f"ours: {ours}", ylabel=f"not ours: {theirs}")
        _scatter(axes, rows, ours, theirs, signed=(ours, theirs) in SIGNED)
    legend = figure.add_subplot(2, 4, 8)
    legend.axis("off")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    legend.legend(handles, labels, loc="center", frameon=False, fontsize=9)
    return figure


def _scatter(axes: Axes, rows: Sequence[record.Row], ours: str, theirs: str, *, signed: bool) -> None:
    if signed:
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.axvline(0, color="grey", linewidth=0.8)
    strengths = sorted({row["strength"] for row in rows if row["kind"] == "LoRA"})
    for number, strength in enumerate(strengths):
        mine = [row for row in rows if row["kind"] == "LoRA" and row["strength"] == strength]
        axes.scatter(
            [row[ours] for row in mine],
            [row[theirs] for row in mine],
            s=14,
            alpha=0.7,
            color=f"C{number}",
            label=f"LoRA at strength {strength:g}",
        )
    for number, row in enumerate(row for row in rows if row["kind"] == "control"):
        axes.scatter(row[ours], row[theirs], s=45, marker="x", color=f"C{number + 3}", label=row["name"])
