"""Latents kept from drawings: those that the pictures were decoded from, in trainings in the place of an encoding, or an error."""

import pickle
from dataclasses import replace

import pytest
import torch
from PIL import Image

import artaug as aa
from artaug import playground
from artaug.diffusion.families.flux.family import Flux
from artaug.recipes import rollouts
from artaug.scorers import Chroma
from artaug.training import SampledLatents
from artaug.training.distributed import World
from artaug.training.encoding import encode_pairs
from support.family_laws import synthesizer_of
from support.family_pipelines import PIPELINES, tiny_family

PLAN = aa.Plan("a red cone on the left")
BASE = playground.synthesizer(steps=1)


def drawn_pair(synthesizer):
    before, after = synthesizer.synthesize_batch([PLAN, PLAN], seeds=[1, 2])
    return aa.ImagePair(prompt=PLAN.prompt, seed=None, before=before, after=after)


def encoded(synthesizer, pair, *, cache=None):
    with synthesizer.training() as model:
        (row,) = encode_pairs(model, [pair], size=pair.size, micro_batch_size=1, cache=cache, world=World.current())
        return row.load()


@pytest.mark.parametrize("kind", PIPELINES, ids=lambda kind: kind.__name__)
def test_they_decode_to_the_picture_and_the_picture_is_the_same(kind):
    family, sampled = tiny_family(kind), SampledLatents()
    synthesizer = synthesizer_of(family)
    pictures = synthesizer.keeping_latents(sampled).synthesize_batch([aa.Plan("a red barn")] * 2, seeds=[0, 1])

    assert pictures == synthesizer.synthesize_batch([aa.Plan("a red barn")] * 2, seeds=[0, 1])
    for picture in pictures:
        latents = sampled.of(picture)
        assert latents.shape == family.encode_images([picture])[0].shape
        assert latents.dtype == torch.float32
        with torch.no_grad():
            decoded = family.decode_latents(latents[None])[0].permute(1, 2, 0)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(decoded.shape)
        assert (decoded * 255 - pixels).abs().max() < 0.51  # rounded to whole numbers


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_training_learns_from_them_and_encodes_no_picture(on_disk, tmp_path, monkeypatch):
    kept = BASE.keeping_latents(SampledLatents(tmp_path / "latents" if on_disk else None))
    pair = drawn_pair(kept)
    plain = encoded(BASE, pair)
    monkeypatch.setattr(Flux, "encode_images", None)
    with pytest.raises(TypeError):
        encoded(BASE, pair)

    rows = encoded(kept, pair)

    assert torch.equal(rows["before"], kept.sampled.of(pair.before))
    assert torch.equal(rows["after"], kept.sampled.of(pair.after))
    for name in ("before", "after"):  # nearly the same, or the latents would be those of another picture
        error = (rows[name] - plain[name]).square().mean().sqrt() / plain[name].std()
        assert 0 < error < 0.5, error


def test_a_cache_tells_what_was_sampled_from_what_was_encoded(tmp_path):
    kept = BASE.keeping_latents(SampledLatents())
    pair = drawn_pair(kept)
    plain, rows = (encoded(synthesizer, pair, cache=tmp_path) for synthesizer in (BASE, kept))
    assert not torch.equal(plain["after"], rows["after"])
    assert torch.equal(encoded(kept, pair, cache=tmp_path)["after"], kept.sampled.of(pair.after))
    assert torch.equal(encoded(BASE, pair, cache=tmp_path)["after"], plain["after"])


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_picture_that_was_not_drawn_with_it_is_an_error(on_disk, tmp_path):
    kept = BASE.keeping_latents(SampledLatents(tmp_path if on_disk else None))
    pair = replace(drawn_pair(kept), after=Image.new("RGB", (64, 64)))
    with pytest.raises(
        aa.StorageError, match=r"64 x 64 pixels are not kept in .* which encodes pictures, or draw it again"
    ):
        encoded(kept, pair)


def test_files_outlive_the_process_and_damage_is_named(tmp_path):
    pair = drawn_pair(BASE.keeping_latents(SampledLatents(tmp_path)))
    again = pickle.loads(pickle.dumps(SampledLatents(tmp_path)))
    first = again.of(pair.before)
    assert torch.isfinite(first).all()
    for file in tmp_path.iterdir():
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    with pytest.raises(aa.StorageError, match="file of sampled latents, or a damaged one"):
        again.of(pair.before)


def test_what_is_derived_from_a_synthesizer_keeps_none_and_a_training_is_another_one():
    kept = BASE.keeping_latents(SampledLatents())
    lora = (
        aa.DifferentialLoRATrainer(rank=1, steps=1, batch_size=1)
        .train([drawn_pair(kept)], kept, seed=0, progress=False)
        .lora
    )
    assert kept.with_lora(lora).sampled is None
    assert kept.fingerprint != BASE.fingerprint
    assert kept.identity == BASE.identity  # it draws the same pictures


def test_rollouts_encode_no_picture(monkeypatch):
    asked = []
    encode = Flux.encode_images
    monkeypatch.setattr(Flux, "encode_images", lambda self, images: asked.append(images) or encode(self, images))
    rollouts(
        playground.prompts(2, seed=0),
        synthesizer=BASE,
        scorer=Chroma(),
        unseen=playground.Accuracy("color"),
        held_out=playground.prompts(2, seed=1, held_out=True),
        trainer=aa.DifferentialLoRATrainer(rank=1, steps=1, batch_size=1),
        draws=2,
        rounds=2,
        progress=False,
    )
    assert asked == []
    encoded(BASE, drawn_pair(BASE))
    assert len(asked) == 2  # as it would have been
