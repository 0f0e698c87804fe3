"""Encoding pairs once, in memory or in files named by their content."""

import math

import pytest
import torch
from PIL import Image

from artaug.errors import ContractError, ModelError, NonFiniteError, StorageError
from artaug.geometry import Box
from artaug.pairs import ImagePair
from artaug.plan import Plan, Region
from artaug.training.distributed import SINGLE_PROCESS, World
from artaug.training.encoding import encode_pairs


def encoded(model, pairs, *, micro_batch_size=4, cache=None, world=SINGLE_PROCESS):
    return encode_pairs(model, pairs, micro_batch_size=micro_batch_size, cache=cache, world=world)


def assert_equal(pairs, others):
    for pair, other in zip(pairs, others, strict=True):
        assert set(pair) == set(other)
        assert all(torch.equal(pair[name], other[name]) for name in pair)


def test_pictures_are_encoded_a_few_at_a_time(make_model, pair_of):
    model, sizes = make_model(), []
    plain = model.encode_images
    model.encode_images = lambda images: sizes.append(len(images)) or plain(images)
    rows = encoded(model, [pair_of(number) for number in range(5)], micro_batch_size=2)
    assert sizes == [2, 2, 2, 2, 1, 1]
    assert [row["before"].shape for row in rows] == [(3, 4, 4)] * 5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_latents_that_are_not_finite_are_refused_naming_the_prompt(make_model, two_pairs, value):
    model = make_model()
    plain = model.encode_images
    model.encode_images = lambda images: plain(images).index_fill(0, torch.tensor([1]), value)
    with pytest.raises(NonFiniteError, match="latents of the picture before of 'scene 2' hold NaN or infinity"):
        encoded(model, two_pairs)


def test_a_model_that_returns_another_number_of_rows_is_named(make_model, two_pairs):
    model = make_model()
    plain = model.encode_images
    model.encode_images = lambda images: plain(images)[:1]
    with pytest.raises(
        ContractError, match=r"TinyModel\.encode_images returned tensors of shape \{.*\} for 2 pictures"
    ):
        encoded(model, two_pairs)
    model = make_model()
    model.encode_prompts = lambda _: {"embeds": torch.zeros(3, 8)}
    with pytest.raises(
        ContractError, match=r"encode_prompts returned tensors of shape \{'embeds': \(3, 8\)\} for 2 prompts"
    ):
        encoded(model, two_pairs)


def test_region_masks_are_encoded_too(tiny_model, pair_of):
    plain = pair_of(1)
    half = Region(Box(0, 0, 0.5, 1), "a red cone")
    regional = ImagePair(
        prompt="half", seed=0, before=plain.before, after=plain.after, plan=Plan("half", regions=(half,))
    )
    first, second = encoded(tiny_model, [plain, regional])
    assert torch.equal(first["region_mask"], torch.ones(3, 4, 4))
    assert torch.equal(second["region_mask"][0], torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 4))
    assert all("region_mask" not in row for row in encoded(tiny_model, [plain]))


def test_a_cache_gives_what_was_encoded_without_encoding_it_again(tmp_path, make_model, two_pairs):
    model, plain = make_model(), encoded(make_model(), two_pairs)
    assert_equal(encoded(model, two_pairs, cache=tmp_path), plain)
    before = model.calls.images
    assert_equal(encoded(model, two_pairs, cache=tmp_path), plain)
    assert model.calls.images == before + 1  # the probe that identifies the encoder
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cache_of_another_encoder_is_not_used(tmp_path, make_model, two_pairs):
    encoded(make_model(), two_pairs, cache=tmp_path)
    rows = encoded(make_model(dtype=torch.bfloat16), two_pairs, cache=tmp_path)
    assert {row["before"].dtype for row in rows} == {torch.bfloat16}
    assert len(list(tmp_path.iterdir())) == 4


def test_processes_split_the_work_of_a_cache(tmp_path, make_model, pair_of):
    class WithoutBarrier(World):
        def barrier(self):
            pass

    pairs = [pair_of(number) for number in range(5)]
    counts = []
    for rank in range(2):
        model = make_model()
        encoded(model, pairs, cache=tmp_path, world=WithoutBarrier(rank, 2))
        counts.append(model.calls.prompts - 1)  # without the probe
    assert counts == [3, 2]
    assert len(list(tmp_path.iterdir())) == 5
    assert_equal(encoded(make_model(), pairs, cache=tmp_path), encoded(make_model(), pairs, micro_batch_size=1))


def test_a_broken_file_of_a_cache_is_named(tmp_path, make_model, two_pairs):
    rows = encoded(make_model(), two_pairs, cache=tmp_path)
    path = next(tmp_path.iterdir())
    path.write_bytes(b"no tensors")
    with pytest.raises(StorageError, match=rf"{path.name} is no pair of the latent cache, or a damaged one.*Delete it"):
        [dict(row) for row in rows]


def test_bits_of_a_cache_that_flip_are_noticed(tmp_path, make_model, two_pairs):
    rows = encoded(make_model(), two_pairs, cache=tmp_path)
    path = rows[0].path
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 37):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(
            StorageError, match=rf"{path.name} is no pair of the latent cache, or a damaged one.*Delete it"
        ):
            dict(rows[0])


def test_a_cache_that_cannot_be_written_says_so(tmp_path, make_model, two_pairs):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"encoded pair .* could not be written.*latent cache"):
        encoded(make_model(), two_pairs, cache=tmp_path / "file" / "folder")


def test_a_size_the_model_does_not_take_is_refused(tiny_model):
    large = Image.new("RGB", (8, 4))
    odd = ImagePair(prompt="odd", seed=0, before=large, after=large, plan=Plan("odd"))
    with pytest.raises(ModelError, match="a picture of 8 x 4"):
        tiny_model.at_size(*odd.before.size)
