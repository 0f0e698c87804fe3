"""A training that is killed, resumed, interrupted or out of room ends with the same result, or says why not."""

import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from artaug.errors import InvalidValueError, StorageError, TrainingDivergedError
from artaug.lora.lora import LoRA
from artaug.training import (
    AdamW8bit,
    Checkpoints,
    DifferentialLoRATrainer,
    Objective,
    PairedDifference,
    Prodigy,
    Schedule,
    ScheduleFree,
    TwoStage,
)

SETTINGS = {
    "plain": {},
    "moving average": {"ema": 0.9},
    "eight bits": {"optimizer": AdamW8bit(), "rank": 128},
    "prodigy": {"optimizer": Prodigy(), "learning_rate": 1.0},
    "schedule-free": {"optimizer": ScheduleFree()},
    "two stages": {"objective": TwoStage(per_pair=False)},
    "two stages per pair": {"objective": TwoStage()},
    "two stages per pair, averaged": {"objective": TwoStage(), "ema": 0.9},
    "micro batches, with a schedule": {"micro_batch_size": 1, "schedule": Schedule.COSINE},
}


def trainer_of(**options):
    return DifferentialLoRATrainer(**{"rank": 4, "steps": 12, "batch_size": 2, "learning_rate": 1e-2, **options})


def assert_same(training, other):
    assert training.losses == other.losses
    assert set(training.lora.layers) == set(other.lora.layers)
    for name, layer in training.lora.layers.items():
        assert torch.equal(layer.down, other.lora.layers[name].down)
        assert torch.equal(layer.up, other.lora.layers[name].up)


def stopping_at(step):
    def stop(event):
        if event.step == step:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_a_resumed_training_ends_bit_for_bit_as_one_never_stopped(tmp_path, make_model, two_pairs, options):
    trainer = trainer_of(**options)
    whole = trainer.train(two_pairs, make_model(), seed=3)
    checkpoints = Checkpoints(folder=tmp_path, every=2)
    for step in (3, 8, 9):
        with pytest.raises(KeyboardInterrupt):
            trainer.train(two_pairs, make_model(), seed=3, checkpoints=checkpoints, on_step=stopping_at(step))
    assert_same(trainer.train(two_pairs, make_model(), seed=3, checkpoints=checkpoints), whole)


@settings(max_examples=10)
@given(every=st.integers(1, 7), stops=st.lists(st.integers(1, 11), max_size=3))
def test_the_result_does_not_depend_on_stops_and_checkpoint_intervals(tmp_path_factory, every, stops):
    from tests.training.conftest import TinyModel, make_pair  # noqa: PLC0415 - fixtures do not reach properties

    pairs, trainer = [make_pair(1), make_pair(2), make_pair(3)], trainer_of()
    checkpoints = Checkpoints(folder=tmp_path_factory.mktemp("run"), every=every, keep=1)
    for step in stops:
        with suppress(KeyboardInterrupt):
            trainer.train(pairs, TinyModel(), seed=0, checkpoints=checkpoints, on_step=stopping_at(step))
    resumed = trainer.train(pairs, TinyModel(), seed=0, checkpoints=checkpoints)
    assert_same(resumed, trainer.train(pairs, TinyModel(), seed=0))


KILLED = """
import os, signal, sys, time
from pathlib import Path
sys.path[:0] = {path!r}
import peft  # which a training imports, once for all copies of this process
import torch
from artaug.training import Checkpoints, DifferentialLoRATrainer
from tests.training.conftest import TinyModel, make_pair

torch.set_num_threads(1)
run, progress, lora = map(Path, sys.argv[1:])

def train():
    trainer = DifferentialLoRATrainer(rank=4, steps={steps}, batch_size=2, learning_rate=1e-2, ema=0.9)
    training = trainer.train(
        [make_pair(1), make_pair(2)], TinyModel(), seed=1, checkpoints=Checkpoints(folder=run, every=1),
        on_step=lambda event: progress.write_text(str(event.step)), progress=False,
    )
    training.lora.save(lora)

for kill_at in {kills}:  # each training in a fresh copy of this process, which trains nothing itself
    child = os.fork()
    if child == 0:
        train()
        os._exit(0)
    deadline = time.monotonic() + 60
    while not progress.exists() or int(progress.read_text() or 0) < kill_at:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "it ended before it was killed"
train()
"""


