"""Systems side by side: prompts of two and three things, what a picture shows of them, and the table."""

import json
from itertools import product

import pytest
from benchmarks import _systems_arms as arms
from benchmarks import systems
from benchmarks._systems_world import Outcome, request_of, requests, wrong_things
from PIL import Image

import artaug as aa
from artaug import playground

TWO = request_of("a red cone on the left and a blue ball on the right at night")


@pytest.mark.parametrize("things", systems.THINGS)
def test_requests_are_of_so_many_things_all_different_and_read_back(things):
    made = requests(20, things=things, seed=3)

    assert made == requests(20, things=things, seed=3) != requests(20, things=things, seed=4)
    for one in made:
        assert request_of(one.prompt) == one
        for part in ("color", "shape", "place"):
            assert len({getattr(thing, part) for thing in one.things}) == things
        assert all(suggestion.prompt in one.prompt for suggestion in one.layout())


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        ("a red cone on the left and a blue ball on the right at night", (1, 0, 0, 1)),
        ("a blue cone on the left and a red ball on the right at night", (0, 1, 0, 2 / 3)),
        ("a red cone on the left at night", (0, 0, 0.5, 0.5)),
        ("a red cone on the left and a green ball on the right at night", (0, 0, 0, 5 / 6)),
    ],
)
def test_a_picture_shows_all_or_swaps_colors_or_drops_a_thing(drawn, expected):
    outcome = Outcome.of(playground.render(drawn, seed=0), TWO)

    assert (outcome.success, outcome.swapped, outcome.dropped) == expected[:3]
    assert outcome.right == pytest.approx(expected[3])


def test_what_is_wrong_is_named_first_by_the_rule_in_the_place_of_a_model():
    picture = playground.render("a red cone on the left at night", seed=0)

    assert wrong_things(picture, TWO) == [TWO.things[1]]
    message = f"This picture was drawn from the prompt:\n{TWO.prompt}\n"
    assert arms.reflect(message, picture).endswith(
        "Final prompt: a blue ball on the right and a red cone on the left at night"
    )
    assert arms.reflect(message, playground.render(TWO.prompt, seed=0)) == "NOTHING TO IMPROVE"
    assert len(wrong_things(Image.new("RGB", (64, 64)), TWO)) == 2


def test_a_quick_run_resumes_and_writes_a_row_for_every_arm_and_number_of_things(tmp_path, monkeypatch):
    few = ["base", "regional planning", "IRG, 2 turns", "checklist, 4 turns", "DreamSync"]
    bench = systems.Systems(tmp_path, quick=True)
    bench.measure(few, [0])
    monkeypatch.setattr(systems.SeedBench, "row", None)  # nothing is left to measure
    bench.measure(few, [0])

    written = bench.write()

    content = json.loads((tmp_path / "systems.json").read_text())
    assert [(row["model"], row["arm"], row["things"]) for row in content["estimates"]] == list(
        product(arms.MODELS, few, systems.THINGS)
    )
    by_arm = {row["arm"]: row for row in content["estimates"]}
    assert by_arm["base"]["success"]["difference"] == 0
    assert by_arm["base"]["passes"] == arms.QUICK.sampling_steps
    assert by_arm["DreamSync"]["learning_passes"] > 0 == by_arm["base"]["learning_passes"]
    assert written.count("\n") == 1 + 4 * len(few)
    assert (tmp_path / "systems.png").stat().st_size > 0


def test_the_confused_model_draws_as_well_and_other_things():
    request = requests(1, things=3, seed=0)[0]
    sound, same, confused = (
        arms.model_with(noise, steps=2).synthesize(aa.Plan(request.prompt), seed=0) for noise in (0.0, 0.0, 1.5)
    )

    assert sound == same != confused


def test_rows_of_an_arm_that_has_changed_are_measured_again():
    row = {"arm": "base", "model": "confused", "seed": 0, "words": "others"}
    assert systems.measured_cell(row) is None
    assert systems.measured_cell(row | {"words": arms.ARMS["base"].words}) == systems.Cell("base", "confused", 0)
    assert systems.measured_cell(row | {"arm": "gone"}) is None
