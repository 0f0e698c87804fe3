"""The tables of docs/training.md say what the results of the benchmarks say, each number rounded once."""

import json
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
NAMES = {
    "PairedDifference": "`PairedDifference`",
    "PairedDifference, echo=2": "`PairedDifference`, `echo=2`",
    "PairedDifference, echo=4": "`PairedDifference`, `echo=4`",
    "TwoStage pooled": "`TwoStage`, pooled",
    "TwoStage per pair": "`TwoStage`, per pair",
    "SupervisedFineTuning": "`SupervisedFineTuning`",
    "DirectPreference": "`DirectPreference`",
    "diffusers' script": "diffusers' script",
}


def rows(path, **values):
    """The rows of a result that have these values."""
    recorded = json.loads((RESULTS / path).read_text(encoding="utf-8"))["rows"]
    return [row for row in recorded if values.items() <= row.items()]


def ratio(row):
    return f"{row['ratio_to_sft']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"


def line(*cells):
    return f"| {' | '.join(cells)} |"


def steps_on_a_cpu():
    for method, name in NAMES.items():
        if "echo=4" in method or method.startswith(("TwoStage", "Supervised")):
            continue
        mine = rows("2-core-epyc/training.json", method=method, batch=4)
        memory = [
            f"{row['peak_to_script']:.2f}" if "script" not in method else "1" for row in mine if not row["recomputing"]
        ]
        yield line("the same, `echo=2`" if method.endswith("echo=2") else name, *map(ratio, mine), *memory)


def steps_on_a_gpu():
    cases = dict.fromkeys((row["storage"], row["pixels"], row["batch"]) for row in rows("h200/training.json"))
    for storage, pixels, batch in cases:
        mine = {row["method"]: row for row in rows("h200/training.json", storage=storage, pixels=pixels, batch=batch)}
        plain, script = mine["SupervisedFineTuning"], mine.get("diffusers' script")
        base = f"{'bfloat16' if storage == 'plain' else storage}, {pixels:,}, {batch}"
        others = [
            ratio(mine[name])
            for name in ("PairedDifference", "PairedDifference, echo=2", "diffusers' script")
            if name in mine
        ]
        held = f"{mine['PairedDifference']['peak_bytes'] / 2**30:.1f} GiB"
        seconds = f"{plain['seconds_per_step']:.2f} s"
        if script is None:
            yield f"{line(base, seconds, *others)} | | {held} | |"
        else:
            yield line(base, seconds, *others, held, f"{script['peak_bytes'] / 2**30:.1f} GiB")


def objectives():
    for method in dict.fromkeys(row["method"] for row in rows("2-core-epyc/objectives.json")):
        mine = rows("2-core-epyc/objectives.json", method=method, steps=64)

        def spread(name, places, mine=mine):
            numbers = [row[name] for row in mine]
            return f"{fmean(numbers):,.{places}f} ({min(numbers):,.{places}f} to {max(numbers):,.{places}f})"

        passes = "never" if mine[0]["passes_to_gain"] is None else spread("passes_to_gain", 0)
        yield line(
            NAMES[method], passes, *(spread(*judged) for judged in (("gain", 3), ("alignment", 3), ("drift", 4)))
        )


@pytest.mark.parametrize("table", [steps_on_a_cpu, steps_on_a_gpu, objectives])
def test_a_table_of_the_training_page_is_that_of_the_results(table):
    missing = [row for row in table() if row not in PAGE.splitlines()]
    assert not missing