def test_killed_at_random_steps_it_ends_with_the_same_file(tmp_path, make_model, two_pairs):
    steps = 60
    script = tmp_path / "script.py"
    script.write_text(KILLED.format(path=[str(Path(__file__).parents[2]), *sys.path], steps=steps, kills=(7, 35)))
    command = [sys.executable, script, tmp_path / "run", tmp_path / "step", tmp_path / "lora.safetensors"]
    finished = subprocess.run(command, check=False, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    trainer = DifferentialLoRATrainer(rank=4, steps=steps, batch_size=2, learning_rate=1e-2, ema=0.9)
    uninterrupted = trainer.train(two_pairs, make_model(), seed=1).lora.save(tmp_path / "uninterrupted.safetensors")
    assert (tmp_path / "lora.safetensors").read_bytes() == uninterrupted.read_bytes()


def test_a_training_of_other_rewards_is_another_training(tmp_path, make_model, two_pairs):
    rewarded = [replace(pair, rewards=(0.2, 0.8)) for pair in two_pairs]
    trainings = {None: two_pairs, "some": rewarded, "others": [replace(rewarded[0], rewards=(0.2, 0.9)), rewarded[1]]}
    for name, pairs in trainings.items():
        checkpoints = Checkpoints(folder=tmp_path / str(name))
        trainer_of().train(pairs, make_model(), seed=0, checkpoints=checkpoints)
        for other, other_pairs in trainings.items():
            if other != name:
                with pytest.raises(StorageError, match="belongs to another training"):
                    trainer_of().train(other_pairs, make_model(), seed=0, checkpoints=checkpoints)


def test_a_finished_training_is_not_run_again(tmp_path, make_model, two_pairs):
    checkpoints = Checkpoints(folder=tmp_path, every=5)
    first = trainer_of().train(two_pairs, make_model(), seed=0, checkpoints=checkpoints)
    steps, model = [], make_model()
    again = trainer_of().train(two_pairs, model, seed=0, checkpoints=checkpoints, on_step=steps.append)
    assert not steps
    assert (model.calls.images, model.calls.prompts) == (0, 0)
    assert_same(again, first)
    assert again.seconds == first.seconds


def test_the_seconds_of_a_resumed_training_are_those_of_all_its_runs(tmp_path, make_model, two_pairs):
    checkpoints, seconds = Checkpoints(folder=tmp_path, every=2), []

    def stop(event):
        seconds.append(event.seconds)
        if event.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_of().train(two_pairs, make_model(), seed=0, checkpoints=checkpoints, on_step=stop)
    resumed = trainer_of().train(
        two_pairs, make_model(), seed=0, checkpoints=checkpoints, on_step=lambda event: seconds.append(event.seconds)
    )
    assert seconds[5] > seconds[3]  # step 5 again, after the time of the four before it
    assert resumed.seconds >= seconds[-1]


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"damaged")], ids=["lost", "damaged"])
@pytest.mark.parametrize("part", ["pairs", "prompts"])
def test_a_file_of_the_latent_cache_that_is_spoiled_is_made_again(tmp_path, caplog, make_model, two_pairs, part, spoil):
    plain = trainer_of().train(two_pairs, make_model(), seed=0)

    def spoil_one(event):
        if event.step == 5:
            spoil(min((tmp_path / part).iterdir()))

    model = make_model()
    training = trainer_of().train(two_pairs, model, seed=0, cache=tmp_path, on_step=spoil_one)
    assert_same(training, plain)
    assert re.search(r"is no file of the latent cache, or a damaged one.*encoded again from the pictures", caplog.text)
    assert all(path.stat().st_size > 100 for path in (tmp_path / part).iterdir())


def test_a_file_of_the_latent_cache_that_cannot_be_made_again_ends_the_training(tmp_path, make_model, two_pairs):
    model = make_model()

    def spoil(event):
        if event.step == 5:
            for path in (tmp_path / "pairs").iterdir():
                path.unlink()
            model.encode_images = gone

    def gone(_images):
        raise StorageError("the pictures are gone")

    with pytest.raises(StorageError, match="the pictures are gone"):
        trainer_of().train(two_pairs, model, seed=0, cache=tmp_path, on_step=spoil)


