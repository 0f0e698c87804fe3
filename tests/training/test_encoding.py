"""Encoding pairs once, in memory or in files named by their content."""

import math
import weakref
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from artaug._internal.digests import digest
from artaug.errors import ContractError, ModelError, NonFiniteError, StorageError
from artaug.geometry import Box
from artaug.pairs import ImagePair
from artaug.plan import Plan, Region
from artaug.training.distributed import SINGLE_PROCESS, World
from artaug.training.encoding import encode_pairs

SIZE = (4, 4)


def encoded(model, pairs, *, micro_batch_size=4, cache=None, world=SINGLE_PROCESS):
    return encode_pairs(model, pairs, size=SIZE, micro_batch_size=micro_batch_size, cache=cache, world=world)


def assert_equal(pairs, others):
    for pair, other in zip(pairs, others, strict=True):
        row, expected = pair.load(), other.load()
        assert set(row) == set(expected)
        assert all(torch.equal(row[name], expected[name]) for name in row)


def files_of(cache):
    return {folder.name: len(list(folder.iterdir())) for folder in cache.iterdir()}


def test_pictures_are_encoded_a_few_at_a_time(make_model, pair_of):
    model, sizes = make_model(), []
    plain = model.encode_images
    model.encode_images = lambda images: sizes.append(len(images)) or plain(images)
    rows = encoded(model, [pair_of(number) for number in range(5)], micro_batch_size=2)
    assert sizes == [2, 2, 2, 2, 1, 1]
    assert [row.load()["before"].shape for row in rows] == [(3, 4, 4)] * 5


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
        ContractError, match=r"encode_prompts returned tensors of shape \{'embeds': \(3, 8\)\} for 1 prompt\."
    ):
        encoded(model, two_pairs)


def test_region_masks_are_encoded_too(tiny_model, pair_of):
    plain = pair_of(1)
    half = Region(Box(0, 0, 0.5, 1), "a red cone")
    regional = ImagePair(
        prompt="half", seed=0, before=plain.before, after=plain.after, plan=Plan("half", regions=(half,))
    )
    first, second = (pair.load() for pair in encoded(tiny_model, [plain, regional]))
    assert "region_mask" not in first
    assert torch.equal(second["region_mask"], torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 4).expand(3, 4, 4))


class PairOnDisk:
    """A pair whose pictures are made anew when they are looked at, as those on disk; it counts how many are alive."""

    def __init__(self, pair, counts):
        self.prompt, self.plan, self._pair, self._counts = pair.prompt, pair.plan, pair, counts

    def __getattr__(self, side):
        image, counts = getattr(self._pair, side).copy(), self._counts
        counts.alive, counts.looked_at = counts.alive + 1, counts.looked_at + 1
        counts.most_alive = max(counts.most_alive, counts.alive)
        weakref.finalize(image, lambda: setattr(counts, "alive", counts.alive - 1))
        return image


@pytest.mark.parametrize("is_cached", [False, True])
def test_each_picture_is_looked_at_once_and_few_are_in_memory(tmp_path, monkeypatch, make_model, pair_of, is_cached):
    counts = SimpleNamespace(alive=0, most_alive=0, looked_at=0)
    monkeypatch.setattr("artaug.training.encoding.pair_digest", lambda pair, **_: digest(str(id(pair))))
    pairs = [PairOnDisk(pair_of(number), counts) for number in range(12)]
    encoded(make_model(), pairs, micro_batch_size=2, cache=tmp_path if is_cached else None)
    assert (counts.looked_at, counts.alive) == (24, 0)
    assert counts.most_alive <= 4


def test_the_text_of_a_prompt_is_encoded_and_kept_once(tmp_path, make_model, pair_of):
    pairs = [pair_of(number, prompt=f"scene {number % 2}") for number in range(6)]
    model = make_model()
    rows = encoded(model, pairs)
    assert model.calls.prompts == 2
    assert len({id(row.text) for row in rows}) == 2
    assert_equal(encoded(make_model(), pairs, cache=tmp_path), rows)
    assert files_of(tmp_path) == {"pairs": 6, "prompts": 2}


def test_another_length_of_prompts_is_another_text(tmp_path, make_model, two_pairs):
    def shorter(model):
        plain = model.encode_prompts
        model.encode_prompts = lambda prompts: plain([prompt[:7] for prompt in prompts])
        return model

    texts = [pair.prompt for pair in two_pairs]
    encoded(make_model(), two_pairs, cache=tmp_path)
    assert_equal(encoded(shorter(make_model()), two_pairs, cache=tmp_path), encoded(shorter(make_model()), two_pairs))
    assert files_of(tmp_path) == {"pairs": 2, "prompts": 2 * len(texts)}


