"""The benchmark of regions' quality: random layouts, and metrics that notice what they measure."""

import numpy as np
import pytest
from benchmarks import _layouts as layouts
from benchmarks import _record as record
from benchmarks import regional_quality
from PIL import Image

import artaug as aa
from artaug import playground
from artaug.playground.world import SETTINGS

BLACK, WHITE = (Image.new("RGB", (64, 64), color) for color in ("black", "white"))


def test_the_quality_benchmark_has_a_row_for_every_way_and_task():
    arms = {name: regional_quality.ARMS[name] for name in ("long prompt", "ELIGEN")}

    rows = regional_quality.rows_of(arms, count=3)

    assert [(row["task"], row["way"]) for row in rows] == [
        (task, way) for task in ("things", "adjective") for way in arms
    ]
    things, adjective = rows[1], rows[3]
    assert all(0 <= things[share] <= 1 for share in ("color", "thing", "mixed", "scene", "outside"))
    assert rows[2]["gain"] == 1, "the whole picture's adjective is what the others are measured by"
    assert adjective["outside"] < rows[2]["outside"]
    assert len(regional_quality.plot(rows).axes) == 2
    assert record.table(rows).count("\n") == len(rows)


def test_a_layout_asks_for_things_of_many_colours_in_places_apart():
    for layout in layouts.layouts(30, seed=5):
        boxes = layout.boxes
        assert all(box.overlap(other) == 0 for number, box in enumerate(boxes) for other in boxes[:number])
        assert len({thing.color for thing in layout.things}) == len(boxes) == len(layout.plan(weight=2).regions)
        assert all(playground.parse(region.prompt).things for region in layout.plan(weight=2).regions)
        assert playground.parse(layout.scene).setting == layout.setting


def test_a_rendered_layout_is_wholly_right_and_a_plain_scene_wholly_wrong():
    halves = tuple(aa.Box(left, 0.2, left + 0.45, 1) for left in (0.05, 0.5))
    things = playground.parse("a red cone on the left and a blue ball on the right").things
    layout = layouts.Layout(setting="at noon", boxes=halves, things=things)
    crossed = layouts.Layout(setting="at noon", boxes=halves, things=things[::-1])
    right = playground.render(layout.long_prompt, seed=0)

    assert layouts.region_accuracy(right, layout) == layouts.RegionAccuracy(color=1, thing=1, mixed=0)
    assert layouts.region_accuracy(right, crossed) == layouts.RegionAccuracy(color=0, thing=0, mixed=1)
    assert layouts.region_accuracy(playground.render("at noon", seed=0), layout) == layouts.RegionAccuracy(
        color=0, thing=0, mixed=0
    )


def test_the_sky_tells_the_setting():
    sky_colors = layouts.sky_colors()
    rendered = [
        (setting, playground.render(f"a red cone {setting}", seed=seed))
        for setting in SETTINGS
        for seed in range(90, 105)
    ]

    right = [layouts.nearest_setting(image, sky_colors) == setting for setting, image in rendered]

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
