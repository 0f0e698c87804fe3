"""Data echoing: the same bits as computing the teacher every time, without computing it."""

import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import artaug as aa
from artaug.training.teacher_cache import TeacherCache


def inputs_of(number, *, text=0.0):
    return {"noisy": torch.full((2, 3), float(number)), "sigmas": torch.ones(2), "text.embeds": torch.full((2,), text)}


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_prediction_is_computed_once_for_the_bits_of_its_inputs(tmp_path, on_disk):
    teacher_cache, calls = TeacherCache(folder=tmp_path if on_disk else None), []

    def compute(value):
        def predict():
            calls.append(value)
            return torch.tensor(float(value), dtype=torch.bfloat16)

        return predict

    assert teacher_cache.get_or_compute(inputs_of(1), compute(10)) == 10
    assert teacher_cache.get_or_compute(inputs_of(2), compute(20)) == 20
    assert teacher_cache.get_or_compute(inputs_of(1), compute(30)) == 10
    assert teacher_cache.get_or_compute(inputs_of(1, text=1.0), compute(40)) == 40  # another prompt
    assert teacher_cache.get_or_compute(inputs_of(0.0), compute(50)) == 50
    assert teacher_cache.get_or_compute(inputs_of(-0.0), compute(60)) == 60  # other bits
    assert calls == [10, 20, 40, 50, 60]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predictions_on_disk_take_no_memory_and_leave_no_file(tmp_path, dtype):
    teacher_cache = TeacherCache(folder=tmp_path / "latents")
    expected = [torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(5)]
    for number, prediction in enumerate(expected):
        teacher_cache.get_or_compute(inputs_of(number), prediction.clone)
    assert sum(type(item) is torch.Tensor and item.shape == (2, 3, 7) for item in gc.get_objects()) == 5
    for number in reversed(range(5)):
        kept = teacher_cache.get_or_compute(inputs_of(number), unexpected)
        assert kept.dtype == dtype
        assert torch.equal(kept, expected[number])
    del teacher_cache
    assert not list((tmp_path / "latents").iterdir())


def unexpected():
    raise AssertionError("it was computed before")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_predictions_that_the_disk_has_no_room_for_are_computed_again(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: open("/dev/full", "r+b", buffering=0))  # noqa: SIM115, PTH123
    teacher_cache = TeacherCache(folder=tmp_path)
    for number in (1, 1, 2):
        prediction = torch.full((2,), float(number))
        assert torch.equal(teacher_cache.get_or_compute(inputs_of(number), prediction.clone), prediction)
    assert caplog.text.count("the disk of the latent cache is full") == 1


def trainer_of(**options):
    return aa.DifferentialLoRATrainer(**{"rank": 4, "steps": 8, "batch_size": 2, "learning_rate": 1e-2, **options})


def count_calls(model):
    """Count forward passes: with gradient, and without."""
    calls = SimpleNamespace(student=0, teacher=0)

    def count(*_):
        if torch.is_grad_enabled():
            calls.student += 1
        else:
            calls.teacher += 1

    model.module.register_forward_hook(count)
    return calls


@pytest.mark.parametrize(
    "objective",
    [
        aa.PairedDifference(),
        aa.PairedDifference(at_before=0.5),
        aa.Bipolar(),
        aa.DirectPreference(),
        aa.PairedPreference(),
        aa.NegativeAware(),
    ],
    ids=repr,
)
def test_the_teacher_predicts_once_per_batch(make_model, two_pairs, objective):
    plain_model, echoed_model = make_model(), make_model()
    plain, echoed = count_calls(plain_model), count_calls(echoed_model)
    trainer_of(objective=objective, echo=1).train(two_pairs, plain_model, seed=0, progress=False)
    trainer_of(objective=objective, echo=2).train(two_pairs, echoed_model, seed=0, progress=False)
    assert echoed.student == plain.student
    assert 2 * echoed.teacher == plain.teacher > 0


