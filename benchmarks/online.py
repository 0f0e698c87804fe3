"""What a critic's regional advice buys over selection: several draws of a prompt and a scorer, or a judge, in its place.

All arms draw as many pictures in a round, and spend as many denoiser passes on learning from them. ``python -m
benchmarks.online`` measures everything, in the order of `AXES`; ``--axes``, ``--spreads``, ``--arms`` and
``--seeds`` choose a part, also while other processes measure others into the same folder. After a stop it resumes from its
journal, which is beside the results; each process that ends writes the results of all rows so far, and ``--write`` does nothing
else. Every trained LoRA is kept in the folder ``online-loras`` beside the journal.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib as mpl

from artaug._internal.files import atomic_write
from benchmarks import _online_summary as summary
from benchmarks import _record as record
from benchmarks._ablation_arms import passes_a_step
from benchmarks._ablation_statistics import Bootstrap
from benchmarks._journal import Journal
from benchmarks._online_arms import ARMS, made_by
from benchmarks._online_bench import OnlineBench
from benchmarks._online_cells import AXES, BASE, QUICK, Cell, Selected, Settings, cells
from benchmarks._online_plot import plot

SEEDS = (0, 1, 2)


def measured_cell(row: record.Row) -> Cell | None:
    """The cell of a row; None for an arm that is gone or has changed since."""
    cell = Cell(**{name: row[name] for name in Cell.__dataclass_fields__})
    return cell if cell.arm == BASE or (cell.arm in ARMS and row["made_by"] == made_by(cell.arm)) else None


@dataclass(frozen=True, kw_only=True)
class Online:
    """The files of the benchmark in a folder."""

    out: Path
    quick: bool = False

    @property
    def settings(self) -> Settings:
        """Its size."""
        return QUICK if self.quick else Settings()

    def journal(self) -> Journal[Cell]:
        """The journal of the results."""
        journal = Journal(self.out / f"online{self._suffix}.jsonl", {"settings": repr(self.settings)}, measured_cell)
        journal.begin()
        return journal

    def measure(self, selected: Selected, seeds: Sequence[int]) -> None:
        """Measure the cells of some seeds that have no row yet, axis by axis."""
        journal, loras = self.journal(), self.out / f"online-loras{self._suffix}"
        benches = {seed: OnlineBench(self.settings, seed=seed, loras=loras) for seed in seeds}
        for axis in selected.axes:
            for seed, bench in benches.items():
                missing = journal.missing(cells(self.settings, seed, replace(selected, axes=[axis])))
                print(f"{axis}, seed {seed}: {len(missing)} cells left", flush=True)
                journal.measure(missing, bench.row)

    def write(self, *, resamples: int = 4000) -> None:
        """Write online.json and online.png."""
        rows = self.journal().rows()
        content = {
            "environment": record.environment() | {"quick": self.quick, "settings": asdict(self.settings)},
            "arms": {
                name: {"made_by": made_by(name), "passes": passes_a_step(arm.learning)} for name, arm in ARMS.items()
            },
            "bases": summary.bases(rows),
            "estimates": list(summary.estimates(rows, Bootstrap(resamples))),
            "rows": list(summary.flat_rows(rows)),
        }
        path = self.out / "online.json"
        with atomic_write(path, what="the results", remedy="Give --out a folder that can be written.") as file:
            file.write_text(json.dumps(content, indent=1) + "\n")
        plot(content).savefig(self.out / "online.png", dpi=150, bbox_inches="tight")

    @property
    def _suffix(self) -> str:
        return "-quick" if self.quick else ""


def main() -> None:
    """Read the command line, measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small run that ends within two minutes on two cores")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where to write")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="which seeds to measure")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES)
    parser.add_argument("--spreads", type=float, nargs="+", default=None, help="of the base")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=None, help="of every axis; in quotes")
    parser.add_argument("--write", action="store_true", help="write the results, and measure nothing")
    options = parser.parse_args()
    mpl.use("Agg")
    online = Online(out=options.out, quick=options.quick)
    if not options.write:
        selected = Selected(axes=options.axes, spreads=options.spreads, arms=options.arms)
        online.measure(selected, options.seeds or SEEDS[: 1 if options.quick else None])
    online.write(resamples=200 if options.quick else 4000)


if __name__ == "__main__":
    main()