def test_a_cache_gives_what_was_encoded_without_encoding_it_again(tmp_path, make_model, two_pairs):
    model, plain = make_model(), encoded(make_model(), two_pairs)
    assert_equal(encoded(model, two_pairs, cache=tmp_path), plain)
    before = model.calls.images
    assert_equal(encoded(model, two_pairs, cache=tmp_path), plain)
    assert model.calls.images == before + 1  # the probe that identifies the encoder
    assert files_of(tmp_path) == {"pairs": 2, "prompts": 2}


def test_pairs_on_disk_take_no_memory(tmp_path, make_model, pair_of):
    rows = encoded(make_model(), [pair_of(number) for number in range(3)], cache=tmp_path)
    assert all(isinstance(row.latents, Path) and isinstance(row.text, Path) for row in rows)


def test_a_cache_of_another_encoder_is_not_used(tmp_path, make_model, two_pairs):
    encoded(make_model(), two_pairs, cache=tmp_path)
    rows = encoded(make_model(dtype=torch.bfloat16), two_pairs, cache=tmp_path)
    assert {row.load()["before"].dtype for row in rows} == {torch.bfloat16}
    assert files_of(tmp_path) == {"pairs": 4, "prompts": 2}  # this model's text does not depend on its dtype


class WithoutBarrier(World):
    def barrier(self):
        pass


def test_processes_split_the_work_of_a_cache(tmp_path, make_model, pair_of):
    pairs = [pair_of(number) for number in range(5)]
    counts = []
    for rank in range(2):
        model = make_model()
        encoded(model, pairs, micro_batch_size=1, cache=tmp_path, world=WithoutBarrier(rank, 2))
        counts.append((model.calls.images - 1, model.calls.prompts - 1))  # without the probes
    assert counts == [(6, 3), (4, 2)]
    assert files_of(tmp_path) == {"pairs": 5, "prompts": 5}
    assert_equal(encoded(make_model(), pairs, cache=tmp_path), encoded(make_model(), pairs, micro_batch_size=1))


def rounding_by_batch(model):
    """As real encoders: a picture's latents depend on how many go through together, in their last bits."""
    plain = model.encode_images
    model.encode_images = lambda images: plain(images) * (1 + 2**-20 * len(images))
    return model


@given(missing=st.sets(st.integers(0, 6)), size=st.integers(1, 4), processes=st.integers(1, 3))
def test_bits_do_not_depend_on_what_a_killed_process_left_or_on_how_many_there_are(missing, size, processes):
    from tests.training.conftest import TinyModel, make_pair  # noqa: PLC0415 - fixtures do not reach properties

    pairs = [make_pair(number, prompt=f"scene {number % 3}") for number in range(7)]
    expected = encoded(rounding_by_batch(TinyModel()), pairs, micro_batch_size=size)
    with TemporaryDirectory() as folder:
        rows = encoded(rounding_by_batch(TinyModel()), pairs, micro_batch_size=size, cache=Path(folder))
        assert_equal(rows, expected)
        for index in missing:
            rows[index].latents.unlink()
            rows[index].text.unlink(missing_ok=True)
        for rank in range(processes):
            world = WithoutBarrier(rank, processes)
            rows = encoded(
                rounding_by_batch(TinyModel()), pairs, micro_batch_size=size, cache=Path(folder), world=world
            )
        assert_equal(rows, expected)


@pytest.mark.parametrize("part", ["latents", "text"])
def test_a_broken_file_of_a_cache_is_named(tmp_path, make_model, two_pairs, part):
    row = encoded(make_model(), two_pairs, cache=tmp_path)[0]
    path = getattr(row, part)
    path.write_bytes(b"no tensors")
    with pytest.raises(StorageError, match=rf"{path.name} is no file of the latent cache, or a damaged one.*Delete it"):
        row.load()


def test_bits_of_a_cache_that_flip_are_noticed(tmp_path, make_model, two_pairs):
    rows = encoded(make_model(), two_pairs, cache=tmp_path)
    path = rows[0].latents
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 37):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(
            StorageError, match=rf"{path.name} is no file of the latent cache, or a damaged one.*Delete it"
        ):
            rows[0].load()


def test_a_cache_that_cannot_be_written_says_so(tmp_path, make_model, two_pairs):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"encoded prompt .* could not be written.*latent cache"):
        encoded(make_model(), two_pairs, cache=tmp_path / "file" / "folder")


def test_a_size_the_model_does_not_take_is_refused(tiny_model):
    large = Image.new("RGB", (8, 4))
    odd = ImagePair(prompt="odd", seed=0, before=large, after=large, plan=Plan("odd"))
    with pytest.raises(ModelError, match="a picture of 8 x 4"):
        tiny_model.at_size(*odd.before.size)
