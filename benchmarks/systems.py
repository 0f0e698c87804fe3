"""Systems of the family side by side on the playground: prompts of two and of three things, and what their pictures show.

``python -m benchmarks.systems`` measures every arm of `ARMS` on every seed; ``--arms`` and ``--seeds`` choose a part, also while
other processes measure others into the same folder. After a stop it resumes from its journal, which is beside the results; each
process that ends writes the results of all rows so far, and ``--write`` does nothing else.

Every arm draws its pictures from the same prompts, by the model as it ships and by one with noise in its keys of text (`MODELS`). ``success`` is the share of pictures in which all things have their color, shape
and place; ``swapped`` of those in which a thing has another one's color; ``dropped`` the share of things that are missing. ``passes``
are those of the denoiser a prompt, with one back as two forward; ``learning_passes`` are those of all learning. The
language models are rules that see what the detector sees: the table compares what is done with a critique, not the critics.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from artaug._internal.files import atomic_write
from artaug.evaluation.statistics import paired_bootstrap
from artaug.synthesis import held_out_seed
from benchmarks import _record as record
from benchmarks._journal import Journal
from benchmarks._systems_arms import ARMS, BASE, MODELS, QUICK, Bench, Drawer, Settings, model_with
from benchmarks._systems_world import Outcome, requests
from benchmarks.objectives import passes_counted

SEEDS = (0, 1, 2)
THINGS = (2, 3)
MEASURES = tuple(one.name for one in fields(Outcome))


@dataclass(frozen=True)
class Cell:
    """One row to measure: a system that has learned with a seed, on all prompts of the seed."""

    arm: str
    model: str
    seed: int


def measured_cell(row: record.Row) -> Cell | None:
    """The cell of a row; None for an arm that is gone or has changed since."""
    arm = ARMS.get(row["arm"])
    return Cell(row["arm"], row["model"], row["seed"]) if arm is not None and row["words"] == arm.words else None


@dataclass(frozen=True)
class Systems:
    """The benchmark in a folder."""

    out: Path
    quick: bool = False

    @property
    def settings(self) -> Settings:
        """Its size."""
        return QUICK if self.quick else Settings()

    def journal(self) -> Journal[Cell]:
        """The journal of the results."""
        name = f"systems{'-quick' if self.quick else ''}.jsonl"
        journal = Journal(self.out / name, {"settings": repr(self.settings)}, measured_cell)
        journal.begin()
        return journal

    def measure(self, arms: Sequence[str], seeds: Sequence[int]) -> None:
        """Measure what has no row yet, seed by seed."""
        journal = self.journal()
        for seed, model in product(seeds, MODELS):
            bench = SeedBench(self.settings, model, seed)
            journal.measure([Cell(arm, model, seed) for arm in arms], bench.row)

    def write(self) -> str:
        """Write systems.json and systems.png; the table in words."""
        rows = self.journal().rows()
        content = {
            "environment": record.environment() | {"quick": self.quick, "settings": asdict(self.settings)},
            "estimates": (summary := list(estimates(rows))),
            "rows": rows,
        }
        path = self.out / "systems.json"
        with atomic_write(path, what="the results", remedy="Give --out a folder that can be written.") as file:
            file.write_text(json.dumps(content, indent=1) + "\n")
        plot(summary).savefig(self.out / "systems.png", dpi=150, bbox_inches="tight")
        return table(summary)


@dataclass(frozen=True)
class SeedBench:
    """Measures the cells of one model and seed."""

    settings: Settings
    model: str
    seed: int

    @cached_property
    def bench(self) -> Bench:
        """The model, loaded when the first cell needs it."""
        base = model_with(MODELS[self.model], steps=self.settings.sampling_steps)
        return Bench(base=base, settings=self.settings, seed=self.seed)

    def row(self, cell: Cell, _: record.Row | None = None) -> record.Row:
        """Let a system learn, and draw everything: of every measure one number a prompt."""
        arm, start = ARMS[cell.arm], perf_counter()
        with passes_counted(self.bench.base) as learning:
            drawer = arm.system(self.bench)
        learned_s = perf_counter() - start
        row: dict[str, Any] = asdict(cell) | {
            "words": arm.words,
            "learning_passes": learning.denoiser_calls,
            "learning_seconds": round(learned_s, 1),
        }
        return row | {str(things): self._drawn(drawer, things) for things in THINGS}

    def _drawn(self, drawer: Drawer, things: int) -> dict[str, Any]:
        asked = requests(self.settings.prompts, things=things, seed=self.seed)
        start = perf_counter()
        with passes_counted(self.bench.base) as passes:
            images = drawer(asked, held_out_seed(self.seed))
        seconds = perf_counter() - start
        outcomes = [asdict(Outcome.of(image, one)) for image, one in zip(images, asked, strict=True)]
        return {
            "passes": passes.denoiser_calls / len(asked),
            "seconds": round(seconds / len(asked), 3),
            **{name: [round(outcome[name], 6) for outcome in outcomes] for name in MEASURES},
        }


def estimates(rows: Sequence[record.Row]) -> Iterator[dict[str, Any]]:
    """Of each model, arm, number of things and measure the mean, and its difference to the base with an interval over prompts.

    A difference is between two pictures of one prompt; only seeds count that both arms have.
    """
    by_cell = {(row["arm"], row["model"], row["seed"]): row for row in rows}
    for model, arm, things in product(MODELS, dict.fromkeys(row["arm"] for row in rows), map(str, THINGS)):
        both = [seed for seed in SEEDS if {(arm, model, seed), (BASE, model, seed)} <= by_cell.keys()]
        mine, base = ([by_cell[name, model, seed] for seed in both] for name in (arm, BASE))
        if not mine:
            continue
        yield {
            "arm": arm,
            "model": model,
            "things": int(things),
            "seeds": len(both),
            "passes": fmean(row[things]["passes"] for row in mine),
            "seconds": fmean(row[things]["seconds"] for row in mine),
            "learning_passes": fmean(row["learning_passes"] for row in mine),
            **{name: _estimate(mine, base, things, name) for name in MEASURES},
        }


def _estimate(mine: Sequence[record.Row], base: Sequence[record.Row], things: str, name: str) -> Mapping[str, float]:
    values, before = (np.concatenate([row[things][name] for row in rows]) for rows in (mine, base))
    interval = paired_bootstrap(values - before)
    return {
        "mean": float(values.mean()),
        "difference": float((values - before).mean()),
        "low": interval.low,
        "high": interval.high,
    }


def table(summary: Sequence[Mapping[str, Any]]) -> str:
    """The estimates as one table in Markdown."""
    shown = ("success", "swapped", "dropped", "aesthetics")
    lines = [
        f"| model | system | things | {' | '.join(shown)} | passes a prompt | passes to learn |",
        f"|---|---|---|{'---|' * len(shown)}---|---|",
    ]
    for row in summary:
        cells = (
            f"{row[name]['mean']:.3f}"
            + ("" if row["arm"] == BASE else f" ({row[name]['low']:+.3f} to {row[name]['high']:+.3f})")
            for name in shown
        )
        lines.append(
            f"| {row['model']} | {row['arm']} | {row['things']} | {' | '.join(cells)} | {row['passes']:.1f} | "
            f"{row['learning_passes']:,.0f} |"
        )
    return "\n".join(lines)


def plot(summary: Sequence[Mapping[str, Any]]) -> Figure:
    """The difference of success to the base, with its interval: a row of panels a model, one panel for two and one for three things."""
    arms = list(dict.fromkeys(row["arm"] for row in summary if row["arm"] != BASE))
    figure = Figure(figsize=(9, 0.6 * len(arms) + 2.5), layout="constrained")
    grid = figure.subplots(len(MODELS), len(THINGS), sharey=True, sharex="row", squeeze=False)
    for axis, (model, things) in zip(grid.flat, product(MODELS, THINGS), strict=True):
        rows = [row for row in summary if (row["model"], row["things"]) == (model, things) and row["arm"] != BASE]
        for row in rows:
            place, estimate = arms.index(row["arm"]), row["success"]
            axis.plot([estimate["low"], estimate["high"]], [place, place], color="tab:blue")
            axis.plot([estimate["difference"]], [place], "o", color="tab:blue")
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(arms)), arms)
        axis.set_title(f"{model}, {things} things")
        axis.set_xlabel("success, difference to the base")
    grid[0][0].invert_yaxis()
    return figure


def main() -> None:
    """Read the command line, measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small run that ends within two minutes on two cores")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where to write")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="which seeds to measure")
    parser.add_argument(
        "--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS), help="in quotes; the base is needed"
    )
    parser.add_argument("--write", action="store_true", help="write the results, and measure nothing")
    options = parser.parse_args()
    mpl.use("Agg")
    systems = Systems(options.out, quick=options.quick)
    if not options.write:
        systems.measure(options.arms, options.seeds or SEEDS[: 1 if options.quick else None])
    print(systems.write())


if __name__ == "__main__":
    main()
