"""The ablation: ways to learn from the same pairs on one front of gain and drift, in rounds, and what each costs.

``python -m benchmarks.ablation`` measures everything, in the order of `AXES`; ``--axes``, ``--kinds``, ``--budgets``,
``--arms`` and ``--seeds`` choose a part, also while other processes measure others into the same folder. After a stop it
resumes from its journal, which is beside the results; each process that ends writes the results of all rows so far, and
``--write`` does nothing else. Every trained LoRA is kept in the folder ``ablation-loras`` beside the journal, under the names
in the column ``loras``. ``--tune`` measures the learning rates from which those of the arms were chosen.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib as mpl

from artaug._internal.files import atomic_write
from benchmarks import _ablation_summary as summary
from benchmarks import _record as record
from benchmarks._ablation_arms import ARMS, DEFAULT, ON_THE_FRONT, described, passes_a_step
from benchmarks._ablation_bench import Bench, made_by, strengths_of
from benchmarks._ablation_cells import AXES, KINDS, QUICK, TUNED_WITH, Cell, Selection, Settings, cells, trials
from benchmarks._ablation_plot import plot
from benchmarks._ablation_statistics import Bootstrap
from benchmarks._journal import Journal

SEEDS = (0, 1, 2, 3, 4)
FEW_SEEDS = ("control", "noise", "yield", "pairs", "cost")
"""Axes with the first three seeds alone."""


def measured_cell(row: record.Row) -> Cell | None:
    """The cell of a row; None for an arm that is gone or has changed since."""
    cell = Cell(**{name: row[name] for name in Cell.__dataclass_fields__})
    known = cell.axis == "control" or cell.arm in ARMS
    return cell if known and row["made_by"] == made_by(cell) else None


def new_journal(path: Path, settings: Settings) -> Journal[Cell]:
    """A journal in which a row is complete if it has all strengths."""

    def is_complete(cell: Cell, row: record.Row) -> bool:
        return set(strengths_of(cell, settings)) <= set(row["strengths"])

    return Journal(path, settings.of_rows, measured_cell, is_complete)


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """The files of an ablation in a folder."""

    out: Path
    quick: bool = False

    @property
    def settings(self) -> Settings:
        """Its size."""
        return QUICK if self.quick else Settings()

    def journal(self, name: str = "ablation") -> Journal[Cell]:
        """The journal of the results, or of the trials of learning rates."""
        journal = new_journal(self.out / f"{name}{self._suffix}.jsonl", self.settings)
        journal.begin()
        return journal

    def measure(self, selection: Selection, seeds: Sequence[int]) -> None:
        """Measure the cells of some seeds that have no row yet, axis by axis."""
        journal = self.journal()
        benches = {seed: self._bench(seed) for seed in seeds}
        by_seed = [
            (seed, list(cells(self.settings, seed, replace(selection, axes=[axis]))))
            for axis in selection.axes
            for seed in seeds
            if axis not in FEW_SEEDS or seed in SEEDS[:3]
        ]
        left = [(benches[seed], journal.missing(mine)) for seed, mine in by_seed]
        seconds = sum(bench.estimate_seconds(mine) for bench, mine in left if mine)
        print(f"{sum(len(mine) for _, mine in left)} cells left, about {seconds / 60:.0f} minutes", flush=True)
        for bench, mine in left:
            journal.measure(mine, bench.completed_row)

    def tune(self, selection: Selection) -> None:
        """Measure the trials of learning rates."""
        self.journal("ablation-tuning").measure(trials(self.settings, selection), self._bench(TUNED_WITH).completed_row)

    def write(self, *, resamples: int = 4000) -> None:
        """Write ablation.json and ablation.png."""
        rows, trial_rows = self.journal().rows(), self.journal("ablation-tuning").rows()
        by_panel, bootstrap = summary.panels(rows, self.settings), Bootstrap(resamples)
        content = {
            "environment": record.environment() | {"quick": self.quick, "settings": asdict(self.settings)},
            "default": DEFAULT,
            "on_the_front": ON_THE_FRONT,
            "arms": {name: {"made_by": described(arm), "passes": passes_a_step(arm)} for name, arm in ARMS.items()},
            "fronts": list(summary.fronts(by_panel, bootstrap)),
            "dominance": list(summary.dominance(by_panel, bootstrap)),
            "costs": list(summary.costs(rows, self.settings)),
            "rows": list(summary.flat_rows([*trial_rows, *rows], self.settings)),
        }
        path = self.out / "ablation.json"
        with atomic_write(path, what="the results", remedy="Give --out a folder that can be written.") as file:
            file.write_text(json.dumps(content, indent=1) + "\n")
        plot(content).savefig(self.out / "ablation.png", dpi=150, bbox_inches="tight")

    @property
    def _suffix(self) -> str:
        return "-quick" if self.quick else ""

    def _bench(self, seed: int) -> Bench:
        return Bench(self.settings, seed=seed, loras=self.out / f"ablation-loras{self._suffix}")


def main() -> None:
    """Read the command line, measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small run that ends within two minutes on two cores")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where to write")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="which seeds to measure")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="guides that pairs are redrawn by")
    parser.add_argument("--budgets", nargs="+", choices=("passes", "steps"), default=("passes", "steps"))
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=None, help="of every axis; in quotes")
    parser.add_argument("--tune", action="store_true", help="try learning rates, and measure nothing else")
    parser.add_argument("--write", action="store_true", help="write the results, and measure nothing")
    options = parser.parse_args()
    mpl.use("Agg")
    ablation = Ablation(out=options.out, quick=options.quick)
    selection = Selection(axes=options.axes, kinds=options.kinds, budgets=options.budgets, arms=options.arms)
    if options.tune:
        ablation.tune(selection)
    elif not options.write:
        ablation.measure(selection, options.seeds or SEEDS[: 1 if options.quick else None])
    ablation.write(resamples=200 if options.quick else 4000)


if __name__ == "__main__":
    main()
