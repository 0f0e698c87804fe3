"""Sliders: both directions of one objective, at opposite scales."""

import dataclasses
import math

import pytest
import torch

from artaug.errors import InvalidValueError
from artaug.training import Bipolar, DirectPreference, PairedDifference, SupervisedFineTuning, TwoStage
from support.training_steps import (
    SCHEDULES,
    batch_of,
    frozen_prediction,
    gradients,
    noisy_latents,
    paired_target_of,
    perturb,
    prediction_of,
    student_of,
    target_of,
)

each_schedule = pytest.mark.parametrize("kind", SCHEDULES)


def at_scale(student, scale, predict):
    """The prediction with the factors themselves scaled."""
    kept = [factor.data.clone() for factor in student.parameters()]
    for up in student.parameters()[1::2]:
        up.data *= scale
    prediction = predict()
    for factor, was in zip(student.parameters(), kept, strict=True):
        factor.data = was
    return prediction.detach()


@each_schedule
def test_both_directions_of_the_paired_difference_follow_the_formula(make_model, two_pairs, kind):
    model = make_model(noise_schedule=SCHEDULES[kind])
    batch = batch_of(model, two_pairs)
    model.module.eval()
    z_before, z_after = noisy_latents(kind, batch.before, batch), noisy_latents(kind, batch.after, batch)
    forward_target = paired_target_of(
        kind, frozen_prediction(model, z_before, batch), batch.after - batch.before, batch
    )
    backward_target = paired_target_of(
        kind, frozen_prediction(model, z_after, batch), batch.before - batch.after, batch
    )
    with student_of(model) as student:
        perturb(student)
        forward = at_scale(student, 0.25, lambda: prediction_of(model, z_after, batch))
        backward = at_scale(student, -0.25, lambda: prediction_of(model, z_before, batch))
        expected = ((forward - forward_target).square().mean() + (backward - backward_target).square().mean()) / 2
        assert Bipolar(scale=0.25).loss(student, batch).item() == pytest.approx(expected.item(), rel=1e-5)


@each_schedule
def test_both_directions_of_fine_tuning_are_visual_sliders(make_model, two_pairs, kind):
    model = make_model(noise_schedule=SCHEDULES[kind])
    batch = batch_of(model, two_pairs)
    with student_of(model) as student:
        perturb(student)
        z_before, z_after = noisy_latents(kind, batch.before, batch), noisy_latents(kind, batch.after, batch)
        forward = at_scale(student, 1.0, lambda: prediction_of(model, z_after, batch))
        backward = at_scale(student, -1.0, lambda: prediction_of(model, z_before, batch))
        forward_target, backward_target = target_of(kind, batch.after, batch), target_of(kind, batch.before, batch)
        expected = ((forward - forward_target).square().mean() + (backward - backward_target).square().mean()) / 2
        assert Bipolar(objective=SupervisedFineTuning()).loss(student, batch).item() == pytest.approx(
            expected.item(), rel=1e-5
        )


@each_schedule
def test_a_slider_of_nothing_is_nothing(make_model, pair_of, kind):
    model = make_model(noise_schedule=SCHEDULES[kind])
    with student_of(model) as student:
        loss = Bipolar().loss(student, batch_of(model, [pair_of(1, changed=False), pair_of(2, changed=False)]))
        loss.backward()
        assert loss.item() == 0.0
        assert all(gradient.count_nonzero() == 0 for gradient in gradients(student))


@pytest.mark.parametrize("objective", [PairedDifference(), SupervisedFineTuning(), DirectPreference()], ids=repr)
def test_a_reversed_slider_is_the_slider_of_the_reversed_pairs(tiny_model, two_pairs, objective):
    batch = batch_of(tiny_model, two_pairs)
    reversed_batch = dataclasses.replace(batch, before=batch.after, after=batch.before)
    with student_of(tiny_model) as student:
        perturb(student)
        loss = Bipolar(objective=objective).loss(student, batch)
        for up in student.parameters()[1::2]:
            up.data.neg_()
        torch.testing.assert_close(Bipolar(objective=objective).loss(student, reversed_batch), loss)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_gradient_is_the_sum_of_two_backward_passes(tiny_model, two_pairs, scale):
    batch = batch_of(tiny_model, two_pairs)
    reversed_batch = dataclasses.replace(batch, before=batch.after, after=batch.before)
    with student_of(tiny_model) as student:
        perturb(student)
        Bipolar(scale=scale).loss(student, batch).backward()
        together = gradients(student)
        for factor in student.parameters():
            factor.grad = None
        noise_schedule = student.noise_schedule
        for direction, sign_scale in ((batch, scale), (reversed_batch, -scale)):
            noisy = noise_schedule.add_noise(direction.after, direction.noise, direction.sigmas)
            teacher = student.teacher_predict(
                noise_schedule.add_noise(direction.before, direction.noise, direction.sigmas),
                direction.sigmas,
                direction.conditioning,
            )
            target = noise_schedule.paired_target(teacher, direction.after - direction.before, direction.sigmas)
            learned = student.predict(noisy, direction.sigmas, direction.conditioning, scale=sign_scale)
            ((learned - target).square().mean() / 2).backward()
        for gradient, other in zip(together, gradients(student), strict=True):
            torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_out_of_range_is_refused(scale):
    with pytest.raises(InvalidValueError, match="need a finite scale above 0"):
        Bipolar(scale=scale)


def test_an_objective_of_several_stages_cannot_be_reversed():
    with pytest.raises(InvalidValueError, match="an objective with a training plan of its own cannot be reversed"):
        Bipolar(objective=TwoStage())
