"""The results of `benchmarks.online`: each arm on each base, at equal drift and at strength 1, and beside the critic."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import numpy as np

from benchmarks import _record as record
from benchmarks._ablation_statistics import BETTER, DRIFTS, Advantage, Bootstrap, Curves, reaches
from benchmarks._online_arms import LOOP
from benchmarks._online_cells import BASE


@dataclass(frozen=True, kw_only=True)
class Group:
    """The cells of all seeds."""

    arm: str
    spread: float
    draws: int
    rounds: int


def groups(rows: Sequence[record.Row]) -> Mapping[Group, list[record.Row]]:
    """The rows of trained arms, by all but their seeds, which ascend."""
    found: dict[Group, list[record.Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["arm"] != BASE:
            found[Group(**{name: row[name] for name in Group.__dataclass_fields__})].append(row)
    return found


def bases(rows: Sequence[record.Row]) -> list[record.Row]:
    """The bases, means over seeds: how much draws of one prompt differ, and how far above the plain model they are."""
    mine = [row for row in rows if row["arm"] == BASE]
    names = ("deviation", "best", "level", "right")
    return [
        {"spread": spread, "draws": mine[0]["draws"]}
        | {name: fmean(row[name] for row in mine if row["spread"] == spread) for name in names}
        for spread in sorted({row["spread"] for row in mine})
    ]


def estimates(rows: Sequence[record.Row], bootstrap: Bootstrap) -> Iterator[record.Row]:
    """Of every group, the measures at a drift, or at strength 1 (``at_drift`` null), with 95% intervals.

    A drift that a seed does not reach is left out: `reach` of the group says how far all seeds go. ``beside_critic`` is the gain
    less the critic's, on the same seeds.
    """
    by_group = groups(rows)
    curves = {group: _curves(mine) for group, mine in by_group.items()}
    for group, mine in by_group.items():
        columns = asdict(group) | {
            "seeds": curves[group].seeds,
            "pairs": fmean(row["pairs"] for row in mine),
            "pictures": fmean(row["images"] for row in mine),
            "critic_calls": fmean(row["critic_calls"] for row in mine),
            "learning_passes": fmean(row["learning_passes"] for row in mine),
            "passes": curves[group].passes,
            "reach": float(curves[group].means["drift"].max(axis=-1).min()),
        }
        critic = curves.get(Group(arm=LOOP, spread=group.spread, draws=1, rounds=group.rounds))
        advantages = [] if critic is None else _advantages(curves[group], critic, bootstrap)
        for drift in (None, *(level for level in DRIFTS if reaches(curves[group], level))):
            row = columns | {"at_drift": drift}
            for name in BETTER:
                mean, low, high = bootstrap.estimate(curves[group], name, drift)
                row |= {name: mean, f"{name}_low": low, f"{name}_high": high}
            beside = [one for one in advantages if (one.measure, one.drift) == ("gain", drift)]
            yield row | {"beside_critic": [[one.mean, one.low, one.high] for one in beside]}


def _advantages(curves: Curves, critic: Curves, bootstrap: Bootstrap) -> list[Advantage]:
    comparisons = bootstrap.at_strength_1(curves, critic), bootstrap.along_the_front(curves, critic)
    return [advantage for comparison in comparisons for advantage in comparison.advantages]


def flat_rows(rows: Sequence[record.Row]) -> Iterator[record.Row]:
    """One row per cell and strength, with means over prompts."""
    for row in rows:
        if row["arm"] == BASE:
            continue
        columns = {name: cell for name, cell in row.items() if name not in ("curve", "strengths", "made_by")}
        for number, strength in enumerate(row["strengths"]):
            if strength > 0:
                means = {name: round(fmean(curve[number]), 7) for name, curve in row["curve"].items()}
                yield columns | {"strength": strength} | means


def _curves(rows: Sequence[record.Row]) -> Curves:
    return Curves(
        strengths=rows[0]["strengths"],
        seeds=[row["seed"] for row in rows],
        measures={name: np.array([row["curve"][name] for row in rows]) for name in rows[0]["curve"]},
        passes=fmean(row["passes"] for row in rows),
    )
