"""The tables of docs/training.md say what the results of the benchmarks say, each number rounded once."""

import json
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
NAMES = {
    "PairedPreference": "`PairedPreference`",
    "PairedDifference": "`PairedDifference`",
    "PairedDifference, echo=1": "`PairedDifference`, `echo=1`",
    "PairedDifference, echo=2": "`PairedDifference`, `echo=2`",
    "PairedDifference, echo=4": "`PairedDifference`, `echo=4`",
    "TwoStage pooled": "`TwoStage`, pooled",
    "TwoStage per pair": "`TwoStage`, per pair",
    "SupervisedFineTuning": "`SupervisedFineTuning`",
    "DirectPreference": "`DirectPreference`",
    "diffusers' script": "diffusers' script",
}

PAIRED = ("PairedPreference", "PairedDifference", "PairedDifference, echo=1", "PairedDifference, echo=2")


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
        if not mine:
            continue
        memory = [
            f"{row['peak_to_script']:.2f}" if "script" not in method else "1" for row in mine if not row["recomputing"]
        ]
        yield line(name, *map(ratio, mine), *memory)


def steps_on_a_gpu():
    cases = dict.fromkeys((row["storage"], row["pixels"], row["batch"]) for row in rows("h200/training.json"))
    for storage, pixels, batch in cases:
        mine = {row["method"]: row for row in rows("h200/training.json", storage=storage, pixels=pixels, batch=batch)}
        plain, script = mine["SupervisedFineTuning"], mine.get("diffusers' script")
        base = f"{'bfloat16' if storage == 'plain' else storage}, {pixels:,}, {batch}"
        others = [ratio(mine[name]) for name in (*PAIRED, "diffusers' script") if name in mine]
        held = f"{next(mine[name] for name in PAIRED if name in mine)['peak_bytes'] / 2**30:.1f} GiB"
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


