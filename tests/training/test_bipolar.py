"""Sliders: two turns of one objective, at opposite scales."""

import dataclasses
import math

import pytest
import torch

from artaug.errors import InvalidValueError
from artaug.training import Bipolar, DirectPreference, PairedDifference, SupervisedFineTuning, TwoStage
from support.training_steps import (
    NOISINGS,
    asked,
    asked_plainly,
    batch_of,
    disturb,
    gradients,
    moved,
    noised,
    student_of,
    wanted,
)

every_noising = pytest.mark.parametrize("kind", NOISINGS)


def at_scale(student, scale, ask):
    """Ask with the factors themselves scaled."""
    kept = [factor.data.clone() for factor in student.parameters()]
    for up in student.parameters()[1::2]:
        up.data *= scale
    told = ask()
    for factor, was in zip(student.parameters(), kept, strict=True):
        factor.data = was
    return told.detach()


@every_noising
def test_paired_turns_are_what_the_formula_says(make_model, two_pairs, kind):
    model = make_model(noise_schedule=NOISINGS[kind])
    batch = batch_of(model, two_pairs)
    model.module.eval()
    z_before, z_after = noised(kind, batch.before, batch), noised(kind, batch.after, batch)
    there = moved(kind, asked_plainly(model, z_before, batch), batch.after - batch.before, batch)
    back = moved(kind, asked_plainly(model, z_after, batch), batch.before - batch.after, batch)
    with student_of(model) as student:
        disturb(student)
        forwards = at_scale(student, 0.25, lambda: asked(model, z_after, batch))
        backwards = at_scale(student, -0.25, lambda: asked(model, z_before, batch))
        expected = ((forwards - there).square().mean() + (backwards - back).square().mean()) / 2
        assert Bipolar(scale=0.25).loss(student, batch).item() == pytest.approx(expected.item(), rel=1e-5)


@every_noising
def test_fine_tuning_turns_are_visual_sliders(make_model, two_pairs, kind):
    model = make_model(noise_schedule=NOISINGS[kind])
    batch = batch_of(model, two_pairs)
    with student_of(model) as student:
        disturb(student)
        z_before, z_after = noised(kind, batch.before, batch), noised(kind, batch.after, batch)
        forwards = at_scale(student, 1.0, lambda: asked(model, z_after, batch))
        backwards = at_scale(student, -1.0, lambda: asked(model, z_before, batch))
        there, back = wanted(kind, batch.after, batch), wanted(kind, batch.before, batch)
        expected = ((forwards - there).square().mean() + (backwards - back).square().mean()) / 2
        assert Bipolar(objective=SupervisedFineTuning()).loss(student, batch).item() == pytest.approx(
            expected.item(), rel=1e-5
        )


@every_noising
def test_a_slider_of_nothing_is_nothing(make_model, pair_of, kind):
    model = make_model(noise_schedule=NOISINGS[kind])
    with student_of(model) as student:
        loss = Bipolar().loss(student, batch_of(model, [pair_of(1, changed=False), pair_of(2, changed=False)]))
        loss.backward()
        assert loss.item() == 0.0
        assert all(gradient.count_nonzero() == 0 for gradient in gradients(student))


@pytest.mark.parametrize("of", [PairedDifference(), SupervisedFineTuning(), DirectPreference()], ids=repr)
def test_a_slider_turned_round_is_the_slider_of_the_pairs_turned_round(tiny_model, two_pairs, of):
    batch = batch_of(tiny_model, two_pairs)
    mirrored = dataclasses.replace(batch, before=batch.after, after=batch.before)
    with student_of(tiny_model) as student:
        disturb(student)
        loss = Bipolar(objective=of).loss(student, batch)
        for up in student.parameters()[1::2]:
            up.data.neg_()
        torch.testing.assert_close(Bipolar(objective=of).loss(student, mirrored), loss)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_gradient_is_the_sum_of_two_backward_passes(tiny_model, two_pairs, scale):
    batch = batch_of(tiny_model, two_pairs)
    mirrored = dataclasses.replace(batch, before=batch.after, after=batch.before)
    with student_of(tiny_model) as student:
        disturb(student)
        Bipolar(scale=scale).loss(student, batch).backward()
        together = gradients(student)
        for factor in student.parameters():
            factor.grad = None
        noise_schedule = student.noise_schedule
        for one, worn in ((batch, scale), (mirrored, -scale)):
            noisy = noise_schedule.add_noise(one.after, one.noise, one.sigmas)
            teacher = student.teacher_predict(
                noise_schedule.add_noise(one.before, one.noise, one.sigmas), one.sigmas, one.conditioning
            )
            target = noise_schedule.paired_target(teacher, one.after - one.before, one.sigmas)
            learned = student.predict(noisy, one.sigmas, one.conditioning, scale=worn)
            ((learned - target).square().mean() / 2).backward()
        for one, other in zip(together, gradients(student), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(InvalidValueError, match="need a finite scale above 0"):
        Bipolar(scale=scale)


def test_an_objective_of_several_stages_cannot_be_reversed():
    with pytest.raises(InvalidValueError, match="an objective with a training plan of its own cannot be reversed"):
        Bipolar(objective=TwoStage())
