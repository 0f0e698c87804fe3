"""The benchmark of clusters: what it compares is the same work, and what it tells is what happened."""

from functools import partial

import pytest
from benchmarks import scale

import artaug as aa
from artaug import playground
from artaug.testing import SwatchSynthesizer

pytestmark = [pytest.mark.loopback, pytest.mark.usefixtures("local_ray")]
EFFORT = scale.Effort(prompts=4, repeats=2, memory_prompts=16)


def test_every_way_is_timed_in_every_turn_and_the_models_are_loaded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "build", partial(SwatchSynthesizer))
    rows = list(scale.rate_rows(EFFORT, tmp_path))
    rates = {row["way"]: row for row in rows if row["what"] == "rate"}
    assert list(rates) == ["one process", "two processes by hand", "Ray, 1 worker", "Ray, 2 workers"]
    assert rates["one process"]["rate_over_one_process"] == 1
    assert rates["two processes by hand"]["rate_over_two_processes_by_hand"] == 1
    assert [row["loads"] for row in rows if row["what"] == "loads"] == [2]
    assert list(tmp_path.iterdir()) == []


def test_a_critic_beside_drawing_hides_part_of_its_time_and_memory_is_told_at_eight_places(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "build", partial(SwatchSynthesizer))
    monkeypatch.setattr(scale, "ANSWER_S", 0.02)
    (overlap,) = scale.overlap_rows(EFFORT, tmp_path)
    assert (overlap["prompts"], overlap["repeats"]) == (16, 2)
    assert overlap["hidden_low"] <= overlap["hidden"] <= overlap["hidden_high"]
    memory = list(scale.memory_rows(EFFORT, tmp_path))
    assert [row["prompts"] for row in memory] == list(range(2, 17, 2))
    assert all(row["resident_mb"] > 0 for row in memory)
    assert scale.plot([*memory, overlap]) is not None


def test_what_is_simulated_is_put_beside_what_ran_on_as_many_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "build", partial(playground.synthesizer, guide=aa.OutputMix(), steps=1))
    rows = list(scale.simulation_rows(scale.Effort(prompts=8, repeats=1, memory_prompts=16), tmp_path))
    assert [row["way"] for row in rows] == ["Ray, 1 workers", "Ray, 2 workers"]
    for row in rows:
        assert row["predicted"] == pytest.approx(row["predicted_s"] / row["seconds"])
    assert 0 < rows[1]["predicted_s"] <= rows[0]["predicted_s"]
    assert list(tmp_path.iterdir()) == []
