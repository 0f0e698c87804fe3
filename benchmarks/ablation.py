"""The ablation: the loop with the paired difference beside its alternatives at equal budgets, and the cost of each.

``python -m benchmarks.ablation`` measures all seeds; ``--seeds 2`` some, also while
another process measures others: the last to end writes the results of all. After a stop it resumes from its journal, which
is beside the results. ``--tune`` measures the learning rates from which those of the arms were chosen.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np

from artaug.evaluation.statistics import paired_bootstrap
from benchmarks import _record as record
from benchmarks._ablation_bench import ARMS, OURS, QUICK, TUNED_WITH, Bench, Cell, Settings, cells, trials
from benchmarks._ablation_plot import plot

SEEDS = (0, 1, 2)
PER_PROMPT = "gains"


@dataclass(frozen=True)
class Journal:
    """A file with one measured row per line, to which several processes may append."""

    path: Path
    about: Mapping[str, str]
    """The settings of the rows: the first line."""

    def begin(self) -> None:
        """Start it, or check that its settings are the same.

        Raises:
            SystemExit: if they are not.
        """
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append(self.about)
        elif self._lines()[0] != self.about:
            raise SystemExit(f"{self.path} has other settings. Move it away, or write to another folder (--out).")

    def rows(self) -> list[record.Row]:
        """All rows so far, of all processes."""
        return self._lines()[1:]

    def measure(self, cells: Iterable[Cell], bench: Bench) -> None:
        """Measure the cells that have no row yet."""
        for cell in cells:
            fields = asdict(cell)
            if not any(fields.items() <= row.items() for row in self.rows()):
                self._append(bench.row(cell))

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _lines(self) -> list[Mapping[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def measure(*, quick: bool, out: Path, seeds: Sequence[int], tune: bool = False) -> list[record.Row]:
    """Measure the trials, or the cells of some seeds; return all rows so far, trials included."""
    settings = QUICK if quick else Settings()
    about, suffix = {"settings": repr(settings)}, "-quick" if quick else ""
    tuning = Journal(out / f"ablation-tuning{suffix}.jsonl", about)
    journal = Journal(out / f"ablation{suffix}.jsonl", about | {name: repr(arm) for name, arm in ARMS.items()})
    tuning.begin()
    journal.begin()
    if tune:
        tuning.measure(trials(settings), Bench(settings, seed=TUNED_WITH))
    else:
        for seed in seeds:
            journal.measure(cells(settings, seed), Bench(settings, seed=seed))
    return [*tuning.rows(), *journal.rows()]


def comparisons(rows: Sequence[record.Row]) -> list[record.Row]:
    """Every arm minus `PairedDifference` with the same number of pairs: the mean difference of gains over prompts and seeds, and its interval.

    The interval is a 95% bootstrap over prompts of the differences, averaged over seeds.
    """
    trained = [row for row in rows if row["axis"] == "pairs"]
    results: list[record.Row] = []
    for arm, pairs in dict.fromkeys((row["arm"], row["pairs"]) for row in trained if row["arm"] != OURS):
        ours, others = (
            {row["seed"]: row[PER_PROMPT] for row in trained if (row["arm"], row["pairs"]) == (name, pairs)}
            for name in (OURS, arm)
        )
        both = sorted(ours.keys() & others.keys())
        differences = np.mean([np.subtract(others[seed], ours[seed]) for seed in both], axis=0)
        interval = paired_bootstrap(differences)
        results.append(
            {
                "arm": arm,
                "minus": OURS,
                "pairs": pairs,
                "seeds": len(both),
                "gain": fmean(differences),
                "low": interval.low,
                "high": interval.high,
            }
        )
    return results


def write(rows: Sequence[record.Row], out: Path, *, quick: bool) -> None:
    """Write ablation.json and ablation.png."""
    columns = [{name: cell for name, cell in row.items() if name != PER_PROMPT} for row in rows]
    settings = asdict(QUICK if quick else Settings())
    environment = record.environment() | {"quick": quick, "settings": settings}
    content = {"environment": environment, "rows": columns, "comparisons": comparisons(rows)}
    (out / "ablation.json").write_text(json.dumps(content, indent=2) + "\n")
    plot(rows).savefig(out / "ablation.png", dpi=150, bbox_inches="tight")


def main() -> None:
    """Read the command line, measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small run that ends within a minute on two cores")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where to write")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="which seeds to measure")
    parser.add_argument("--tune", action="store_true", help="try learning rates, and measure nothing else")
    options = parser.parse_args()
    mpl.use("Agg")
    seeds = options.seeds or SEEDS[: 1 if options.quick else None]
    rows = measure(quick=options.quick, out=options.out, seeds=seeds, tune=options.tune)
    print(record.table([{name: cell for name, cell in row.items() if name != PER_PROMPT} for row in rows]))
    if not options.tune:
        write(rows, options.out, quick=options.quick)


if __name__ == "__main__":
    main()
