"""Pairs noised with what they were drawn from: a function of their seeds alone, wherever and whenever they are trained on."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.training.conftest import SIDE, TinyModel, make_pair

from artaug.diffusion import DiffusersSynthesizer
from artaug.errors import ContractError, InvalidValueError, StorageError
from artaug.training import Checkpoints, DifferentialLoRATrainer, Objective, PairedDifference, TwoStage
from artaug.training.batches import EncodedPairs
from artaug.training.config import TrainingConfig
from artaug.training.distributed import SINGLE_PROCESS, World
from support.family_laws import picture
from support.tiny_unet import tiny_sdxl

PAIRS = [make_pair(seed) for seed in (1, 2, 3)]
MODEL = TinyModel()
ENCODED = EncodedPairs.encode(MODEL, PAIRS, micro_batch_size=2)


def key_of(latents):
    """By which a picture is found again."""
    return tuple(latents.flatten()[:8].tolist())


SEED_OF = {key_of(MODEL.encode_images([pair.before])): pair.seed for pair in PAIRS}


def drawn_from(seed):
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))[0]


def micro_batches(*, world=SINGLE_PROCESS, encoded=ENCODED, model=None, start=0, **options):
    config = TrainingConfig(**{"own_noise": True, "batch_size": 4, **options})
    indices = range(start, start + 2)
    steps = encoded.batches(model or MODEL, range(3), config, seed=0, indices=indices, world=world)
    return [batch for step in steps for batch in step.micro_batches]


def trained(pairs, model=None, **options):
    defaults = {"own_noise": True, "rank": 4, "steps": 8, "batch_size": 2, "learning_rate": 1e-2}
    arguments = {name: options.pop(name) for name in ("checkpoints", "cache", "on_step") if name in options}
    trainer = DifferentialLoRATrainer(**{**defaults, **options})
    return trainer.train(pairs, model or TinyModel(), seed=0, progress=False, **arguments)


@settings(max_examples=25)
@given(start=st.integers(0, 5), micro_batch_size=st.none() | st.integers(1, 4), processes=st.sampled_from([1, 2, 4]))
def test_each_pair_has_the_noise_of_its_seed_in_every_batch(start, micro_batch_size, processes):
    for rank in range(processes):
        world = World(rank, processes)
        for batch in micro_batches(world=world, start=start, micro_batch_size=micro_batch_size):
            for before, noise in zip(batch.before, batch.noise, strict=True):
                assert torch.equal(noise, drawn_from(SEED_OF[key_of(before)]))


def test_the_order_of_the_pairs_and_the_noise_levels_are_those_of_fresh_noise():
    for own, fresh in zip(micro_batches(), micro_batches(own_noise=False), strict=True):
        assert torch.equal(own.before, fresh.before)
        assert torch.equal(own.sigmas, fresh.sigmas)
        assert not torch.equal(own.noise, fresh.noise)


def test_at_the_highest_level_the_noisy_latents_are_exactly_that_noise():
    for batch in micro_batches():
        ones = torch.ones_like(batch.sigmas)
        for clean in (batch.before, batch.after):
            assert torch.equal(MODEL.noise_schedule.add_noise(clean, batch.noise, ones), batch.noise)


@dataclass(frozen=True)
class Watched(Objective):
    """Keeps the noise of every batch by the picture before."""

    seen: tuple[dict, ...] = ({},)

    def loss(self, model, batch):
        for before, noise in zip(batch.before, batch.noise, strict=True):
            self.seen[0].setdefault(key_of(before), set()).add(tuple(noise.flatten().tolist()))
        return PairedDifference().loss(model, batch)


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 1, "echo": 2}], ids=repr)
def test_a_training_noises_a_pair_in_one_way_only(options):
    objective = Watched(({},))
    trained(PAIRS, objective=objective, **options)
    noises = {key_of(MODEL.encode_images([pair.before])): drawn_from(pair.seed) for pair in PAIRS}
    assert objective.seen[0] == {before: {tuple(noise.flatten().tolist())} for before, noise in noises.items()}


@pytest.mark.parametrize("objective", [PairedDifference(), TwoStage(per_pair=False), TwoStage()], ids=repr)
def test_a_resumed_training_ends_as_one_never_stopped(tmp_path, objective):
    def stop(event):
        if event.step == 5:
            raise KeyboardInterrupt

    whole = trained(PAIRS, objective=objective, steps=12)
    checkpoints = Checkpoints(folder=tmp_path, every=2)
    with pytest.raises(KeyboardInterrupt):
        trained(PAIRS, objective=objective, steps=12, checkpoints=checkpoints, on_step=stop)
    resumed = trained(PAIRS, objective=objective, steps=12, checkpoints=checkpoints)
    assert resumed.losses == whole.losses
    assert resumed.lora.digest == whole.lora.digest


@pytest.mark.parametrize("own_noise", [True, False])
def test_a_training_of_other_seeds_is_another_training_only_if_they_count(tmp_path, own_noise):
    other = [replace(pair, seed=pair.seed + 10) for pair in PAIRS]
    checkpoints = Checkpoints(folder=tmp_path)
    first = trained(PAIRS, own_noise=own_noise, checkpoints=checkpoints)
    if own_noise:
        with pytest.raises(StorageError, match="belongs to another training"):
            trained(other, own_noise=own_noise, checkpoints=checkpoints)
    else:
        assert trained(other, own_noise=own_noise, checkpoints=checkpoints).losses == first.losses


def test_a_cache_filled_before_never_gives_the_noise_of_another_seed_or_setting(tmp_path):
    other = [replace(pair, seed=pair.seed + 10) for pair in PAIRS]
    for pairs, own_noise in ((PAIRS, False), (PAIRS, True), (other, True), (other, False)):
        cached = trained(pairs, own_noise=own_noise, cache=tmp_path)
        assert cached.losses == trained(pairs, own_noise=own_noise).losses
    assert trained(other).losses != trained(PAIRS).losses


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (None, "has none. Give it the seed"),
        (2**64, "that torch.Generator does not take"),
        (-(2**63) - 1, "does not take"),
    ],
)
def test_a_pair_without_a_usable_seed_is_named_before_anything_is_encoded(seed, message):
    model = TinyModel()
    pairs = [PAIRS[0], replace(PAIRS[1], seed=seed)]
    with pytest.raises(InvalidValueError, match=rf"own_noise=True .* pairs\[1\], ImagePair\('scene 2'.*{message}"):
        trained(pairs, model)
    assert (model.calls.images, model.calls.prompts) == (0, 0)
    assert trained(pairs, own_noise=False).steps == 8


def test_noise_of_another_shape_is_named():
    model = TinyModel()
    model.initial_noise = lambda seeds, _conditioning: torch.zeros(len(seeds), 3)
    with pytest.raises(
        ContractError, match=r"TinyModel\.initial_noise returned a tensor of shape \(4, 3\) for 4 seeds"
    ):
        micro_batches(model=model)


def test_pictures_of_two_sizes_have_the_noise_of_their_sizes():
    pairs = [
        replace(PAIRS[index], before=picture(index, width=side, height=32), after=picture(9, width=side, height=32))
        for index, side in enumerate((32, 48))
    ]
    synthesizer = DiffusersSynthesizer(pipeline=tiny_sdxl(), width=32, height=32, steps=1)
    objective = Watched(({},))
    with synthesizer.training() as family:
        expected = {}
        for pair in pairs:
            sized = family.at_size(*pair.size)
            noise = sized.initial_noise([pair.seed], sized.encode_prompts([pair.prompt]))
            expected[key_of(sized.encode_images([pair.before]))] = {tuple(noise.flatten().tolist())}
    trained(pairs, synthesizer, objective=objective, batch_size=1, steps=2, echo=1)
    assert objective.seen[0] == expected
