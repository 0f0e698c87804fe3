"""Batches of encoded pairs: every pair its batch, always new noise, and any batch the same however one comes to it."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug.errors import ModelError
from artaug.training import EpsilonPrediction, FlowMatching
from artaug.training.batches import EncodedPairs, SizeBucket
from artaug.training.config import TrainingConfig
from artaug.training.distributed import SINGLE_PROCESS, World
from artaug.training.encoding import EncodedPair, compress_mask


class Sized:
    """The part of a model that `EncodedPairs.batches` uses."""

    device = torch.device("cpu")
    noise_schedule = FlowMatching()

    def at_size(self, width, height):
        sized = Sized()
        sized.size = (width, height)
        return sized


def encoded_pair(number, *, side=1, tokens=2):
    latent = torch.full((side,), float(number))
    text = {"embeds": torch.full((tokens, 3), float(number))}
    return EncodedPair({"before": latent, "after": latent + 100}, text, aa.Plan(f"scene {number}"))


def pairs_numbered(pairs):
    """Encoded pairs whose latents are their indices."""
    return EncodedPairs([SizeBucket((8, 8), {number: encoded_pair(number) for number in range(pairs)})])


def batches_of(encoded, members, *, size, count, seed=0, start=0, world=SINGLE_PROCESS, **options):
    config = TrainingConfig(batch_size=size, **options)
    numbers = range(start, start + count)
    return list(encoded.batches(Sized(), members, config, seed=seed, indices=numbers, world=world))


def order_of(batches):
    return [
        int(index)
        for step_batch in batches
        for micro_batch in step_batch.micro_batches
        for index in micro_batch.before[:, 0]
    ]


@given(members=st.integers(1, 7), size=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_every_pair_comes_once_before_any_comes_again(members, size, seed):
    order = order_of(batches_of(pairs_numbered(members), range(members), size=size, count=members, seed=seed))
    for start in range(0, len(order), members):
        assert sorted(order[start : start + members]) == list(range(members))


def test_rows_of_a_batch_belong_together():
    for step_batch in batches_of(pairs_numbered(5), [1, 3], size=4, count=3):
        (batch,) = step_batch.micro_batches
        assert set(batch.before.flatten().tolist()) == {1.0, 3.0}
        assert torch.equal(batch.after, batch.before + 100)
        assert torch.equal(batch.conditioning["embeds"][:, 0, :1], batch.before)
        assert batch.noise.shape == batch.before.shape
        assert batch.sigmas.shape == (4,)
        assert batch.region_mask is None


def test_noise_is_new_every_time():
    batches = batches_of(pairs_numbered(1), [0], size=2, count=2)
    assert len({number for batch in batches for number in batch.micro_batches[0].noise.flatten().tolist()}) == 4


@given(start=st.integers(0, 12), size=st.integers(1, 5), pairs=st.integers(1, 7))
def test_a_batch_is_the_same_whatever_came_before_it(start, size, pairs):
    uninterrupted = batches_of(pairs_numbered(pairs), range(pairs), size=size, count=start + 2)
    resumed = batches_of(pairs_numbered(pairs), range(pairs), size=size, count=2, start=start)
    for expected, batch in zip(uninterrupted[start:], resumed, strict=True):
        assert_same(expected.micro_batches[0], batch.micro_batches[0])


@given(per_process=st.integers(1, 3), count=st.integers(1, 3), micro_batch_size=st.none() | st.integers(1, 4))
def test_processes_split_the_batch_of_a_single_process(per_process, count, micro_batch_size):
    size = per_process * count
    (expected_batch,) = batches_of(pairs_numbered(5), range(5), size=size, count=1)
    micro_batches_by_rank = [
        batches_of(
            pairs_numbered(5), range(5), size=size, count=1, micro_batch_size=micro_batch_size, world=World(rank, count)
        )[0].micro_batches
        for rank in range(count)
    ]
    for rank, batches in enumerate(micro_batches_by_rank):
        assert all(len(batch.sigmas) <= (micro_batch_size or size) for batch in batches)
        for name in ("before", "noise", "sigmas"):
            part = torch.cat([getattr(batch, name) for batch in batches])
            assert torch.equal(part, getattr(expected_batch.micro_batches[0], name)[rank::count])


def assert_same(batch, other):
    for name in ("before", "after", "noise", "sigmas"):
        assert torch.equal(getattr(batch, name), getattr(other, name))
    assert torch.equal(batch.conditioning["embeds"], other.conditioning["embeds"])


@given(first=st.integers(1, 5), second=st.integers(1, 5), size=st.integers(1, 4))
def test_sizes_come_in_proportion_to_their_pairs(first, second, size):
    encoded = EncodedPairs(
        [
            SizeBucket((8, 8), {number: encoded_pair(number) for number in range(first)}),
            SizeBucket((16, 8), {number: encoded_pair(number, side=2) for number in range(first, first + second)}),
        ]
    )
    members = range(first + second)
    batches = batches_of(encoded, members, size=size, count=first + second)
    assert [batch.model.size for batch in batches].count((8, 8)) == first
    for batch in batches:
        (micro_batch,) = batch.micro_batches
        assert micro_batch.before.shape == (size, 1 if batch.model.size == (8, 8) else 2)
    resumed = batches_of(encoded, members, size=size, count=1, start=first)
    assert_same(batches[first].micro_batches[0], resumed[0].micro_batches[0])


def test_few_pairs_are_in_memory_however_many_there_are(monkeypatch):
    counts, load = SimpleNamespace(alive=0, most_alive=0), EncodedPair.load

    def counted(pair):
        row = load(pair)
        row["before"] = row["before"].clone()  # as if it were read from a file
        counts.alive += 1
        counts.most_alive = max(counts.most_alive, counts.alive)
        weakref.finalize(row["before"], lambda: setattr(counts, "alive", counts.alive - 1))
        return row

    monkeypatch.setattr(EncodedPair, "load", counted)
    config = TrainingConfig(batch_size=2)
    steps = 0
    for _ in pairs_numbered(100).batches(Sized(), range(100), config, seed=0, indices=range(50)):
        steps += 1
    assert steps == 50
    assert counts.most_alive <= 3 * config.batch_size  # of the step, of the next one, and the one that is read


def test_each_process_loads_its_own_rows(monkeypatch):
    loaded, load = [], EncodedPair.load
    monkeypatch.setattr(EncodedPair, "load", lambda pair: loaded.append(pair) or load(pair))
    batches_of(pairs_numbered(8), range(8), size=4, count=2, world=World(1, 2))
    assert len(loaded) == 4


def test_prompts_of_different_lengths_are_padded_at_the_end():
    encoded = EncodedPairs([SizeBucket((8, 8), {0: encoded_pair(0, tokens=1), 1: encoded_pair(1, tokens=4)})])
    (step_batch,) = batches_of(encoded, [0, 1], size=2, count=1)
    (batch,) = step_batch.micro_batches
    short = batch.conditioning["embeds"][int(batch.before[1, 0] == 0)]
    assert short.shape == (4, 3)
    assert not short[1:].any()


@pytest.mark.parametrize("regional", [(0,), (0, 1)])
def test_a_plan_without_regions_has_a_mask_of_ones(regional):
    rows = {number: encoded_pair(number, side=3) for number in range(2)}
    for number in regional:
        mask = compress_mask(torch.tensor([1.0, 0.5, 0.0]))
        rows[number] = replace(rows[number], latents={**rows[number].latents, **mask})
    (step_batch,) = batches_of(EncodedPairs([SizeBucket((8, 8), rows)]), [0, 1], size=2, count=1)
    (batch,) = step_batch.micro_batches
    for row, number in enumerate(batch.before[:, 0].int().tolist()):
        assert batch.region_mask[row].tolist() == ([1.0, 0.5, 0.0] if number in regional else [1.0, 1.0, 1.0])


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_rewards_are_in_every_batch_if_any_pair_has_them(make_model, pair_of, micro_batch_size):
    plain = [pair_of(1), pair_of(2)]
    rewarded = [plain[0], replace(plain[1], rewards=(0.75, 0.5))]
    model, config = make_model(), TrainingConfig(batch_size=2, micro_batch_size=micro_batch_size)
    for pairs, expected in ((plain, None), (rewarded, {(0.0, 1.0), (0.75, 0.5)})):
        encoded = EncodedPairs.encode(model, pairs, micro_batch_size=1)
        (batch,) = encoded.batches(model, range(2), config, seed=0, indices=[0])
        if expected is None:
            assert all(micro_batch.rewards is None for micro_batch in batch.micro_batches)
        else:
            rows = torch.cat([micro_batch.rewards for micro_batch in batch.micro_batches])
            assert {tuple(row) for row in rows.tolist()} == expected
    (alone,) = encoded.batches(model, [0], config, seed=0, indices=[0])  # of a group without any
    assert all(micro_batch.rewards.tolist()[0] == [0.0, 1.0] for micro_batch in alone.micro_batches)


def test_flow_models_may_have_logit_normal_levels():
    uniform, logit_normal = (
        batches_of(pairs_numbered(1), [0], size=4000, count=1, logit_normal=option)[0].micro_batches[0].sigmas
        for option in (False, True)
    )
    assert uniform.std() == pytest.approx(12**-0.5, abs=0.01)  # uniform
    assert torch.logit(logit_normal.double()).std() == pytest.approx(1, abs=0.05)  # logit-normal


def test_levels_of_timesteps_cannot_be_logit_normal():
    class Epsilon(Sized):
        noise_schedule = EpsilonPrediction()

        def at_size(self, *_):
            return self

    with pytest.raises(ModelError, match="logit_normal is for flow models, and this one has EpsilonPrediction"):
        next(pairs_numbered(1).batches(Epsilon(), [0], TrainingConfig(logit_normal=True), seed=0, indices=[0]))
