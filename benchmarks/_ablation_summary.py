"""The results of the ablation: rows without their lists, the fronts, which arm dominates which, and passes to a gain."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks import _record as record
from benchmarks._ablation_arms import ARMS, DEFAULT, steps_of_equal_passes
from benchmarks._ablation_cells import Settings
from benchmarks._ablation_statistics import (
    BETTER,
    DRIFTS,
    Bootstrap,
    Comparison,
    Curves,
    at_drift,
    passes_to_gain,
    reaches,
)

LISTS = ("curve", "strengths", "made_by")
"""What a journal's row has that the results do not repeat."""
COMPARED = ("front", "rounds")
"""Axes whose arms are compared with each other."""
GAINS = (0.03, 0.06, 0.09)
"""To which passes are counted."""


def flat_rows(rows: Sequence[record.Row], settings: Settings) -> Iterator[record.Row]:
    """One row per strength, with means over prompts; strength 0, the base model, is the control ``nothing``."""
    for row in rows:
        columns = {name: cell for name, cell in row.items() if name not in LISTS}
        if row["axis"] in COMPARED:
            columns["budgets"] = budgets(row, settings)
        for number, strength in enumerate(row["strengths"]):
            if strength > 0:
                yield (
                    columns
                    | {"strength": strength}
                    | {name: round(fmean(curve[number]), 7) for name, curve in row["curve"].items()}
                )


@dataclass(frozen=True)
class Panel:
    """Arms that are compared with each other."""

    axis: str
    kind: str
    budget: str
    """What is equal for all of them: ``passes`` or ``steps``."""
    rounds: int = 1


def panels(rows: Sequence[record.Row], settings: Settings) -> Mapping[Panel, Mapping[str, Curves]]:
    """The curves of the fronts and of every round, by panel and arm."""
    found: dict[Panel, dict[str, list[record.Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["axis"] in COMPARED:
            for budget in budgets(row, settings):
                found[Panel(row["axis"], row["kind"], budget, row["rounds"])][row["arm"]].append(row)
    return {panel: {arm: _curves(mine) for arm, mine in arms.items()} for panel, arms in found.items()}


def budgets(row: record.Row, settings: Settings) -> list[str]:
    """The budgets that a row of the axes front and rounds is within."""
    equal_passes = row["steps"] == steps_of_equal_passes(ARMS[row["arm"]], settings.steps)
    return ["passes"] * equal_passes + ["steps"] * (row["axis"] == "front" and row["steps"] == settings.steps)


def _curves(rows: Sequence[record.Row]) -> Curves:
    """The rows of one arm; in rounds, passes are those of making pairs too, since arms leave the critic more or less to say."""
    rows = sorted(rows, key=lambda row: row["seed"])
    strengths = sorted(set.intersection(*(set(row["strengths"]) for row in rows)))  # of rows measured so far
    measures = {
        name: np.array([[row["curve"][name][row["strengths"].index(s)] for s in strengths] for row in rows])
        for name in rows[0]["curve"]
    }
    return Curves(
        strengths=strengths,
        seeds=[row["seed"] for row in rows],
        measures=measures,
        passes=fmean(row["passes" if row["axis"] == "rounds" else "learning_passes"] for row in rows),
    )


def fronts(by_panel: Mapping[Panel, Mapping[str, Curves]], bootstrap: Bootstrap) -> Iterator[record.Row]:
    """What every arm measures at a drift, or at strength 1 (drift null): per seed, the mean, and its 95% interval.

    A seed that does not reach the drift has null, and the mean then too.
    """
    for panel, arms in by_panel.items():
        for arm, curves in arms.items():
            for drift in (None, *(level for level in DRIFTS if reaches(curves, level))):
                row = asdict(panel) | {"arm": arm, "passes": curves.passes, "at_drift": drift}
                for name in BETTER:
                    mean, low, high = bootstrap.estimate(curves, name, drift)
                    row |= {name: mean, f"{name}_low": low, f"{name}_high": high}
                yield row | {"seeds": curves.seeds, "gains": _by_seed(curves, drift)}
            for drift in (level for level in DRIFTS if not reaches(curves, level)):
                missing = dict.fromkeys(name + end for name in BETTER for end in ("", "_low", "_high"))
                row = asdict(panel) | {"arm": arm, "passes": curves.passes, "at_drift": drift} | missing
                yield row | {"seeds": curves.seeds, "gains": _by_seed(curves, drift)}


def _by_seed(curves: Curves, drift: float | None) -> list[float | None]:
    if drift is None:
        return [float(gain) for gain in curves.means["gain"][:, list(curves.strengths).index(1.0)]]
    gains = at_drift(curves.means["drift"], curves.means["gain"], drift)
    return [float(gain) if np.isfinite(gain) else None for gain in gains]


def dominance(by_panel: Mapping[Panel, Mapping[str, Curves]], bootstrap: Bootstrap) -> Iterator[record.Row]:
    """Who dominates whom by which claim; and how every arm compares with the default, dominated or not."""
    for panel, arms in by_panel.items():
        for claim, compare in (
            ("at strength 1", bootstrap.at_strength_1),
            ("along the front", bootstrap.along_the_front),
        ):
            for arm, curves in arms.items():
                for over, others in arms.items():
                    comparison = compare(curves, others)
                    if arm != over and (comparison.dominates or over == DEFAULT):
                        yield asdict(panel) | {"claim": claim, "arm": arm, "over": over} | _columns(comparison)


def _columns(comparison: Comparison) -> dict[str, Any]:
    advantages = [
        {"measure": one.measure, "at_drift": one.drift, "mean": one.mean, "low": one.low, "high": one.high}
        | {"better": one.better, "worse": one.worse}
        for one in comparison.advantages
    ]
    return {
        "dominates": comparison.dominates,
        "reaches_as_far": comparison.reaches_as_far,
        "passes": comparison.passes,
        "advantages": advantages,
    }


def costs(rows: Sequence[record.Row], settings: Settings) -> Iterator[record.Row]:
    """Passes to a gain at strength 1: those of learning in one round, and all, with the pairs', over the rounds."""
    lines: dict[tuple[str, str, str, int], list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        gain = fmean(row["curve"]["gain"][row["strengths"].index(1.0)])
        if row["axis"] == "cost" or (row["axis"] == "front" and "passes" in budgets(row, settings)):
            lines["learning", row["kind"], row["arm"], row["seed"]].append((row["learning_passes"], gain))
        elif row["axis"] == "rounds":
            lines["rounds", row["kind"], row["arm"], row["seed"]].append((row["passes"], gain))
    for (over, kind, arm, seed), points in lines.items():
        if len(points) > 1:
            passes, gains = zip(*sorted(points), strict=True)
            to_gains = {f"to {gain:g}": passes_to_gain(passes, gains, gain) for gain in GAINS}
            yield {"over": over, "kind": kind, "arm": arm, "seed": seed, "passes": passes, "gains": gains} | to_gains
