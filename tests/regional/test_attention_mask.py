"""Who sees whom, told token by token."""

import pytest
import torch
from hypothesis import given, settings

import artaug as aa
from artaug.regional import ELIGEN, INVOKEAI, OPEN
from artaug.regional.attention_mask import Sight, cross_sight, joint_sight
from artaug.regional.denoiser import Span
from artaug.regional.region_weights import Shares, divided
from support.layouts import layouts

LEFT, RIGHT = aa.Region(aa.Box(0, 0, 0.5, 1), "left"), aa.Region(aa.Box(0.5, 0, 1, 1), "right")
PROMPTS = (Span("text", 1, 0), Span("text", 1, 1), Span("text", 1, 2))
IMAGE = Span("image", 4)


def seen(spans, shares, isolation):
    """Weights of every key for every query."""
    sight = joint_sight(spans, shares, isolation)
    return sight.weights[:, sight.groups]


def halves(isolation):
    """Two halves of a row of four tokens, prompts first: the plan's, the left's, the right's."""
    return seen((*PROMPTS, IMAGE), divided([LEFT, RIGHT], (1, 4), base_weight=isolation.base_weight), isolation)


def test_isolated_halves_see_themselves_and_their_own_prompt():
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


def test_open_keeps_only_prompts_from_foreign_tokens():
    told = halves(OPEN)
    assert (told[:3] == 1).all()
    assert told[3].tolist() == [1, 1, 0, 1, 1, 1, 1]


def test_the_background_is_in_touch_with_all_where_it_may_be():
    shares = divided([LEFT], (1, 4), base_weight=0)
    for how, sees in (("background", [1, 1, 1, 1]), ("regions", [0, 0, 1, 1])):
        told = seen((*PROMPTS[:2], IMAGE), shares, aa.Isolation(image_to_image=how))
        assert told[4, 2:].tolist() == sees
        assert told[2, 2:].tolist() == [1, 1, *sees[:2]]


def test_without_isolation_all_see_all_but_fillers():
    spans = (*PROMPTS, Span("padding", 2), IMAGE, Span("reference", 1))
    told = seen(spans, divided([LEFT, RIGHT], (1, 4), base_weight=0), None)
    filler = torch.tensor([0, 0, 0, 1, 1, 0, 0, 0, 0, 0], dtype=torch.bool)
    assert (told[~filler][:, ~filler] == 1).all()
    assert (told[~filler][:, filler] == 0).all()
    assert (told[filler] == filler.float()).all()


def test_a_reference_is_seen_by_all_and_sees_all_but_the_regions_prompts():
    spans = (*PROMPTS, IMAGE, Span("reference", 1))
    told = seen(spans, divided([LEFT, RIGHT], (1, 4), base_weight=0), aa.Isolation(image_to_image="regions"))
    assert (told[:, -1] == 1).all()
    assert told[-1].tolist() == [1, 0, 0, 1, 1, 1, 1, 1]


@settings(max_examples=60)
@given(layout=layouts())
def test_every_image_token_sees_the_prompts_as_they_weigh_there(layout):
    if layout.isolation.image_to_text == "open":
        return
    told = seen(layout.spans, layout.shares, layout.isolation)
    start = 0
    places = {}
    for span in layout.spans:
        places[span.prompt if span.kind == "text" else span.kind] = slice(start, start + span.length)
        start += span.length
    for prompt, weights in enumerate(layout.shares.weights):
        block = told[places["image"], places[prompt]]
        assert torch.equal(block, weights[:, None].expand_as(block))


@given(layout=layouts(most=4))
def test_cross_attention_sees_what_image_tokens_see_of_prompts(layout):
    alone = cross_sight(layout.spans, layout.shares, layout.isolation)
    texts = [span for span in layout.spans if span.kind == "text"]
    joint = joint_sight((Span("image", layout.grid[0] * layout.grid[1]), *texts), layout.shares, layout.isolation)
    count = layout.grid[0] * layout.grid[1]
    alone_seen = alone.weights[:, alone.groups[alone.groups < len(texts)]]
    assert torch.equal(alone_seen, joint.weights[:count][:, joint.groups[count:]])


def test_a_query_that_sees_nothing_is_refused():
    with pytest.raises(aa.GuideError, match="1 of 2 query tokens would see no key"):
        Sight(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]), (slice(0, 2),))
    with pytest.raises(aa.GuideError, match="would see no key"):  # what it sees has no token
        Sight(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), (slice(0, 1),))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_weights_that_are_no_weights_are_refused(bad):
    with pytest.raises(aa.GuideError, match="finite weights >= 0"):
        Sight(torch.tensor([[1.0, bad]]), torch.tensor([0, 1]), (slice(0, 1),))


def test_presets_hold_where_they_say():
    assert [INVOKEAI.applies_to_block(block, of=4) for block in range(4)] == [True, False, True, False]
    middle = aa.Isolation(blocks=(1 / 3, 2 / 3))
    assert [middle.applies_to_block(block, of=6) for block in range(6)] == [False, False, True, True, False, False]
    early = aa.Isolation(sigma_range=(0.6, 1.0))
    assert early.applies_at_sigma(1.0)
    assert not early.applies_at_sigma(0.5)


@pytest.mark.parametrize("options", [{"blocks": (0.5, 0.5)}, {"levels": (1.0, 0.0)}, {"every": 0}, {"base_weight": 2}])
def test_an_isolation_that_holds_nowhere_is_refused(options):
    with pytest.raises(aa.InvalidValueError):
        aa.Isolation(**options)


def test_reached_is_half_of_the_most():
    shares = Shares(torch.tensor([[1.0, 0.0, 0.6], [0.2, 0.1, 0.05]]))
    assert shares.reached.tolist() == [[True, False, True], [True, True, False]]
