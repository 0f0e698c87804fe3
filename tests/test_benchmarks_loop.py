"""The benchmark of the whole loop: what it times is the same drawing, and its stand-in for FLUX.1-dev is a whole pipeline."""

from dataclasses import replace

from benchmarks import loop
from benchmarks._flux import PLAYGROUND
from benchmarks._flux_pipeline import Parts, flux_pipeline

import artaug as aa

TINY = replace(PLAYGROUND, double_blocks=1, single_blocks=1, heads=1, text_channels=64)


def tiny_case():
    pipeline = flux_pipeline(TINY, Parts(t5_layers=1, clip_layers=1, vae_channels=(32, 32, 32, 32)))
    case = loop.stand_in_case(quick=True, size=32, pipeline=pipeline)
    return replace(case, synthesizer=replace(case.synthesizer, steps=1, max_sequence_length=32), repeats=1)


def test_the_drawings_that_are_timed_are_the_same_bits(tmp_path):
    rows = list(loop.drawing_rows(tiny_case(), tmp_path, 2))
    assert [(row["way"], row["pictures"], row["same_bits"]) for row in rows] == [
        ("no store", 4, True),
        ("store", 4, True),
    ]
    assert all(row[name] > 0 for row in rows for name in ("rate", "whole_rate", "cpu_rate"))
    assert loop.plot(rows) is not None


def test_the_stages_of_two_rounds_add_up_to_the_time_of_enhance(tmp_path):
    case = tiny_case()
    case = replace(case, trainer=aa.DifferentialLoRATrainer(rank=1, steps=1, batch_size=1), prompts=case.prompts[:2])
    *stages, compared = loop.stage_rows(case, tmp_path)
    assert [row["stage"] for row in stages] == [
        *("draw", "critique", "redraw", "judge", "train", "combine", "measure"),
        "other",
    ]
    assert abs(sum(row["share"] for row in stages) - 1) < 1e-9
    assert (compared["stage"], compared["rounds"]) == ("compare", 2)
    assert loop.plot([*stages, compared]) is not None
