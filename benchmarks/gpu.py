"""All that a GPU is asked, in the order of its value, within the minutes that there are: see CONTRIBUTING.md."""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

from benchmarks import _gpu_jobs as gpu_jobs
from benchmarks import _record as record
from benchmarks import _schedule as schedule

START_SECONDS = 25
"""What a process takes to import everything, to start CUDA and to build FLUX.1-dev with random weights."""
_CARD = ("driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "temperature.gpu", "power.draw")
"""What is recorded of the GPU before each job, as nvidia-smi calls it."""
LOG = "gpu.jsonl"


def main(arguments: Sequence[str]) -> int:
    """Measure what fits into the time, and say what came of it; or keep what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=12, help="until the end; a job that would not fit is skipped")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu"), help=f"where {LOG} is; jobs finished there are done"
    )
    parser.add_argument("--rehearse", action="store_true", help="the same jobs at a reduced size, on a CPU as well")
    parser.add_argument("--list", action="store_true", help="print the jobs and their estimates, and end")
    parser.add_argument("--commit", help="recorded where the folder is no git repository")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write what is in the log to a folder of results")
    options = parser.parse_args(arguments)
    log = schedule.Log(options.out / LOG)
    if options.keep:
        keep(log.path, options.keep)
        return 0
    jobs = gpu_jobs.jobs(rehearse=options.rehearse)
    if options.list:
        print(record.table([{"job": job.name, "file": job.benchmark, "seconds": job.seconds} for job in jobs]))
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        print("torch sees no CUDA device here. Use --rehearse to try the jobs at a reduced size.", file=sys.stderr)
        return 2
    log.write("session", {"minutes": options.minutes, "rehearsal": options.rehearse, "card": card()})
    prepare = partial(environment, quick=options.rehearse, commit=options.commit)
    schedule.run(jobs, log, minutes=options.minutes, start_seconds=START_SECONDS, prepare=prepare)
    print(summary(log.path))
    return 0


def environment(job: schedule.Job, *, quick: bool, commit: str | None) -> Mapping[str, Any]:
    """Set a process up for a job; what is recorded of it and of the machine."""
    torch.backends.cuda.enable_cudnn_sdp(job.cudnn_attention)
    found = record.environment()
    return found | {
        "commit": commit or found["commit"],
        "cudnn": torch.backends.cudnn.version() if found["gpu"] else None,
        "card": card(),
        "quick": quick,
    }


def card() -> dict[str, str]:
    """The driver, and the state that the GPU is in; nothing where there is none."""
    if not torch.cuda.is_available():
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_CARD)}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    values = answer.stdout.partition("\n")[0].split(", ")
    return dict(zip(_CARD, values, strict=False))


def summary(log: Path) -> str:
    """What was measured, benchmark by benchmark, and last how every job ended."""
    attempts = list(schedule.attempts(log).values())
    parts = []
    for benchmark in dict.fromkeys(attempt.benchmark for attempt in attempts):
        rows = [row for attempt in attempts if attempt.benchmark == benchmark for row in attempt.rows]
        if rows:
            parts.append(f"{benchmark}:\n{gpu_jobs.text(benchmark, rows)}")
    return "\n\n".join([*parts, record.table(job_rows(attempts))])


def job_rows(attempts: Sequence[schedule.Attempt]) -> list[record.Row]:
    """A row for each job: how it ended, and what it took."""
    return [
        {
            "job": attempt.name,
            "state": attempt.state,
            "estimate": attempt.estimate,
            "seconds": attempt.seconds,
            "rows": len(attempt.rows),
            "message": schedule.last_line(attempt.message)[:120],
        }
        for attempt in attempts
    ]


def keep(log: Path, folder: Path) -> None:
    """Write NAME.json and NAME.png of every benchmark in a log, as if it had run alone, and ``gpu.json``: the jobs.

    What the time did not suffice for is named in the record, as ``cut_short``.
    """
    mpl.use("Agg")
    attempts = list(schedule.attempts(log).values())
    for benchmark in dict.fromkeys(attempt.benchmark for attempt in attempts if attempt.rows):
        own = [attempt for attempt in attempts if attempt.benchmark == benchmark]
        rows = [row for attempt in own for row in attempt.rows]
        missing = [attempt.name for attempt in own if attempt.state != "finished"]
        found = dict(next(attempt.environment for attempt in own if attempt.rows))
        if missing:
            found["cut_short"] = f"before all of {', '.join(missing)} was measured"
        gpu_jobs.write(folder, benchmark, found, rows)
    recorded = next((attempt.environment for attempt in attempts if attempt.environment), {})
    record.write(folder / "gpu.json", recorded, job_rows(attempts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
