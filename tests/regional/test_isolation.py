"""Isolation as a value: its layers, its noise levels, its boundaries, and what it refuses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug.regional import BALANCED, ELIGEN, INSTANTX, INVOKEAI, OPEN

fractions = st.floats(0, 1)


def applied(isolation, num_blocks):
    return [block for block in range(num_blocks) if isolation.applies_to_block(block, num_blocks=num_blocks)]


@given(num_blocks=st.integers(1, 100))
def test_by_default_it_applies_to_every_block_and_at_every_sigma(num_blocks):
    assert applied(aa.Isolation(), num_blocks) == list(range(num_blocks))
    assert aa.Isolation().applies_at_sigma(0.0)
    assert aa.Isolation().applies_at_sigma(1.0)


@pytest.mark.parametrize(
    ("block_range", "num_blocks", "expected"),
    [
        ((1 / 3, 2 / 3), 6, [2, 3]),
        ((0.0, 0.5), 4, [0, 1]),
        ((0.24, 0.76), 10, [2, 3, 4, 5, 6, 7]),  # 2.4 and 7.6 are rounded, not cut off: 2 to 7
        ((0.26, 0.74), 10, [3, 4, 5, 6]),  # 2.6 and 7.4: 3 to 6
        ((0.25, 0.75), 6, [2, 3]),  # 1.5 and 4.5 are rounded half to even
        ((0.25, 0.75), 10, [2, 3, 4, 5, 6, 7]),  # 2.5 and 7.5 too
        ((0.5, 0.51), 10, [5]),  # less than a block is still one
        ((0.98, 1.0), 10, []),  # but past the last one there is none
    ],
)
def test_a_range_of_blocks_is_rounded_to_whole_blocks(block_range, num_blocks, expected):
    assert applied(aa.Isolation(block_range=block_range), num_blocks) == expected


@given(cut=st.floats(0.01, 0.99), num_blocks=st.integers(1, 60))
def test_two_ranges_that_meet_apply_to_every_block_together(cut, num_blocks):
    below, above = aa.Isolation(block_range=(0.0, cut)), aa.Isolation(block_range=(cut, 1.0))
    assert set(applied(below, num_blocks)) | set(applied(above, num_blocks)) == set(range(num_blocks))


@given(num_blocks=st.integers(1, 60), stride=st.integers(1, 7))
def test_a_stride_begins_with_the_first_block_of_the_range(num_blocks, stride):
    isolation = aa.Isolation(block_range=(0.5, 1.0), block_stride=stride)
    contiguous_blocks = applied(aa.Isolation(block_range=(0.5, 1.0)), num_blocks)
    assert applied(isolation, num_blocks) == contiguous_blocks[::stride]


@pytest.mark.parametrize("single_start", [19, 8])
def test_a_stride_counts_the_single_blocks_of_flux_anew(single_start):
    """FLUX.1 has 19 double and 38 single blocks, FLUX.2 8 and 48: InvokeAI masks every other one of each kind."""
    blocks = [
        block
        for block in range(57)
        if INVOKEAI.applies_to_block(block, num_blocks=57, stack_start=single_start if block >= single_start else 0)
    ]
    assert blocks == [*range(0, single_start, 2), *range(single_start, 57, 2)]


def test_a_stride_in_a_range_begins_in_each_stack_where_the_range_does():
    isolation = aa.Isolation(block_range=(0.3, 1.0), block_stride=2)
    stacks = [0] * 4 + [4] * 6
    applied_blocks = [
        block for block in range(10) if isolation.applies_to_block(block, num_blocks=10, stack_start=stacks[block])
    ]
    assert applied_blocks == [3, 4, 6, 8]


@given(edges=st.tuples(fractions, fractions), sigma=fractions)
def test_both_ends_of_the_sigma_range_belong_to_it(edges, sigma):
    low, high = sorted(edges)
    if low == high:
        return
    isolation = aa.Isolation(sigma_range=(low, high))
    assert isolation.applies_at_sigma(low)
    assert isolation.applies_at_sigma(high)
    assert isolation.applies_at_sigma(sigma) == (low <= sigma <= high)


@pytest.mark.parametrize(
    "options",
    [
        {"block_range": (0.5, 0.5)},
        {"sigma_range": (1.0, 0.0)},
        {"block_range": (-0.1, 0.5)},
        {"sigma_range": (0.0, 1.1)},
        {"block_stride": 0},
        {"base_weight": 2},
        {"base_weight": -0.1},
        {"image_to_image": "own"},
    ],
)
def test_an_isolation_that_applies_nowhere_or_means_nothing_is_refused(options):
    with pytest.raises(aa.InvalidValueError, match=next(iter(options))):
        aa.Isolation(**options)


def test_presets_apply_where_their_systems_do():
    assert applied(INVOKEAI, 4) == [0, 2]
    assert INSTANTX.applies_at_sigma(0.6)
    assert not INSTANTX.applies_at_sigma(0.59)
    for preset in (BALANCED, OPEN, ELIGEN):
        assert applied(preset, 5) == list(range(5))
    assert [preset.base_weight for preset in (BALANCED, OPEN, ELIGEN, INSTANTX, INVOKEAI)] == [0.3, 1.0, 1.0, 0.2, 0.0]
