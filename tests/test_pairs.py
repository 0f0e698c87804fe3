"""Pairs and verdicts."""

import pytest
from PIL import Image

import artaug as aa
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
def test_a_verdict_rests_on_numbers(number):
    with pytest.raises(aa.InvalidValueError, match=r"Verdict: scores\.gain: Input should be a finite number"):
        aa.Verdict(keep=True, reason="it rose", scores={"gain": number})


def test_every_ending_is_an_attempt():
    verdict = aa.Verdict(keep=True, reason="it rose", scores={})
    for ending in (aa.Kept(pair(1, 2), verdict), aa.Dropped(pair(1, 2), verdict), aa.Skipped("a pear", 0, "why")):
        assert isinstance(ending, aa.Attempt)
