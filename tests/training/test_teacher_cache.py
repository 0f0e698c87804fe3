"""Batches that come again: the same bits as asking the teacher every time, without asking it."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug.training.phases import split_into_phases
from artaug.training.teacher_cache import TeacherCache


def asked(number, *, words=0.0):
    return {"noisy": torch.full((2, 3), float(number)), "sigmas": torch.ones(2), "text.embeds": torch.full((2,), words)}


def test_a_question_is_asked_once_and_known_by_its_bits():
    teacher_cache, calls = TeacherCache(), []

    def ask(value):
        def answering():
            calls.append(value)
            return torch.tensor(float(value), dtype=torch.bfloat16)

        return answering

    assert teacher_cache.get_or_compute(asked(1), ask(10)) == 10
    assert teacher_cache.get_or_compute(asked(2), ask(20)) == 20
    assert teacher_cache.get_or_compute(asked(1), ask(30)) == 10
    assert teacher_cache.get_or_compute(asked(1, words=1.0), ask(40)) == 40  # another prompt
    assert teacher_cache.get_or_compute(asked(0.0), ask(50)) == 50
    assert teacher_cache.get_or_compute(asked(-0.0), ask(60)) == 60  # other bits
    assert calls == [10, 20, 40, 50, 60]


@given(steps=st.integers(1, 40), echo=st.integers(1, 5))
def test_every_batch_comes_about_as_often_and_none_before_all_others_have(steps, echo):
    (phase,) = split_into_phases(aa.PairedDifference().training_plan(3), steps, aa.PairedDifference())
    seen = [phase.batch_index(step, echo=echo) for step in range(1, steps + 1)]
    distinct = -(-steps // echo)
    assert seen == [number % distinct for number in range(steps)]
    assert max(seen.count(number) for number in set(seen)) <= echo


def test_stages_have_batches_of_their_own():
    objective = aa.TwoStage(per_pair=False)
    first, second = split_into_phases(objective.training_plan(2), 10, objective)
    seen = [
        phase.batch_index(step, echo=2) for phase in (first, second) for step in range(phase.start + 1, phase.stop + 1)
    ]
    assert seen == [0, 1, 2, 0, 1, 5, 6, 7, 5, 6]


def trainer_of(**options):
    return aa.DifferentialLoRATrainer(**{"rank": 4, "steps": 8, "batch_size": 2, "learning_rate": 1e-2, **options})


def counting(model):
    """Passes through a model: with gradient, and without."""
    calls = SimpleNamespace(student=0, teacher=0)

    def count(*_):
        if torch.is_grad_enabled():
            calls.student += 1
        else:
            calls.teacher += 1

    model.module.register_forward_hook(count)
    return calls


@pytest.mark.parametrize("objective", [aa.PairedDifference(), aa.Bipolar(), aa.DirectPreference()], ids=repr)
def test_the_teacher_is_asked_about_a_batch_once(make_model, two_pairs, objective):
    once, twice = make_model(), make_model()
    plain, echoed = counting(once), counting(twice)
    trainer_of(objective=objective).train(two_pairs, once, seed=0, progress=False)
    trainer_of(objective=objective, echo=2).train(two_pairs, twice, seed=0, progress=False)
    assert echoed.student == plain.student
    assert 2 * echoed.teacher == plain.teacher > 0


def test_what_is_remembered_is_what_would_have_been_said(monkeypatch, make_model, two_pairs):
    remembered = trainer_of(echo=3).train(two_pairs, make_model(), seed=0, progress=False)
    monkeypatch.setattr(TeacherCache, "get_or_compute", lambda _, __, ask: ask())
    asked_again = trainer_of(echo=3).train(two_pairs, make_model(), seed=0, progress=False)
    assert remembered.losses == asked_again.losses
    assert remembered.losses != trainer_of().train(two_pairs, make_model(), seed=0, progress=False).losses


def test_a_training_resumed_among_echoes_ends_with_the_same_bits(tmp_path, make_model, two_pairs):
    whole = trainer_of(echo=2).train(two_pairs, make_model(), seed=0, progress=False)

    def stop(event):
        if event.step == 6:
            raise KeyboardInterrupt

    checkpoints = aa.Checkpoints(folder=tmp_path, every=5)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(echo=2).train(two_pairs, make_model(), seed=0, checkpoints=checkpoints, on_step=stop, progress=False)
    resumed = trainer_of(echo=2).train(two_pairs, make_model(), seed=0, checkpoints=checkpoints, progress=False)
    assert resumed.losses == whole.losses