def page(name):
    """A page without its line breaks."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def test_the_levels_of_the_stop_rule_are_those_of_the_simulation():
    simulated = [row for row in rows("2-core-epyc/levels.json") if row["pictures"] == 1]
    without = [row for row in simulated if row["gain"] == 0 and row["prompts"] >= 6]
    evened = max(row["accepted"] for row in without if row["differences"].startswith("mean 0"))
    none = max(row["accepted"] for row in without if not row["differences"].startswith("mean 0"))
    half = {row["prompts"]: row["accepted"] for row in simulated if row["gain"] == 0.5}
    text = page("docs/loop.md")
    assert f"accepted in at most {none:.1%} of cases" in text
    assert f"accepted in up to {evened:.1%}, at 8 prompts" in text
    powers = f"{half[8]:.0%} at 8 prompts, {half[16]:.0%} at 16, {half[32]:.0%} at 32 and {half[64]:.0%} at 64"
    assert powers in text
    assert all(row["accepted"] == 0 for row in simulated if row["prompts"] < 6)


def test_the_boxes_of_the_photometric_critic_are_as_good_as_measured():
    dull, vivid = (rows("2-core-xeon/critic.json", pictures=pictures)[0] for pictures in ("dull", "vivid"))
    text = page("docs/critics.md")
    assert f"hold {dull['found']:.0%} of the objects" in text
    assert f"with {100 * dull['extra']:.0f} boxes in 100 scenes" in text
    assert f"they hold {vivid['found']:.0%} (" in text


def test_the_playground_draws_what_was_measured():
    plain, praised = (
        rows("2-core-xeon/playground.json", **{"drawn by": "model", "adjectives": adjectives})[0]
        for adjectives in ("nothing", "everything")
    )
    text = page("docs/playground.md")
    shares = f"colour for {plain['color']:.0%} of the things, the right shape for {plain['shape']:.0%} and"
    assert shares in text
    assert f"place for {plain['place']:.0%}." in text
    for name, row in (("drawn, no adjectives", plain), ("drawn, all four", praised)):
        assert line(name, *(f"{row[scorer]:.2f}" for scorer in ("Exposure", "Chroma", "Contrast", "Sharpness"))) in text


def test_what_a_critic_buys_over_selection_is_what_was_measured():
    estimates = json.loads((RESULTS / "2-core-epyc" / "online.json").read_text(encoding="utf-8"))["estimates"]

    def gain(arm, *, spread, draws=1, at_drift=0.002):
        (row,) = [
            row
            for row in estimates
            if (row["arm"], row["spread"], row["draws"], row["rounds"], row["at_drift"])
            == (arm, spread, draws, 1, at_drift)
        ]
        return row["gain"]

    selected = "best and worst, PairedPreference"
    two, four, eight = (f"{gain(selected, spread=0, draws=draws):.3f}" for draws in (2, 4, 8))
    text = page("docs/online.md")
    assert f"gains {gain('critic', spread=0):.3f} at a drift of 2 thousandths where the best and the worst of" in text
    assert f"2, 4 and 8 draws give {two}, {four} and {eight}" in text
    varied = f"({gain(selected, spread=0.5, draws=8):.3f} against {gain('critic', spread=0.5):.3f}"
    assert f"level with the critic at a drift of 2 thousandths {varied}" in text
    boxes = [f"{gain(f'boxes, PairedDifference{more}', spread=0):.3f}" for more in ("", ", outside 0")]
    assert f"at a drift of 2 thousandths from {boxes[0]} to {boxes[1]}" in text


def test_what_is_said_of_real_pairs_is_what_was_measured():
    measured = rows("2-core-epyc/emoji.json")
    trained = [row for row in measured if row.get("pairs") == 128 and not row["tuning"] and row["scale"] == 1]

    def mean(name, arm):
        return fmean(row[name] for row in trained if row["arm"] == arm)

    arms = dict.fromkeys(row["arm"] for row in trained)
    progress, seen, farther = (
        [mean(name, arm) for arm in arms] for name in ("progress", "efficientnet_progress", "efficientnet_distance")
    )
    nearest = mean("distance", "PairedPreference, anchor .25")
    text = page("docs/real-pairs.md")
    assert f"EfficientNet recognizes {measured[0]['efficientnet_subject']:.0%}" in text
    assert f"they go {min(progress):.2f} to {max(progress):.2f} of the way at 128 pairs" in text
    assert f"EfficientNet sees at most {max(seen):.2f}" in text
    assert min(farther) > 1
    assert f"({nearest:.3f} of the base's distance)" in text
    assert f"`NegativeAware` ({mean('distance', 'NegativeAware'):.3f})" in text
    assert f"({mean('distance', 'PairedDifference, at before'):.3f})" in text
    assert f"included ({mean('distance', 'PairedPreference'):.3f})" in text
    assert f"{mean('subject', 'DirectPreference'):.0%} are recognized" in text
    assert [arm for arm in arms if mean("distance", arm) < 1] == [
        "PairedDifference, at before",
        "PairedPreference, anchor .25",
        "NegativeAware",
    ]


def test_what_judges_that_are_not_ours_say_of_the_default_is_what_was_measured():
    judged = rows("2-core-epyc/outside.json", kind="LoRA", strength=1.0)

    def mean(name, arm):
        return fmean(row[name] for row in judged if row["arm"] == arm)

    default, paired = "PairedPreference", "PairedDifference"
    text = page("docs/outside-judges.md")
    drifts = [f"{1000 * mean('drift', arm):.1f}" for arm in (default, paired)]
    assert f"gains {mean('gain', default):.3f} at a drift of {drifts[0]} thousandths" in text
    assert f"`PairedDifference` {mean('gain', paired):.3f} at {drifts[1]}" in text
    assert f"{mean('content', default):.3f}" == f"{mean('content', paired):.3f}"
    nearer = f"the first comes {mean('toward', default):.3f} nearer, the second {mean('toward', paired):.3f}"
    assert nearer in text
    assert f"{mean('toward', 'TwoStage'):.3f} nearer, and fine-tuning, {mean('toward', 'fine-tuning'):.3f}" in text


def test_the_memory_of_baking_is_what_was_measured():
    peaks = [row["peak_bytes"] / 2**20 for row in rows("2-core-epyc/bake.json")]
    assert f"({min(peaks):.0f} to {max(peaks):.0f} MiB in" in page("docs/lora-files.md")


def test_the_readme_has_the_memory_of_a_step_with_its_conditions():
    steps = rows("h200/training.json", storage="fp8", pixels=1024, batch=1)
    step = next(step for step in steps if step["method"] in PAIRED)
    assert step["recomputing"]
    assert f"[with {step['peak_bytes'] / 2**30:.1f} GiB allocated]" in page("README.md")
    assert "stored in fp8, one pair is learned at a time and activations are computed again" in page("README.md")


def test_the_report_of_rounding_to_bfloat16_is_measured_again():
    import torch  # noqa: PLC0415 - only here

    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1 << 20, generator=generator).bfloat16()
    text = (ROOT / "docs" / "lora-files.md").read_text(encoding="utf-8")
    for share, lost, unchanged in ((0.1, 0.017, 0.02), (0.01, 0.17, 0.18), (0.001, 0.79, 0.78)):
        update = share * torch.randn(1 << 20, generator=generator)
        baked = (weights.float() + update).bfloat16()
        error = (baked.float() - weights.float() - update).norm() / update.norm()
        assert float(error) == pytest.approx(lost, rel=0.06)
        assert float((baked == weights).float().mean()) == pytest.approx(unchanged, abs=0.01)
        assert f"| {100 * share:g} % | {100 * lost:g} % | {100 * unchanged:.0f} % |" in text


def test_the_costs_of_a_store_are_those_that_were_measured():
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    path = "2-core-epyc/runs.json"
    second, tiny = (rows(path, what="loop", case=case)[0] for case in ("1 s a picture of 1,024 px", "playground"))
    assert f"| {second['ratio']:.3f} ({second['low']:.3f} to {second['high']:.3f}) |" in page
    assert f"| {tiny['ratio']:.2f} ({tiny['low']:.2f} to {tiny['high']:.2f}) |" in page
    (long,) = rows(path, what="memory", case="store", prompts=2000)
    assert f"by {long['peak_kb_per_prompt']:.0f} kB a prompt" in page
    (read,) = rows(path, what="reading", prompts=100000)
    assert f"read in {read['seconds']:.1f} s" in page


def test_the_costs_of_a_cluster_are_those_that_were_measured():
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    path = "2-core-epyc/scale.json"

    def spread(row, column):
        return f"{row[column]:.2f} ({row[f'{column}_low']:.2f} to {row[f'{column}_high']:.2f})"

    for row in rows(path, what="rate"):
        over = [spread(row, f"rate_over_{plain}") for plain in ("one_process", "two_processes_by_hand")]
        assert line(row["way"], f"{row['prompts_per_s']:.1f}", *over) in text
    (overlap,) = rows(path, what="overlap")
    assert f"{overlap['hidden']:.0%} ({overlap['hidden_low']:.0%} to {overlap['hidden_high']:.0%})" in text
    for row in rows(path, what="simulation"):
        assert spread(row, "predicted") in text
    (started,) = rows(path, what="start", way="Ray, 2 workers")
    assert f"Ray itself {started['ray_s']:.0f} s, two workers {started['workers_s']:.0f} s" in text
    memory = [row["resident_mb"] for row in rows(path, what="memory")]
    assert max(memory) - min(memory) < 1
    assert f"flat at {max(memory):.0f} MiB from 1,250 to 10,000 prompts" in text


def test_what_the_page_of_systems_says_is_what_was_measured():
    page = " ".join((ROOT / "docs" / "systems.md").read_text("utf-8").split())
    measured = json.loads((RESULTS / "2-core-epyc/systems.json").read_text("utf-8"))["estimates"]
    success = {(row["arm"], row["model"], row["things"]): row["success"]["mean"] for row in measured}
    of = {
        arm: [success[arm, "confused", things] for things in (2, 3)] for arm in ("base", "checklist, 4 turns", "ArtAug")
    }
    (base_2, base_3), (checked_2, checked_3), (_, looped_3) = of.values()

    assert (
        f"from {base_2:.2f} to {checked_2:.2f} with two things, and from {base_3:.2f} to {checked_3:.2f} with three"
        in page
    )
    assert f"({base_3:.2f} to {looped_3:.2f})" in page
    assert success["ArtAug", "as it ships", 2] == success["base", "as it ships", 2]
    assert success["base", "as it ships", 3] - success["ArtAug", "as it ships", 3] == pytest.approx(0.2, abs=0.01)
