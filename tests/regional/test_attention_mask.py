"""Group masks, token by token: what attends to what, and how strongly."""

import pytest
import torch
from hypothesis import given, settings

import artaug as aa
from artaug.regional import ELIGEN, OPEN
from artaug.regional.attention_mask import GroupMask, cross_mask, joint_mask
from artaug.regional.denoiser import Span
from artaug.regional.region_weights import split_grid
from support.layouts import layouts

LEFT, RIGHT = aa.Region(aa.Box(0, 0, 0.5, 1), "left"), aa.Region(aa.Box(0.5, 0, 1, 1), "right")
PROMPTS = (Span("text", 1, 0), Span("text", 1, 1), Span("text", 1, 2))
IMAGE = Span("image", 4)


def key_weights(spans, region_weights, isolation):
    """Weights of every key for every query."""
    mask = joint_mask(spans, region_weights, isolation)
    return mask.weights[:, mask.groups]


def halves(isolation):
    """Two halves of a row of four tokens, prompts first: the plan's, the left's, the right's."""
    return key_weights(
        (*PROMPTS, IMAGE), split_grid([LEFT, RIGHT], (1, 4), base_weight=isolation.base_weight), isolation
    )


def test_isolated_halves_attend_to_themselves_and_their_own_prompt():
    isolation = aa.Isolation(image_to_image="regions")
    assert halves(isolation).tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 1, 1, 0, 0],
        [0, 0, 1, 0, 0, 1, 1],
        [0, 1, 0, 1, 1, 0, 0],
        [0, 1, 0, 1, 1, 0, 0],
        [0, 0, 1, 0, 0, 1, 1],
        [0, 0, 1, 0, 0, 1, 1],
    ]


def test_eligen_keeps_prompts_apart_and_the_image_together():
    assert halves(ELIGEN).tolist() == [
        [1, 0, 0, 1, 1, 1, 1],
        [0, 1, 0, 1, 1, 0, 0],
        [0, 0, 1, 0, 0, 1, 1],
        [1, 1, 0, 1, 1, 1, 1],
        [1, 1, 0, 1, 1, 1, 1],
        [1, 0, 1, 1, 1, 1, 1],
        [1, 0, 1, 1, 1, 1, 1],
    ]


def test_open_hides_only_prompts_of_other_regions():
    weights = halves(OPEN)
    assert (weights[:3] == 1).all()
    assert weights[3].tolist() == [1, 1, 0, 1, 1, 1, 1]


def test_the_background_attends_to_all_only_if_it_is_connected():
    region_weights = split_grid([LEFT], (1, 4), base_weight=0)
    for image_to_image, from_background in (("background", [1, 1, 1, 1]), ("regions", [0, 0, 1, 1])):
        weights = key_weights((*PROMPTS[:2], IMAGE), region_weights, aa.Isolation(image_to_image=image_to_image))
        assert weights[4, 2:].tolist() == from_background
        assert weights[2, 2:].tolist() == [1, 1, *from_background[:2]]


def test_without_isolation_all_attend_to_all_but_padding():
    spans = (*PROMPTS, Span("padding", 2), IMAGE, Span("reference", 1))
    weights = key_weights(spans, split_grid([LEFT, RIGHT], (1, 4), base_weight=0), None)
    padding = torch.tensor([0, 0, 0, 1, 1, 0, 0, 0, 0, 0], dtype=torch.bool)
    assert (weights[~padding][:, ~padding] == 1).all()
    assert (weights[~padding][:, padding] == 0).all()
    assert (weights[padding] == padding.float()).all()


def test_all_attend_to_a_reference_and_it_to_all_but_the_regions_prompts():
    spans = (*PROMPTS, IMAGE, Span("reference", 1))
    weights = key_weights(
        spans, split_grid([LEFT, RIGHT], (1, 4), base_weight=0), aa.Isolation(image_to_image="regions")
    )
    assert (weights[:, -1] == 1).all()
    assert weights[-1].tolist() == [1, 0, 0, 1, 1, 1, 1, 1]


@settings(max_examples=60)
@given(layout=layouts())
def test_every_image_token_attends_to_the_prompts_with_their_weights_there(layout):
    if layout.isolation.image_to_text == "open":
        return
    weights = key_weights(layout.spans, layout.region_weights, layout.isolation)
    start = 0
    slices = {}
    for span in layout.spans:
        slices[span.prompt if span.kind == "text" else span.kind] = slice(start, start + span.length)
        start += span.length
    for prompt, prompt_weights in enumerate(layout.region_weights.weights):
        block = weights[slices["image"], slices[prompt]]
        assert torch.equal(block, prompt_weights[:, None].expand_as(block))


@given(layout=layouts(max_regions=4))
def test_cross_attention_weighs_prompts_as_joint_attention_does_for_image_tokens(layout):
    cross = cross_mask(layout.spans, layout.region_weights, layout.isolation)
    texts = [span for span in layout.spans if span.kind == "text"]
    count = layout.grid[0] * layout.grid[1]
    joint = joint_mask((Span("image", count), *texts), layout.region_weights, layout.isolation)
    cross_weights = cross.weights[:, cross.groups[cross.groups < len(texts)]]
    assert torch.equal(cross_weights, joint.weights[:count][:, joint.groups[count:]])


def test_a_query_that_attends_to_nothing_is_refused():
    with pytest.raises(aa.GuideError, match="1 of 2 query tokens would attend to no key"):
        GroupMask(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]), (slice(0, 2),))
    with pytest.raises(aa.GuideError, match="would attend to no key"):  # the one group it attends to has no key
        GroupMask(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), (slice(0, 1),))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_weights_that_are_not_finite_or_negative_are_refused(bad):
    with pytest.raises(aa.GuideError, match="finite weights >= 0"):
        GroupMask(torch.tensor([[1.0, bad]]), torch.tensor([0, 1]), (slice(0, 1),))
