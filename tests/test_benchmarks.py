"""The benchmarks run, and what they count and measure is right: FLOPs against torch's own counter, shares by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmarks import _ablation_bench as bench
from benchmarks import _ablation_pairs as making
from benchmarks import _flux as flux
from benchmarks import _layouts as layouts
from benchmarks import _record as record
from benchmarks import ablation, bake, regional, regional_quality, training
from benchmarks._ablation_plot import plot as ablation_plot
from diffusers import FluxTransformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic
from artaug.playground.world import SETTINGS
from artaug.regional import ELIGEN, INSTANTX, INVOKEAI, OPEN
from artaug.regional.flex import TILE

TINY = flux.Geometry(
    double_blocks=1,
    single_blocks=2,
    heads=2,
    head_channels=16,
    text_channels=24,
    pooled_channels=20,
    base_tokens=12,
    region_tokens=4,
)
SDPA_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - has no other name
BLACK, WHITE = (Image.new("RGB", (64, 64), colour) for colour in ("black", "white"))


def tiny_setting(*, count=4, side=16, feather=0.0, isolation=ELIGEN):
    regions = tuple(aa.Region(box, "a", feather=feather) for box in flux.boxes(count, side=side))
    return flux.Setting(geometry=TINY, model=TINY.model(), side=side, regions=regions, isolation=isolation)


def counted_by_torch(setting, method):
    """Of linear layers and of attention; the layout's own preparation is neither."""
    mapping = {SDPA_ON_CPU: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with regional.steering(setting, regional.guide(method, setting.isolation)), counter:
        setting.step()
    counts = counter.get_flop_counts()["Global"]
    return counts[torch.ops.aten.addmm], counts[SDPA_ON_CPU]


@pytest.mark.parametrize("method", ["plain", "dense", "merged", "grouped", "output_mix"])
@pytest.mark.parametrize("isolation", [OPEN, ELIGEN, INVOKEAI], ids=["open", "eligen", "invokeai"])
def test_flops_are_those_that_torch_counts(method, isolation):
    if method == "grouped" and isolation is INVOKEAI:
        isolation = aa.Isolation(image_to_image="regions", every=2)
    setting = tiny_setting(isolation=isolation)

    counted = flux.work(setting, method)

    assert (counted.linear_flops, counted.attention_flops) == counted_by_torch(setting, method)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_flops_of_soft_regions_too(count):
    setting = tiny_setting(count=count, feather=0.05)

    counted = flux.work(setting, "merged")

    assert (counted.linear_flops, counted.attention_flops) == counted_by_torch(setting, "merged")


def test_a_tile_that_anyone_sees_counts_for_flex():
    setting = tiny_setting(isolation=INSTANTX, side=32)
    sight = flux.sight_of(setting, isolated=True)
    flexed = flux.FlexSight.of(sight, torch.device("cpu"))
    seen = (sight.weights[:, sight.groups] > 0)[flexed.queries][:, flexed.keys]
    padded = torch.nn.functional.pad(seen, (0, -seen.shape[1] % TILE, 0, -seen.shape[0] % TILE))
    tiles = padded.unfold(0, TILE, TILE).unfold(1, TILE, TILE).any(dim=-1).any(dim=-1)

    counted = flux.work(setting, "flex")

    layers, channels = 3, 32
    assert counted.attention_flops == 4 * int(tiles.sum()) * TILE**2 * channels * layers


def test_only_dense_attention_holds_a_mask_of_queries_times_keys():
    setting = tiny_setting()
    tokens = 16 * 16 + 12 + 4 * 4

    held = {method: flux.work(setting, method).mask_bytes for method in regional.METHODS}

    assert held["dense"] == 4 * tokens**2
    assert held["plain"] == held["output_mix"] == 0
    assert 0 < max(held["merged"], held["grouped"]) < held["dense"] / 50


@given(st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([16, 32, 48, 64, 128]))
def test_boxes_lie_along_the_grid_and_apart(count, side):
    boxes = flux.boxes(count, side=side)

    assert len(boxes) == count
    assert all(one.overlap(two) == 0 for number, one in enumerate(boxes) for two in boxes[:number])
    edges = [edge * side for box in boxes for edge in (box.left, box.top, box.right, box.bottom)]
    assert edges == pytest.approx([round(edge) for edge in edges], abs=1e-9)


def test_the_step_benchmark_has_a_row_for_every_method(monkeypatch):
    methods = tuple(method for method in regional.METHODS if method != "flex")  # which takes a compiler half a minute
    monkeypatch.setitem(regional.LAYOUTS, "hard", regional.Layouts(methods=methods))

    rows = list(regional.measured(TINY, [regional.Series(kind="hard", side=16, counts=(1, 2))], rounds=2))

    assert [(row["method"], row["regions"]) for row in rows] == [(one, count) for count in (1, 2) for one in methods]
    assert {"method", "regions", "tokens", "seconds", "ratio_to_plain", "peak_bytes"} <= set(rows[0])
    weights = sum(one.numel() * 4 for one in TINY.model().parameters())
    assert all(row["peak_bytes"] > weights for row in rows)
    assert {row["ratio_to_plain"] for row in rows if row["method"] == "plain"} == {1}
    peaks = {row["method"]: row["peak_bytes"] for row in rows if row["regions"] == 2}
    assert peaks["dense"] > peaks["merged"] > peaks["plain"]
    json.dumps(rows)
    assert len(regional.plot(rows).axes) == 1


def test_the_quality_benchmark_has_a_row_for_every_way_and_task():
    arms = {name: regional_quality.ARMS[name] for name in ("long prompt", "ELIGEN")}

    rows = regional_quality.rows_of(arms, count=3)

    assert [(row["task"], row["way"]) for row in rows] == [
        (task, way) for task in ("things", "adjective") for way in arms
    ]
    things, adjective = rows[1], rows[3]
    assert all(0 <= things[share] <= 1 for share in ("colour", "thing", "mixed", "scene", "outside"))
    assert rows[2]["gain"] == 1, "the whole picture's adjective is what the others are measured by"
    assert adjective["outside"] < rows[2]["outside"]
    assert len(regional_quality.plot(rows).axes) == 2
    assert record.table(rows).count("\n") == len(rows)


def test_a_layout_asks_for_things_of_many_colours_in_places_apart():
    for layout in layouts.layouts(30, seed=5):
        boxes = layout.boxes
        assert all(one.overlap(two) == 0 for number, one in enumerate(boxes) for two in boxes[:number])
        assert len({thing.colour for thing in layout.things}) == len(boxes) == len(layout.plan(weight=2).regions)
        assert all(playground.parse(region.prompt).things for region in layout.plan(weight=2).regions)
        assert playground.parse(layout.scene).setting == layout.setting


def test_a_rendered_layout_is_wholly_right_and_a_plain_scene_wholly_wrong():
    halves = tuple(aa.Box(left, 0.2, left + 0.45, 1) for left in (0.05, 0.5))
    things = playground.parse("a red cone on the left and a blue ball on the right").things
    layout = layouts.Layout(setting="at noon", boxes=halves, things=things)
    crossed = layouts.Layout(setting="at noon", boxes=halves, things=things[::-1])
    right = playground.render(layout.long_prompt, seed=0)

    assert layouts.placed(right, layout) == layouts.Placed(colour=1, thing=1, mixed=0)
    assert layouts.placed(right, crossed) == layouts.Placed(colour=0, thing=0, mixed=1)
    assert layouts.placed(playground.render("at noon", seed=0), layout) == layouts.Placed(colour=0, thing=0, mixed=0)


def test_the_sky_tells_the_setting():
    known = layouts.skies()
    rendered = [
        (setting, playground.render(f"a red cone {setting}", seed=seed))
        for setting in SETTINGS
        for seed in range(90, 105)
    ]

    right = [layouts.setting_of(image, known) == setting for setting, image in rendered]

    assert np.mean(right) > 0.9


def test_what_changes_inside_a_box_is_not_outside():
    box = aa.Box(0.25, 0.25, 0.75, 0.75)
    after = BLACK.copy()
    after.paste("white", box.to_pixels(BLACK.size))

    assert layouts.change_outside(BLACK, after, [box]) == 0
    assert layouts.change_outside(BLACK, WHITE, [box]) == 1
    assert layouts.change_outside(BLACK, WHITE, [aa.Box(0, 0, 1, 1)]) == 0


def test_a_pasted_square_has_a_seam_and_noise_has_none():
    box = aa.Box(0.25, 0.25, 0.75, 0.75)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    pasted = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    pasted.paste("white", box.to_pixels(pasted.size))

    assert layouts.seam(noise, [box]) == pytest.approx(1, abs=0.1)
    assert layouts.seam(pasted, [box]) > 10


ONE_OF_EACH = [
    bench.Cell(axis="control", arm="words added", seed=0),
    *[bench.Cell(axis="pairs", arm=arm, seed=0, pairs=2) for arm in (bench.OURS, "DPO, best of k")],
    bench.Cell(axis="rounds", arm=bench.OURS, seed=0, pairs=4, rounds=2),
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A journal of some cells, and the bench they were measured on."""
    journal = ablation.Journal(tmp_path_factory.mktemp("ablation") / "ablation.jsonl", {"settings": "quick"})
    journal.begin()
    measuring = bench.Bench(bench.QUICK, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "CHUNK", 4)
        journal.measure(ONE_OF_EACH, measuring)
        yield journal, measuring


def test_the_ablation_has_a_row_for_every_cell(measured):
    words, ours, drawn, twice = measured[0].rows()

    assert words["gain"] > 5 * abs(ours["gain"]), "the model knows the words, and two steps teach little"
    assert [ours[name] for name in ("kept", "images", "critic_calls")] == [2, 4, 2]
    assert [drawn[name] for name in ("kept", "images", "critic_calls")] == [2, 4, 0]
    assert twice["learning_passes"] == 2 * ours["learning_passes"] == 2 * (2 * 2 * 4)
    assert all(row["gain_low"] <= row["gain"] <= row["gain_high"] for row in (words, ours, drawn, twice))
    assert ours["gain"] == pytest.approx(np.mean(ours["gains"]), abs=1e-6)


def test_an_ablation_goes_on_from_its_journal_and_no_other(measured):
    journal, _ = measured
    rows = journal.rows()

    journal.begin()
    ablation.Journal(journal.path, journal.about).measure(ONE_OF_EACH, None)  # no bench: there is nothing to measure

    assert journal.rows() == rows
    with pytest.raises(SystemExit, match="of other settings"):
        ablation.Journal(journal.path, {"settings": "others"}).begin()


@pytest.mark.parametrize("way", ["interaction", "several"])
def test_passes_are_those_of_the_denoiser_counted_a_picture(measured, way):
    _, measuring = measured
    way = measuring.interaction(0.25) if way == "interaction" else measuring.several
    way.made.clear()
    seen = []
    model = measuring.base.pipeline.transformer
    counting = model.register_forward_pre_hook(
        lambda _, __, named: seen.append(len(named["hidden_states"])), with_kwargs=True
    )

    found = way.kept(2)
    counting.remove()

    told = found.cost.passes + sum(cost.passes for _, cost in way.made[found.prompts :])
    assert len(way.made) % making.CHUNK == 0 < found.prompts
    assert sum(seen) == told


def test_a_distracted_critic_misplaces_as_many_boxes_as_asked_and_nothing_else():
    prompts = playground.prompts(24, seed=1)
    images = [playground.render(prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    sober = PhotometricCritic().critique_batch(images, prompts)

    for wrong in (0, 0.5):
        critic = making.Distracted(critic=PhotometricCritic(), wrong=wrong, seed=0)
        answers = critic.critique_batch(images, prompts)
        boxes = [
            one.box != other.box
            for answer, asked in zip(answers, sober, strict=True)
            for one, other in zip(answer.suggestions, asked.suggestions, strict=True)
        ]
        assert np.mean(boxes) == pytest.approx(wrong, abs=0.1)
        assert [[one.prompt for one in answer.suggestions] for answer in answers] == [
            [one.prompt for one in answer.suggestions] for answer in sober
        ]


def test_the_best_of_several_is_the_best_of_those_that_show_what_was_asked():
    prompt = "a red cone on the left at night"
    good, better = (playground.render(prompt + words, seed=0) for words in (", vivid", ", vivid, glowing"))
    dull, wrong = playground.render(prompt, seed=0), playground.render("a blue ball at night, vivid, glowing", seed=0)
    choosing = making.BestOfSeveral(synthesizer=None, draws=4, sampling_steps=1, seed=0)

    pair = choosing._best(prompt, [good, wrong, better, dull])  # noqa: SLF001

    assert (pair.before, pair.after) == (dull, better)
    assert choosing._best(prompt, [wrong, wrong]) is None  # noqa: SLF001


def made_up(settings, seeds):
    """Rows of every cell, the gain in them growing with the pairs, by prompts."""
    cells = [cell for seed in seeds for cell in bench.cells(settings, seed)]
    told = {"passes": 90, "learning_passes": 30, "drawing_passes": 6, "alignment": 1.0, "drift": 0.001}
    return [
        {
            **vars(cell),
            **told,
            "gain": cell.pairs + cell.seed,
            "gains": [cell.pairs + cell.seed, cell.pairs + cell.seed],
        }
        for cell in cells
    ]


def test_arms_are_compared_with_ours_at_as_many_pairs():
    rows = made_up(bench.Settings(), [0, 1])
    for row in rows:
        if row["arm"] == "DPO":
            row["gains"] = [one - change for one, change in zip(row["gains"], (1, 3), strict=True)]

    found = {(row["arm"], row["pairs"]): row for row in ablation.comparisons(rows)}

    assert {pairs for _, pairs in found} == set(bench.Settings().pairs)
    assert {row["gain"] for (arm, _), row in found.items() if arm == "DPO"} == {-2.0}
    assert (found["DPO", 32]["low"], found["DPO", 32]["high"], found["DPO", 32]["seeds"]) == (-3, -1, 2)
    assert found["TwoStage", 32]["low"] == found["TwoStage", 32]["high"] == 0


def test_the_ablation_is_shown_axis_by_axis():
    figure = ablation_plot(made_up(bench.Settings(), [0, 1, 2]))

    assert len(figure.axes) == 8
    assert len(figure.axes[0].get_legend_handles_labels()[1]) == len(bench.ARMS)


def test_the_baking_benchmark_has_a_row_for_every_case_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = bake.Geometry(channels=32, double_blocks=1, single_blocks=1)

    cases = (bake.BFLOAT16, bake.Case(dtype=torch.float32, cold=True, stochastic_seed=0))

    rows = bake.measured(tiny, cases, rounds=2)

    assert [(row["dtype"], row["rounding"], row["cold"]) for row in rows] == [
        ("bfloat16", "nearest", False),
        ("float32", "stochastic", True),
    ]
    for row in rows:
        assert row["ratio_to_cp"] > row["ratio_to_cp_unsynced"] > 0
        assert row["lora_layers"] == 17
        assert row["peak_bytes"] > 0
        assert row["bytes"] > sum(outputs * inputs for outputs, inputs in tiny.shapes().values()) * 2
    assert not list((tmp_path / "runs").iterdir())
    assert len(bake.plot(rows).axes) == 1


def test_the_baking_benchmark_has_the_layers_of_flux():
    transformer = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    )

    found = {name: tuple(one.weight.shape) for name, one in transformer.named_modules() if hasattr(one, "in_features")}

    shapes = bake.Geometry(channels=32, double_blocks=1, single_blocks=1).shapes()
    assert shapes == {name: shape for name, shape in found.items() if name in shapes}
    assert shapes.keys() == {name for name in found if "transformer_blocks." in name}


@pytest.mark.parametrize("storage", ["plain", "fp8", "nf4"])
def test_the_training_benchmark_has_a_row_for_every_method_and_leaves_the_model_as_it_was(storage):
    geometry = replace(TINY, storage=storage)
    module = geometry.model()
    layers, weights = dict(module.named_modules()), {name: one.clone() for name, one in module.state_dict().items()}
    case = training.Case(side=4, batch=2, recomputing=True)
    rows = training.described(geometry, module, case, rounds=2)
    taken = (*training.OBJECTIVES, training.SCRIPT) if storage == "plain" else training.SHORT
    assert tuple(row["method"] for row in rows) == taken
    assert rows[0]["ratio_to_sft"] == 1
    assert rows[-1].get("peak_to_script") == (1 if storage == "plain" else None)
    assert all(row["pairs_per_second"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert dict(module.named_modules()) == layers
    assert all(
        one.dtype == weights[name].dtype and torch.equal(weights[name].float(), one.float())
        for name, one in module.state_dict().items()
    )
    assert len(training.plot(rows).axes) == 2


def test_a_benchmark_that_is_cut_short_leaves_the_rows_it_had(tmp_path, monkeypatch):
    def measure(*, quick):
        yield {"row": 1, "quick": quick}
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["bench", "--quick", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        record.run("bench", measure, training.plot)
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == [{"row": 1, "quick": True}]