def test_a_cached_prediction_is_the_one_that_would_be_computed(monkeypatch, make_model, two_pairs):
    cached = trainer_of(echo=3).train(two_pairs, make_model(), seed=0, progress=False)
    monkeypatch.setattr(TeacherCache, "get_or_compute", lambda _, __, compute: compute())
    computed = trainer_of(echo=3).train(two_pairs, make_model(), seed=0, progress=False)
    assert cached.losses == computed.losses
    assert cached.losses != trainer_of(echo=1).train(two_pairs, make_model(), seed=0, progress=False).losses


def test_a_cache_on_disk_changes_no_bit(tmp_path, make_model, two_pairs):
    plain = trainer_of(echo=3).train(two_pairs, make_model(), seed=0, progress=False)
    on_disk = trainer_of(echo=3).train(two_pairs, make_model(), seed=0, progress=False, cache=tmp_path)
    assert on_disk.losses == plain.losses


def test_a_training_resumed_within_an_echo_ends_with_the_same_bits(tmp_path, make_model, two_pairs):
    uninterrupted = trainer_of(echo=2).train(two_pairs, make_model(), seed=0, progress=False)

    def stop(event):
        if event.step == 6:
            raise KeyboardInterrupt

    checkpoints = aa.Checkpoints(folder=tmp_path, every=5)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(echo=2).train(two_pairs, make_model(), seed=0, checkpoints=checkpoints, on_step=stop, progress=False)
    resumed = trainer_of(echo=2).train(two_pairs, make_model(), seed=0, checkpoints=checkpoints, progress=False)
    assert resumed.losses == uninterrupted.losses


@pytest.mark.parametrize(
    ("objective", "echo", "student", "teacher"), [(aa.PairedDifference(), 4, 8, 2), (aa.PairedPreference(), 2, 16, 8)]
)
def test_an_objective_that_asks_the_teacher_says_how_often_batches_are_used(
    make_model, two_pairs, objective, echo, student, teacher
):
    model = make_model()
    calls = count_calls(model)
    trained = trainer_of(objective=objective).train(two_pairs, model, seed=0, progress=False)
    assert (calls.student, calls.teacher) == (student, teacher)
    said = trainer_of(objective=objective, echo=echo).train(two_pairs, make_model(), seed=0, progress=False)
    assert trained.losses == said.losses


def test_fine_tuning_repeats_no_batch_unless_told_to(make_model, two_pairs):
    plain = [
        trainer_of(objective=aa.SupervisedFineTuning(), **options).train(
            two_pairs, make_model(), seed=0, progress=False
        )
        for options in ({}, {"echo": 1})
    ]
    assert plain[0].losses == plain[1].losses


def test_the_teachers_predictions_go_with_the_cycle_of_their_batches(monkeypatch, tmp_path, make_model, two_pairs):
    monkeypatch.setattr("artaug.training.phases._CYCLE", 2)
    sizes, get_or_compute = [], TeacherCache.get_or_compute

    def recorded(cache, inputs, compute):
        prediction = get_or_compute(cache, inputs, compute)
        sizes.append(len(cache._predictions))  # noqa: SLF001 - what it holds is what it takes
        return prediction

    monkeypatch.setattr(TeacherCache, "get_or_compute", recorded)
    trainer = trainer_of(steps=16, echo=2, objective=aa.PairedDifference())  # eight batches, of which two are a cycle
    uninterrupted = trainer.train(two_pairs, make_model(), seed=0, progress=False)
    assert sizes == [1, 2, 2, 2] * 4

    def stop(event):
        if event.step == 7:
            raise KeyboardInterrupt

    checkpoints = aa.Checkpoints(folder=tmp_path, every=3)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(two_pairs, make_model(), seed=0, checkpoints=checkpoints, on_step=stop, progress=False)
    resumed = trainer.train(two_pairs, make_model(), seed=0, checkpoints=checkpoints, progress=False)
    assert resumed.losses == uninterrupted.losses
    assert all(torch.equal(resumed.lora.layers[name].up, layer.up) for name, layer in uninterrupted.lora.layers.items())
