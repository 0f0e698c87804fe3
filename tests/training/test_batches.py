"""Batches of encoded pairs: every pair its batch, always new noise, and any batch the same however one comes to it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from artaug.errors import ModelError
from artaug.training import EpsilonPrediction, FlowMatching
from artaug.training.batches import EncodedPairs, SizeBucket
from artaug.training.config import TrainingConfig
from artaug.training.distributed import SINGLE_PROCESS, World


class Sized:
    """What `EncodedPairs.batches` asks of a model."""

    device = torch.device("cpu")
    noise_schedule = FlowMatching()

    def at_size(self, width, height):
        sized = Sized()
        sized.size = (width, height)
        return sized


def row(number, *, side=1, words=2):
    latent = torch.full((side,), float(number))
    return {"before": latent, "after": latent + 100, "text.embeds": torch.full((words, 3), float(number))}


def numbered(pairs):
    """Encoded pairs whose latents are their numbers."""
    return EncodedPairs([SizeBucket((8, 8), {number: row(number) for number in range(pairs)})])


def drawn(encoded, members, *, size, count, seed=0, start=0, world=SINGLE_PROCESS, **options):
    config = TrainingConfig(batch_size=size, **options)
    numbers = range(start, start + count)
    return list(encoded.batches(Sized(), members, config, seed=seed, indices=numbers, world=world))


def numbers(batches):
    return [
        int(number) for batch in batches for micro_batch in batch.micro_batches for number in micro_batch.before[:, 0]
    ]


@given(members=st.integers(1, 7), size=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_every_pair_comes_once_before_any_comes_again(members, size, seed):
    order = numbers(drawn(numbered(members), range(members), size=size, count=members, seed=seed))
    for start in range(0, len(order), members):
        assert sorted(order[start : start + members]) == list(range(members))


def test_rows_of_a_batch_belong_together():
    for step_batch in drawn(numbered(5), [1, 3], size=4, count=3):
        (batch,) = step_batch.micro_batches
        assert set(batch.before.flatten().tolist()) == {1.0, 3.0}
        assert torch.equal(batch.after, batch.before + 100)
        assert torch.equal(batch.conditioning["embeds"][:, 0, :1], batch.before)
        assert batch.noise.shape == batch.before.shape
        assert batch.sigmas.shape == (4,)
        assert batch.region_mask is None


def test_noise_is_new_every_time():
    batches = drawn(numbered(1), [0], size=2, count=2)
    assert len({number for batch in batches for number in batch.micro_batches[0].noise.flatten().tolist()}) == 4


@given(start=st.integers(0, 12), size=st.integers(1, 5), pairs=st.integers(1, 7))
def test_a_batch_is_the_same_whatever_came_before_it(start, size, pairs):
    whole = drawn(numbered(pairs), range(pairs), size=size, count=start + 2)
    resumed = drawn(numbered(pairs), range(pairs), size=size, count=2, start=start)
    for expected, batch in zip(whole[start:], resumed, strict=True):
        assert_same(expected.micro_batches[0], batch.micro_batches[0])


@given(each=st.integers(1, 3), count=st.integers(1, 3), micro_batch_size=st.none() | st.integers(1, 4))
def test_processes_share_the_batch_that_one_would_have(each, count, micro_batch_size):
    size = each * count
    (whole,) = drawn(numbered(5), range(5), size=size, count=1)
    parts = [
        drawn(numbered(5), range(5), size=size, count=1, micro_batch_size=micro_batch_size, world=World(rank, count))[
            0
        ].micro_batches
        for rank in range(count)
    ]
    for rank, batches in enumerate(parts):
        assert all(len(batch.sigmas) <= (micro_batch_size or size) for batch in batches)
        for name in ("before", "noise", "sigmas"):
            mine = torch.cat([getattr(batch, name) for batch in batches])
            assert torch.equal(mine, getattr(whole.micro_batches[0], name)[rank::count])


def assert_same(one, other):
    for name in ("before", "after", "noise", "sigmas"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert torch.equal(one.conditioning["embeds"], other.conditioning["embeds"])


@given(first=st.integers(1, 5), second=st.integers(1, 5), size=st.integers(1, 4))
def test_sizes_take_turns_as_often_as_they_have_pairs(first, second, size):
    encoded = EncodedPairs(
        [
            SizeBucket((8, 8), {number: row(number) for number in range(first)}),
            SizeBucket((16, 8), {number: row(number, side=2) for number in range(first, first + second)}),
        ]
    )
    members = range(first + second)
    batches = drawn(encoded, members, size=size, count=first + second)
    assert [batch.model.size for batch in batches].count((8, 8)) == first
    for batch in batches:
        (micro_batch,) = batch.micro_batches
        assert micro_batch.before.shape == (size, 1 if batch.model.size == (8, 8) else 2)
    resumed = drawn(encoded, members, size=size, count=1, start=first)
    assert_same(batches[first].micro_batches[0], resumed[0].micro_batches[0])


def test_prompts_of_unlike_length_are_filled_up_behind():
    encoded = EncodedPairs([SizeBucket((8, 8), {0: row(0, words=1), 1: row(1, words=4)})])
    (step_batch,) = drawn(encoded, [0, 1], size=2, count=1)
    (batch,) = step_batch.micro_batches
    short = batch.conditioning["embeds"][int(batch.before[1, 0] == 0)]
    assert short.shape == (4, 3)
    assert not short[1:].any()


@pytest.mark.parametrize("regional", [(0,), (0, 1)])
def test_a_plan_without_regions_is_inside_everywhere(regional):
    rows = {number: row(number, side=3) for number in range(2)}
    for number in regional:
        rows[number] = {**rows[number], "region_mask": torch.tensor([1.0, 0.5, 0.0])}
    (step_batch,) = drawn(EncodedPairs([SizeBucket((8, 8), rows)]), [0, 1], size=2, count=1)
    (batch,) = step_batch.micro_batches
    for at, number in enumerate(batch.before[:, 0].int().tolist()):
        assert batch.region_mask[at].tolist() == ([1.0, 0.5, 0.0] if number in regional else [1.0, 1.0, 1.0])


def test_levels_of_flow_models_may_be_spread_as_they_were_in_training():
    one, other = (
        drawn(numbered(1), [0], size=4000, count=1, logit_normal=wanted)[0].micro_batches[0].sigmas
        for wanted in (False, True)
    )
    assert one.std() == pytest.approx(12**-0.5, abs=0.01)  # uniform
    assert torch.logit(other.double()).std() == pytest.approx(1, abs=0.05)  # logit-normal


def test_levels_of_a_schedule_cannot_be_spread():
    class Stepped(Sized):
        noise_schedule = EpsilonPrediction()

        def at_size(self, *_):
            return self

    with pytest.raises(ModelError, match="logit_normal is for flow models, and this one has EpsilonPrediction"):
        next(numbered(1).batches(Stepped(), [0], TrainingConfig(logit_normal=True), seed=0, indices=[0]))
