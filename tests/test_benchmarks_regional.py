"""The grid of regional attention: it says what it measures, its counts are torch's, and its regret is arithmetic."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from benchmarks import _drawings as drawings
from benchmarks import _flux as flux
from benchmarks import _grid as grid
from benchmarks import _memory as memory
from benchmarks import _regional_report as report
from benchmarks import _timing as timing
from benchmarks import regional
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from artaug import playground
from support.tiny_geometry import TINY

SDPA_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - has no other name
ONCE = regional.Effort(seconds=0, min_rounds=1)


def tiny_point(**options):
    return grid.Point(**{"tokens": 64, "regions": 4, "geometry": TINY, **options})


def step_of(point, method):
    """The work of one step, and the tensors that it is given."""
    setting = regional.make_setting(point, point.geometry.model())
    return lambda: regional.step_seconds(setting, point.guide(method), count=1), setting.inputs


@pytest.mark.parametrize("method", ["plain", "dense", "merged", "grouped", "output_mix"])
def test_flops_are_those_that_torch_counts(method):
    work, inputs = step_of(tiny_point(), method)
    mapping = {SDPA_ON_CPU: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    counts = counter.get_flop_counts()["Global"]

    observed = memory.observe(work, inputs=inputs)

    assert (observed.linear_flops, observed.attention_flops) == (counts[torch.ops.aten.addmm], counts[SDPA_ON_CPU])


@pytest.mark.parametrize("gradients", [False, True])
def test_a_step_with_gradients_reaches_the_latents(gradients):
    work, inputs = step_of(tiny_point(gradients=gradients), "merged")

    work()

    latents = [tensor for tensor in inputs if tensor.shape == (1, 64, flux.LATENT_CHANNELS)]
    assert [tensor.grad is not None for tensor in latents] == [gradients]


def test_a_plain_step_of_a_batch_is_one_attention_of_all_tokens_a_layer():
    point = tiny_point(batch=3)

    observed = memory.observe(*step_of(point, "plain")[:1], inputs=())

    layers, tokens = 3, 64 + TINY.base_tokens
    assert observed.num_attention_calls == layers
    assert observed.attention_flops == 3 * layers * 4 * tokens**2 * TINY.heads * TINY.head_channels


def test_kernels_outside_the_named_block_are_not_counted():
    query = torch.randn(1, 1, 4, 8)

    def work():
        attend(query, query, query)
        with torch.profiler.record_function("inside"):
            attend(query, query, query)

    attend = torch.nn.functional.scaled_dot_product_attention
    assert memory.observe(work, inputs=()).num_attention_calls == 2
    assert memory.observe(work, inputs=(), within="inside").num_attention_calls == 1


@given(st.sampled_from([1, 2, 3, 4, 8, 16]), st.sampled_from([8, 16, 32, 48, 64, 128]), st.integers(0, 40))
def test_boxes_lie_along_the_grid_and_apart(count, side, variant):
    boxes = flux.boxes(count, side=side, variant=variant)

    assert len(boxes) == count
    assert all(box.overlap(other) == 0 for number, box in enumerate(boxes) for other in boxes[:number])
    edges = [edge * side for box in boxes for edge in (box.left, box.top, box.right, box.bottom)]
    assert edges == pytest.approx([round(edge) for edge in edges], abs=1e-9)


@pytest.mark.parametrize("points", [grid.cpu_points, grid.gpu_points, grid.quick_points])
def test_a_point_is_the_batch_that_it_says(points):
    for point in points():
        pictures = point.pictures()
        counts = [len(regions) for regions in pictures]

        assert point.side**2 == point.tokens
        assert (len(pictures), counts[0]) == (point.batch, point.regions)
        with_regions = [regions for regions in pictures if regions]
        assert len(set(with_regions)) == (1 if point.rows == "alike" else len(with_regions))
        assert pictures != point.pictures(variant=1000), "another setting has other layouts"
        assert (set(counts) == {point.regions}) == (point.rows != "ragged")
        assert {"plain", "dense", "merged", "auto"} <= set(point.methods)
        assert ("grouped" in point.methods) == (point.layout == "hard")


def test_the_grid_reaches_all_that_it_has_to_show():
    points = [point.columns for point in grid.cpu_points()]
    extremes = {
        "image_tokens": {64, 256, 1024, 4096, 16384},
        "regions": {1, 2, 4, 8, 16},
        "batch": {1, 2, 4, 8, 16},
        "rows": {"alike", "unlike", "ragged"},
        "layout": set(grid.ISOLATIONS),
    }
    for name, values in extremes.items():
        assert {point[name] for point in points} == values
    assert {name for point in grid.cpu_points() for name in point.extra} == {"flex", "output_mix"}
    assert len({tuple(point.values()) for point in points}) == len(points)
    assert {point["dtype"] for point in points} >= {"float32"}
    assert {point["gradients"] for point in points} == {False, True}


def test_the_most_valuable_points_come_first_on_a_gpu():
    first = [(16 * point.side, point.regions, point.batch, point.rows) for point in grid.gpu_points()[:4]]
    assert first == [(1024, 4, 1, "alike"), (1024, 16, 1, "alike"), (1024, 4, 4, "unlike"), (2048, 4, 1, "alike")]
    assert {point.geometry for point in grid.gpu_points()} == {flux.FLUX_DEV}


def test_a_round_takes_every_way_once_and_begins_with_another():
    order = []
    ways = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}

    seconds = timing.interleaved(ways, rounds=4)

    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert seconds == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


def test_regret_is_the_choosers_time_over_the_best_ones_within_rounds():
    # The third round was slow for all, and the median of the ratios does not see it.
    seconds = {
        "plain": [1.0, 1.0, 5.0],
        "dense": [2.0, 2.0, 10.0],
        "merged": [3.0, 3.0, 15.0],
        "auto": [2.2, 3.0, 12.0],
    }

    regret = timing.regret(seconds, "auto", among=("dense", "merged", "flex"), choice="merged")

    assert regret.best == "dense"
    assert regret.ratio == pytest.approx(1.2)
    assert (regret.ratio_low, regret.ratio_high) == pytest.approx((1.15, 1.35))
    assert regret.choice_ratio == pytest.approx(1.5)
    assert timing.regret(seconds, "auto", among=("dense", "merged")).choice_ratio is None


def test_whose_choice_is_the_best_has_no_regret_of_it():
    seconds = {"dense": [2.0, 2.5], "merged": [3.0, 3.5], "auto": [2.1, 2.4]}
    assert timing.regret(seconds, "auto", among=("dense", "merged"), choice="dense").choice_ratio == 1


def test_the_summary_has_the_worst_the_median_and_the_share_that_is_good():
    assert timing.summary([1.0, 1.05, 1.06, 2.0]) == {
        "points": 4,
        "max": 2.0,
        "median": pytest.approx(1.055),
        "within_5_percent": 0.5,
    }


def test_rounds_stay_within_their_limits():
    effort = regional.Effort(seconds=10, min_rounds=3, max_rounds=7)
    assert [effort.rounds(seconds) for seconds in (0.01, 2.0, 60.0)] == [7, 5, 3]


def test_the_choice_is_the_method_with_the_same_kernels():
    model = TINY.model()
    rows = regional.point_rows(tiny_point(rows="unlike", batch=2, layout="soft"), model, effort=ONCE)
    observed = {
        name: memory.Observed(1, 1, 1, calls) for name, calls in {"dense": {"a": 1}, "merged": {"b": 2}}.items()
    }
    assert regional.chosen({**observed, "auto": memory.Observed(1, 1, 1, {"b": 2})}) == "merged"
    assert regional.chosen({**observed, "auto": memory.Observed(1, 1, 1, {"a": 1, "b": 1})}) is None
    assert rows[-1]["method"] == "auto"
    assert rows[-1]["choice"] in {"dense", "merged", None}


def test_the_grid_has_a_row_for_every_method_and_a_figure_of_regret():
    points = [
        tiny_point(extra=("output_mix",)),
        tiny_point(regions=2, batch=2, rows="unlike"),
        tiny_point(layout="balanced", geometry=replace(TINY, single_blocks=1), gradients=True),
    ]

    rows = list(regional.measured(points, effort=ONCE))

    assert [(row["method"], row["regions"], row["batch"]) for row in rows] == [
        (method, point.regions, point.batch) for point in points for method in point.methods
    ]
    weights = sum(weight.numel() * 4 for weight in TINY.model().parameters())
    assert all(row["peak_bytes"] > weights for row in rows if row["layout"] == "hard")
    masks = {row["method"]: row["peak_bytes"] for row in rows if row["batch"] == 2}
    assert masks["dense"] > masks["merged"] > masks["plain"]
    assert {row["ratio_to_plain"] for row in rows if row["method"] == "plain"} == {1}
    assert {row["flops_to_plain"] for row in rows if row["method"] == "output_mix"} == {5}
    assert all(row["regret"] > 0 and row["best"] in grid.EXACT for row in rows if row["method"] == "auto")
    summary = report.summarize(rows)
    assert summary["regret"]["points"] == 3
    assert summary["regret"]["max"] == summary["worst"]["regret"]
    assert report.text(rows).count("\n") >= 1 + len(points)
    json.dumps([rows, summary])
    assert len(report.plot(rows).axes) == 4


def test_no_point_begins_after_the_limit():
    assert not list(regional.measured([tiny_point()], effort=ONCE, limit_s=-1))


def test_nothing_is_summarized_before_the_first_point_is_measured():
    assert report.summarize([]) == {}


def test_a_drawing_has_a_row_for_every_method_and_counts_its_calls():
    synthesizer = playground.synthesizer(steps=1)
    rows = drawings.batch_rows(synthesizer, drawings.Batch(size=2, rows="unlike"), rounds=1)

    assert tuple(row["method"] for row in rows) == drawings.METHODS
    calls = {row["method"]: row["attention_calls"] for row in rows}
    layers = 7
    assert calls["plain"] == layers, "one for both pictures"
    assert calls["output_mix"] >= 2 * layers
    assert all(row["encoder_calls"] >= 1 for row in rows)
    assert not synthesizer.pipeline.transformer._forward_hooks  # noqa: SLF001 - has no other name
    assert report.summarize(rows)["regret"]["points"] == 1
    assert report.text(rows)


def test_kernels_are_compared_on_the_same_prompts():
    synthesizer = playground.synthesizer(guide=grid.make_guide("dense", None), steps=1)
    way = drawings.Way(synthesizer, drawings.Batch(size=1), itertools.count(1))

    first, second = way.calls(), way.calls()

    assert first.attention == second.attention
    assert first.encoder_again == second.encoder_again == 0, "prompts are encoded once"


def test_pictures_have_the_same_boxes_or_their_own_and_every_drawing_other_prompts():
    alike, unlike = drawings.Batch(size=4).plans(3), drawings.Batch(size=4, rows="unlike").plans(3)

    def boxes(plans):
        return {tuple(region.area for region in plan.regions) for plan in plans}

    assert (len(boxes(alike)), len(boxes(unlike))) == (1, 4)
    prompts = [
        {region.prompt for plan in drawings.Batch(size=2).plans(number) for region in plan.regions}
        for number in range(12)
    ]
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(prompts, 2))
