"""A plan on clusters: what follows from the seconds of its stages by arithmetic, and how it is shown."""

import pytest

import artaug as aa
from artaug.evaluation.statistics import Interval


def stage(name, count, *seconds, warm_up=0.0, moving=0.0):
    return aa.StagePlan(
        stage=name,
        count=count,
        unit="things",
        seconds_by_round=seconds,
        interval=None,
        warm_up_seconds=warm_up,
        moving_seconds=moving,
        peak_bytes=None,
    )


def plan_of(*, critique=0.0, judge=0.0, train=100.0, critics=1, scoring=0.0, filing=0.0, together=False, warm_up=0.0):
    """Two rounds of 1,024 prompts, each picture drawn in 1 s and redrawn in 1 s, moves left out."""
    return aa.RunPlan(
        prompts=1024,
        rounds=2,
        sample=16,
        sample_chunk=8,
        stages=(
            stage("draw", 2048, 1024.0 + 30, 1024.0 + 30, warm_up=warm_up, moving=60.0),
            stage("critique", 2048, critique, critique),
            stage("redraw", 2048, 1024.0, 1024.0),
            stage("judge", 2048, judge, judge),
            stage("train", 40, train, train),
            stage("combine", 2, 1.0, 1.0),
            stage("measure", 3 * 64, 2 * (64.0 + scoring), 64.0 + scoring),
        ),
        pairs=512.0,
        pairs_interval=Interval(400, 600),
        redrawn=1.0,
        chunks=aa.ChunkPlan(
            prompts=8,
            batch=8,
            critics=critics,
            planning_seconds=0.0,
            filing_seconds=filing,
            judged_together=together,
            scoring_seconds=scoring,
        ),
        disk={},
        free_bytes=None,
        critic=None,
        scorers=None,
        advice=(),
        notes=(),
    )


def test_a_cluster_of_one_draws_as_long_as_the_stages_and_without_moves():
    (size,) = plan_of(warm_up=7.0).on([1], load_s=50.0).sizes
    assert size.seconds_by_phase == pytest.approx(
        {"load": 57.0, "loop": 2 * 2048.0, "train": 200.0, "combine": 2.0, "measure": 3 * 64.0}
    )
    assert size.bottleneck == "draw"
    assert size.drawing == pytest.approx(4096 / size.seconds)


def test_what_is_drawn_is_shared_and_the_training_is_not():
    one, eight, many = plan_of().on([1, 8, 512]).sizes
    assert eight.seconds_by_phase["loop"] == pytest.approx(one.seconds_by_phase["loop"] / 8, rel=0.05)
    assert eight.seconds_by_phase["measure"] == pytest.approx(one.seconds_by_phase["measure"] / 8)
    assert {size.seconds_by_phase["train"] for size in (one, eight, many)} == {200.0}
    assert (one.bottleneck, eight.bottleneck, many.bottleneck) == ("draw", "draw", "train")
    # Each of 128 chunks is on a worker of its own: two calls of 8 pictures, one after the other.
    assert many.seconds_by_phase["loop"] == pytest.approx(2 * 16.0)


@pytest.mark.parametrize(
    ("options", "critics", "bottleneck"),
    [
        ({"critique": 1024.0}, 1, "critique"),
        ({"critique": 1024.0}, 64, "draw"),
        ({"critique": 1024.0}, 0, "critique"),
        ({"judge": 512.0}, 1, "judge"),
        ({"judge": 512.0, "together": True}, 1, "judge"),
        ({"filing": 4.0}, 1, "file"),
    ],
)
def test_who_is_busiest_is_the_bottleneck(options, critics, bottleneck):
    (size,) = plan_of(train=1.0, **options).on([16], critics=critics).sizes
    assert size.critics == critics
    assert size.bottleneck == bottleneck
    busiest = size.busy[bottleneck]
    assert busiest <= size.seconds_by_phase["loop"] <= busiest + (size.busy["draw"] if "together" in options else 300)


def test_scores_of_held_out_pictures_are_given_by_the_driving_process_one_after_the_other():
    (many,) = plan_of(scoring=640.0).on([512]).sizes
    assert many.seconds_by_phase["measure"] == pytest.approx(3 * (640.0 + 8.0))


def test_the_critics_are_those_of_the_plan_unless_others_are_named():
    plan = plan_of(critics=3)
    assert [size.critics for size in plan.on([1, 2]).sizes] == [3, 3]
    assert [size.critics for size in plan.on([1, 2], critics=4).sizes] == [4, 4]
    assert [size.critics for size in plan.on([1, 2], critics=[1, 0]).sizes] == [1, 0]


def test_the_cost_is_that_of_all_gpus_for_the_whole_time():
    for size in plan_of().on([1, 64], gpu_hour_price=3.0).sizes:
        assert size.cost == pytest.approx(size.gpus * size.seconds / 3600 * 3.0)
        assert size.gpu_hours == pytest.approx(size.cost / 3.0)
    assert plan_of().on([1]).sizes[0].cost is None


def test_it_is_shown_as_what_it_is():
    table = plan_of().on([1, 64], gpu_hour_price=3.0)
    assert str(table).startswith("Simulated, not run: 2 rounds of 1,024 prompts on a cluster")
    assert str(table).isascii()
    assert len({len(line.rstrip()) for line in table.table().splitlines()}) <= 3
    assert "simulated" in repr(table)
    assert "<table>" in table._repr_html_()
    assert "Simulated, not run" in table._repr_html_()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"gpus": [0]}, "gpus"),
        ({"gpus": [1.5]}, "gpus"),
        ({"gpus": []}, "gpus"),
        ({"gpus": 8}, "gpus"),
        ({"gpus": [1], "critics": -1}, "critics"),
        ({"gpus": [1], "critics": [1, 2]}, "critics"),
        ({"gpus": [1], "critics": "many"}, "critics"),
        ({"gpus": [1], "load_s": -1.0}, "load_s"),
        ({"gpus": [1], "gpu_hour_price": float("nan")}, "gpu_hour_price"),
        ({"gpus": [1], "gpu_hour_price": "3"}, "gpu_hour_price"),
    ],
)
def test_a_cluster_that_makes_no_sense_is_refused_by_name(arguments, name):
    with pytest.raises(aa.InvalidValueError, match=rf"RunPlan\.on.*{name}"):
        plan_of().on(**arguments)