def test_only_the_newest_files_stay(tmp_path, make_model, two_pairs):
    trainer_of().train(two_pairs, make_model(), seed=0, checkpoints=Checkpoints(folder=tmp_path, every=2, keep=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08}.safetensors" for step in (8, 10, 12)]


@pytest.mark.parametrize(
    ("seed", "options", "message"),
    [
        (1, {}, "seed: 0 there, 1 here"),
        (0, {"rank": 8}, r"trainer\.rank: 4 there, 8 here"),
        (0, None, "pairs: "),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_naming_what_differs(
    tmp_path, make_model, two_pairs, pair_of, seed, options, message
):
    checkpoints = Checkpoints(folder=tmp_path, every=6)
    trainer_of().train(two_pairs, make_model(), seed=0, checkpoints=checkpoints)
    pairs = [*two_pairs, pair_of(3)] if options is None else two_pairs
    with pytest.raises(StorageError, match=rf"belongs to another training \({message}"):
        trainer_of(**options or {}).train(pairs, make_model(), seed=seed, checkpoints=checkpoints)


def test_a_checkpoint_of_another_base_model_is_refused(tmp_path, make_model, two_pairs):
    checkpoints = Checkpoints(folder=tmp_path, every=6)
    trainer_of().train(two_pairs, make_model(), seed=0, checkpoints=checkpoints)
    tuned = make_model()
    tuned.module.blocks[1].norm.weight.data += 1e-3
    with pytest.raises(StorageError, match=r"another training \(model: TinyDenoiser \w+ there, TinyDenoiser \w+ here"):
        trainer_of().train(two_pairs, tuned, seed=0, checkpoints=checkpoints)


@pytest.mark.parametrize("option", [{"every": 0}, {"every": -1}, {"keep": 0}, {"keep": -1}])
def test_numbers_below_one_are_refused(tmp_path, option):
    with pytest.raises(InvalidValueError, match=r"need whole numbers of at least 1"):
        Checkpoints(folder=tmp_path, **option)


def test_a_checkpoint_under_another_lora_is_refused(tmp_path, make_model, two_pairs):
    learned = trainer_of().train(two_pairs, make_model(), seed=0).lora
    checkpoints = Checkpoints(folder=tmp_path, every=6)
    trainer_of().train(two_pairs, make_model(applied=[learned]), seed=0, checkpoints=checkpoints)
    trainer_of().train(two_pairs, make_model(applied=[learned]), seed=0, checkpoints=checkpoints)
    with pytest.raises(StorageError, match=r"another training \(model: "):
        trainer_of().train(two_pairs, make_model(applied=[learned.scaled(-1)]), seed=0, checkpoints=checkpoints)


class UserObjective(Objective):
    """An objective of a user, without a repr."""

    def __init__(self, factor=1.0):
        self.factor = factor

    def loss(self, model, batch):
        return self.factor * PairedDifference().loss(model, batch)


def test_a_users_objective_is_identified_by_its_attributes(tmp_path, make_model, two_pairs):
    checkpoints = Checkpoints(folder=tmp_path, every=6)
    trainer_of(objective=UserObjective()).train(two_pairs, make_model(), seed=0, checkpoints=checkpoints)
    with pytest.raises(StorageError, match=r"another training \(trainer\.objective\.factor: 1\.0 there, 2\.0 here"):
        trainer_of(objective=UserObjective(2.0)).train(two_pairs, make_model(), seed=0, checkpoints=checkpoints)


def test_a_users_objective_is_recognized_in_another_process(tmp_path, make_model, two_pairs):
    checkpoints = Checkpoints(folder=tmp_path, every=2)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(objective=UserObjective()).train(
            two_pairs, make_model(), seed=0, checkpoints=checkpoints, on_step=stopping_at(5)
        )
    resumed = trainer_of(objective=UserObjective()).train(two_pairs, make_model(), seed=0, checkpoints=checkpoints)
    assert_same(resumed, trainer_of(objective=PairedDifference(), echo=1).train(two_pairs, make_model(), seed=0))


def test_what_only_saves_memory_may_change_between_two_runs(tmp_path, make_model, two_pairs):
    checkpoints = Checkpoints(folder=tmp_path, every=1)
    with pytest.raises(KeyboardInterrupt):
        trainer_of().train(two_pairs, make_model(), seed=0, checkpoints=checkpoints, on_step=stopping_at(4))
    resumed = trainer_of(micro_batch_size=1).train(two_pairs, make_model(), seed=0, checkpoints=checkpoints)
    whole = trainer_of().train(two_pairs, make_model(), seed=0)
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-4)


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_a_broken_checkpoint_is_named(tmp_path, make_model, two_pairs, content):
    checkpoints = Checkpoints(folder=tmp_path, every=6)
    trainer_of().train(two_pairs, make_model(), seed=0, checkpoints=checkpoints)
    newest = max(tmp_path.iterdir())
    newest.write_bytes(newest.read_bytes()[:-100] if content is None else content)
    with pytest.raises(StorageError, match=rf"{newest.name} is no checkpoint.*Delete it"):
        trainer_of().train(two_pairs, make_model(), seed=0, checkpoints=checkpoints)


def test_a_lora_file_is_no_checkpoint(tmp_path, make_model, two_pairs):
    trainer_of(steps=1).train(two_pairs, make_model(), seed=0).lora.save(tmp_path / "step-00000001.safetensors")
    with pytest.raises(StorageError, match="no checkpoint, or a damaged one: it has no digests"):
        trainer_of().train(two_pairs, make_model(), seed=0, checkpoints=Checkpoints(folder=tmp_path))


def test_a_full_disk_stops_the_training_and_leaves_what_was_written(tmp_path, make_model, two_pairs):
    checkpoints = Checkpoints(folder=tmp_path, every=2)
    with pytest.raises(KeyboardInterrupt):
        trainer_of().train(two_pairs, make_model(), seed=0, checkpoints=checkpoints, on_step=stopping_at(5))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with full_disk(), pytest.raises(StorageError, match=r"step-00000006.* could not be written.*go on from the last"):
        trainer_of().train(two_pairs, make_model(), seed=0, checkpoints=checkpoints)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    resumed = trainer_of().train(two_pairs, make_model(), seed=0, checkpoints=checkpoints)
    assert_same(resumed, trainer_of().train(two_pairs, make_model(), seed=0))


class full_disk:  # noqa: N801 - a context manager
    """Files may have at most a few bytes, as on a disk that is full; needs no mount, and so no root."""

    def __enter__(self):
        import resource  # noqa: PLC0415 - not on every system

        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, self.limits[1]))

    def __exit__(self, *_):
        import resource  # noqa: PLC0415

        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
        signal.signal(signal.SIGXFSZ, self.handler)


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path, make_model, two_pairs):
    class Exploding(Objective):
        """Its loss is finite, and its gradient is not."""

        def loss(self, model, batch):
            loss = PairedDifference().loss(model, batch)
            return loss + (loss * 0).sqrt()

    checkpoints = Checkpoints(folder=tmp_path, every=1)
    with pytest.raises(TrainingDivergedError, match=r"the gradient norm was (nan|inf) at step 1") as error:
        trainer_of(objective=Exploding()).train(two_pairs, make_model(), seed=0, checkpoints=checkpoints)
    assert error.value.loss > 0
    assert not list(tmp_path.iterdir())


