"""Encoding pairs once, and drawing batches of them."""

import math
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from artaug.errors import ModelError, NonFiniteError, SeamError
from artaug.pairs import ImagePair
from artaug.plan import Plan
from artaug.training import FlowMatching
from artaug.training.batches import EncodedPairs


def numbered(pairs):
    """Encoded pairs whose latents are their numbers."""
    rows = torch.arange(pairs, dtype=torch.float32)[:, None]
    return EncodedPairs(rows, rows + 100, {"embeds": rows + 200}, FlowMatching())


def drawn(encoded, members, *, size, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(islice(encoded.batches(members, size=size, generator=generator, within=(0.0, 1.0)), count))


@given(members=st.integers(1, 7), size=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_every_pair_comes_once_before_any_comes_again(members, size, seed):
    batches = drawn(numbered(members), range(members), size=size, count=members, seed=seed)
    order = torch.cat([batch.before[:, 0] for batch in batches]).tolist()
    for start in range(0, len(order), members):
        assert sorted(order[start : start + members]) == list(range(members))


def test_rows_of_a_batch_belong_together():
    for batch in drawn(numbered(5), [1, 3], size=4, count=3):
        assert set(batch.before.flatten().tolist()) == {1.0, 3.0}
        assert torch.equal(batch.after, batch.before + 100)
        assert torch.equal(batch.conditioning["embeds"], batch.before + 200)
        assert batch.noise.shape == batch.before.shape
        assert batch.sigmas.shape == (4,)


def test_noise_is_new_every_time():
    first, second = drawn(numbered(1), [0], size=2, count=2)
    assert len({*first.noise.flatten().tolist(), *second.noise.flatten().tolist()}) == 4


def test_pictures_are_encoded_a_few_at_a_time(make_model, pair_of):
    model, sizes = make_model(), []
    plain = model.encode_images
    model.encode_images = lambda images: sizes.append(len(images)) or plain(images)
    encoded = EncodedPairs.encode(model, [pair_of(number) for number in range(5)], at_once=2)
    assert sizes == [2, 2, 1, 2, 2, 1]
    assert encoded.before.shape == (5, 3, 4, 4)


def test_pictures_of_two_sizes_are_refused_naming_both(tiny_model, pair_of):
    large = Image.new("RGB", (8, 4))
    odd = ImagePair(prompt="odd", seed=0, before=large, after=large, plan=Plan("odd"))
    with pytest.raises(ModelError, match=r"pictures of 2 sizes: 4 x 4 \('scene 1'\), 8 x 4 \('odd'\)"):
        EncodedPairs.encode(tiny_model, [pair_of(1), odd], at_once=4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_latents_that_are_no_numbers_are_refused_naming_the_prompt(make_model, two_pairs, value):
    model = make_model()
    plain = model.encode_images
    model.encode_images = lambda images: plain(images).index_fill(0, torch.tensor([1]), value)
    with pytest.raises(NonFiniteError, match="latents of a picture of 'scene 2' hold NaN or infinity"):
        EncodedPairs.encode(model, two_pairs, at_once=4)


def test_a_model_that_loses_rows_breaks_its_seam(make_model, two_pairs):
    model = make_model()
    plain = model.encode_images
    model.encode_images = lambda images: plain(images)[:1]
    with pytest.raises(SeamError, match="encode_images returned 1 rows for 2 pictures"):
        EncodedPairs.encode(model, two_pairs, at_once=4)
    model = make_model()
    model.encode_prompts = lambda _: {"embeds": torch.zeros(3, 8)}
    with pytest.raises(SeamError, match=r"encode_prompts returned \{'embeds': \(3, 8\)\} for 2 prompts"):
        EncodedPairs.encode(model, two_pairs, at_once=4)
