"""The grammar of the little world: captions and scenes say the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artaug.errors import ArtAugError
from artaug.playground.world import (
    ADJECTIVES,
    COLORS,
    PLACES,
    SETTINGS,
    SHAPES,
    CaptionError,
    Scene,
    Thing,
    is_held_out,
    parse,
    prompts,
)

_adjectives = st.lists(st.sampled_from(ADJECTIVES), unique=True).map(tuple)


@st.composite
def _scenes(draw: st.DrawFn) -> Scene:
    places = draw(st.lists(st.sampled_from((*PLACES, None)), max_size=2, unique=True))
    things = tuple(
        Thing(
            color=draw(st.sampled_from(COLORS)),
            shape=draw(st.sampled_from(SHAPES)),
            place=place,
            adjectives=draw(_adjectives),
        )
        for place in places
    )
    return Scene(things=things, setting=draw(st.sampled_from((*SETTINGS, None))), adjectives=draw(_adjectives))


@given(_scenes())
def test_a_caption_describes_all_of_its_scene(scene: Scene) -> None:
    assert parse(scene.caption) == scene


def test_captions_read_naturally() -> None:
    ring = Thing(color="orange", shape="ring", place="in the middle")
    cone = Thing(color="red", shape="cone", place="on the left", adjectives=("vivid", "softly lit"))
    scene = Scene(things=(cone, ring), setting="at night", adjectives=("sharp",))
    expected = "a vivid softly lit red cone on the left and an orange ring in the middle at night, sharp"
    assert scene.caption == expected


@pytest.mark.parametrize("caption", ["", "vivid, sharp", "at sunset", "at sunset, glowing", "a red cone"])
def test_parts_may_be_left_open(caption: str) -> None:
    assert parse(caption).caption == caption


def test_case_spacing_and_a_full_stop_do_not_matter() -> None:
    assert parse(" A red  Cone on the left, VIVID. ") == parse("a red cone on the left, vivid")


@pytest.mark.parametrize(
    ("caption", "complaint"),
    [
        ("a red dog on the left", "'a red dog on the left'"),
        ("a red cone on the left, pretty", "'pretty'"),
        ("a red cone on the left and a blue cube on the left", "different places"),
        ("a red cone and a blue cube and a green ball", "holds 3 things"),
        ("a red cone, vivid, vivid", "twice"),
    ],
)
def test_what_the_world_does_not_contain_is_refused_by_name(caption: str, complaint: str) -> None:
    with pytest.raises(CaptionError, match=complaint) as caught:
        parse(caption)
    assert isinstance(caught.value, ArtAugError)
    assert isinstance(caught.value, ValueError)


def test_one_triple_in_six_is_held_out_evenly() -> None:
    every = [Thing(color=c, shape=s, place=p) for c in COLORS for s in SHAPES for p in PLACES]
    kept = [thing for thing in every if is_held_out(thing)]
    assert len(kept) * 6 == len(every)
    assert [sum(thing.color == color for thing in kept) for color in COLORS] == [2] * 6
    assert [sum(thing.shape == shape for thing in kept) for shape in SHAPES] == [3] * 4
    assert [sum(thing.place == place for thing in kept) for place in PLACES] == [4] * 3


@pytest.mark.parametrize("held_out", [False, True])
def test_prompts_are_plain_distinct_and_from_their_side_of_the_split(held_out: bool) -> None:
    captions = prompts(256, seed=0, held_out=held_out)
    scenes = [parse(caption) for caption in captions]
    assert len(set(captions)) == 256
    assert not any(scene.adjectives or any(thing.adjectives for thing in scene.things) for scene in scenes)
    assert all(is_held_out(thing) == held_out for scene in scenes for thing in scene.things)
    assert captions == prompts(256, seed=0, held_out=held_out)
    assert captions != prompts(256, seed=1, held_out=held_out)


def test_six_prompts_in_ten_ask_for_one_thing() -> None:
    share = sum(len(parse(caption).things) == 1 for caption in prompts(120, seed=0)) / 120
    assert 0.45 < share < 0.7


def test_prompts_repeat_only_when_there_is_nothing_new_left() -> None:
    captions = prompts(600, seed=0, held_out=True)
    assert len(captions) == 600
    assert len(set(captions)) > 250