def test_the_moving_average_is_exported(make_model, two_pairs):
    steps = [
        trainer_of(steps=4, echo=1, warmup=0, ema=decay).train(two_pairs, make_model(), seed=0) for decay in (None, 0.5)
    ]
    trajectory = [LoRA(factors_after(make_model, two_pairs, count)) for count in range(5)]
    expected = trajectory[0].layers
    for lora, decay in zip(trajectory[1:], (0, 2 / 11, 3 / 12, 4 / 13), strict=True):  # rising to 0.5
        expected = {name: between(expected[name], layer, decay) for name, layer in lora.layers.items()}
    assert steps[0].losses == steps[1].losses
    for name, layer in steps[1].lora.layers.items():
        torch.testing.assert_close(layer.down, expected[name].down)
        torch.testing.assert_close(layer.up, expected[name].up)


def between(layer, other, share):
    """``share`` of the one, the rest of the other."""
    factors = zip((layer.down, layer.up), (other.down, other.up), strict=True)
    return type(layer)(*(share * one + (1 - share) * two for one, two in factors))


def factors_after(make_model, pairs, count):
    """The factors after some steps of a training without its moving average."""
    from artaug.synthesis import picture_seeds  # noqa: PLC0415
    from artaug.training.batches import init_generator  # noqa: PLC0415
    from artaug.training.injection import inject_adapter  # noqa: PLC0415

    if count == 0:
        model, config = make_model(), trainer_of()
        generator = init_generator(picture_seeds(0, 2)[0], 0)
        with inject_adapter(model, rank=config.rank, targets=config.targets, generator=generator) as student:
            return student.to_lora().layers
    return trainer_of(steps=count, echo=1, warmup=0).train(pairs, make_model(), seed=0).lora.layers
