"""Pairs, verdicts and attempts."""

import dataclasses

import pytest
from PIL import Image

import artaug as aa
from artaug.pairs import pair_digest
from support.strategies import pair


def test_a_pair_has_two_pictures_of_one_size():
    with pytest.raises(aa.InvalidValueError) as caught:
        aa.ImagePair(
            prompt="a pear",
            seed=0,
            before=Image.new("RGB", (8, 8)),
            after=Image.new("RGB", (8, 9)),
            plan=aa.Plan("a pear"),
        )
    assert str(caught.value) == (
        "the two pictures of 'a pear' differ in size: before (8, 8), after (8, 9). A pair needs two pictures of one size."
    )


def test_a_pair_in_which_nothing_changed_has_one_picture_and_a_plan_without_regions():
    picture = Image.new("RGB", (8, 8), "teal")
    assert aa.ImagePair.unchanged(picture, prompt="a pear", seed=3) == aa.ImagePair(
        prompt="a pear", seed=3, before=picture, after=picture, plan=aa.Plan("a pear")
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_verdict_needs_finite_numbers(number):
    with pytest.raises(aa.InvalidValueError, match=r"Verdict: scores\.gain: Input should be a finite number"):
        aa.Verdict(keep=True, reason="it rose", scores={"gain": number})


def test_kept_dropped_and_skipped_are_attempts():
    verdict = aa.Verdict(keep=True, reason="it rose", scores={})
    for ending in (aa.Kept(pair(1, 2), verdict), aa.Dropped(pair(1, 2), verdict), aa.Skipped("a pear", 0, "why")):
        assert isinstance(ending, aa.Attempt)


def test_the_digest_of_a_pair_covers_prompt_and_pictures_and_the_plan_only_on_request():
    original = pair(1, 2)
    assert pair_digest(dataclasses.replace(original, seed=99, before=original.before.copy())) == pair_digest(original)
    changed = [
        dataclasses.replace(original, prompt="another"),
        dataclasses.replace(original, before=original.after),
        dataclasses.replace(original, before=original.after, after=original.before),
    ]
    assert len({pair_digest(example) for example in (original, *changed)}) == 4
    planned = dataclasses.replace(original, plan=aa.Plan("brighter"))
    assert pair_digest(planned) == pair_digest(original)
    assert pair_digest(planned, include_plan=True) != pair_digest(original, include_plan=True)


def test_the_digest_of_a_pair_sees_the_colours_of_a_palette():
    def striped(first, second):
        image = Image.new("P", (4, 4))
        image.putdata([0, 1] * 8)
        image.putpalette([*first, *second])
        return image

    warm, cold = striped((255, 0, 0), (250, 120, 0)), striped((0, 0, 255), (0, 120, 250))
    assert warm.tobytes() == cold.tobytes()
    original = dataclasses.replace(pair(1, 2), before=Image.new("RGB", (4, 4)), after=warm)
    assert pair_digest(dataclasses.replace(original, after=cold)) != pair_digest(original)
    assert pair_digest(dataclasses.replace(original, after=warm.convert("RGB"))) == pair_digest(original)
