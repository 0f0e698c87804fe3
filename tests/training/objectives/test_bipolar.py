"""Sliders: both directions of one objective, at opposite scales."""

import dataclasses
import math

import pytest
import torch

from artaug.errors import InvalidValueError
from artaug.training import Bipolar, DirectPreference, NegativeAware, PairedDifference, SupervisedFineTuning, TwoStage
from support.training_steps import (
    SCHEDULES,
    batch_of,
    gradients,
    noisy_latents,
    paired_target_of,
    perturb,
    step_of,
    student_of,
    target_at_before_of,
    target_of,
)

each_schedule = pytest.mark.parametrize("kind", SCHEDULES)


@each_schedule
@pytest.mark.parametrize(("scale", "settings"), [(0.25, {}), (1.0, {"at_before": 0.5, "reach": 2.0})], ids=repr)
def test_both_directions_of_the_paired_difference_follow_the_formula(make_model, two_pairs, kind, scale, settings):
    with step_of(make_model(noise_schedule=SCHEDULES[kind]), kind, two_pairs) as step:
        share, d = settings.get("at_before", 0.0), step.batch.after - step.batch.before

        def direction(sign, start, z_start, teacher):
            move = sign * settings.get("reach", 1.0) * d
            z_end = noisy_latents(kind, start + move, step.batch)
            at_end = step.predict(z_end, scale=sign * scale) - paired_target_of(kind, teacher, move, step.batch)
            at_start = step.predict(z_start, scale=sign * scale) - target_at_before_of(kind, teacher, move, step.batch)
            return ((1 - share) * at_end**2 + share * at_start**2).mean()

        def reference():
            forward = direction(1, step.batch.before, step.z_b, step.teacher_b)
            return (forward + direction(-1, step.batch.after, step.z_a, step.teacher_a)) / 2

        step.assert_same(Bipolar(objective=PairedDifference(**settings), scale=scale), reference)


@each_schedule
def test_both_directions_of_fine_tuning_are_visual_sliders(make_model, two_pairs, kind):
    with step_of(make_model(noise_schedule=SCHEDULES[kind]), kind, two_pairs) as step:

        def reference():
            forward = step.predict(step.z_a) - target_of(kind, step.batch.after, step.batch)
            backward = step.predict(step.z_b, scale=-1.0) - target_of(kind, step.batch.before, step.batch)
            return (forward.square().mean() + backward.square().mean()) / 2

        step.assert_same(Bipolar(objective=SupervisedFineTuning()), reference)


@each_schedule
def test_rewards_of_the_other_direction_are_what_the_first_ones_lack(make_model, two_pairs, kind):
    model = make_model(noise_schedule=SCHEDULES[kind])
    slider = Bipolar(objective=NegativeAware(anchor=0.0))
    with student_of(model) as student:
        perturb(student)
        plain = slider.loss(student, batch_of(model, two_pairs))
        rewarded = slider.loss(student, batch_of(model, two_pairs, rewards=torch.tensor([[0.0, 1.0]] * 2)))
        torch.testing.assert_close(rewarded, plain)  # (0, 1) is what a pair without rewards has
        batch = batch_of(model, two_pairs, rewards=torch.tensor([[0.2, 0.7], [0.9, 0.3]]))
        turned = dataclasses.replace(batch, before=batch.after, after=batch.before, rewards=1 - batch.rewards.flip(1))
        loss = slider.loss(student, batch)
        for up in student.parameters()[1::2]:
            up.data.neg_()
        torch.testing.assert_close(slider.loss(student, turned), loss)


@each_schedule
def test_a_slider_of_rewards_asks_the_same_of_both_directions(make_model, two_pairs, kind):
    model = make_model(noise_schedule=SCHEDULES[kind])
    objective = NegativeAware(anchor=0.0)
    batch = batch_of(model, two_pairs, rewards=torch.tensor([[0.2, 0.7], [0.9, 0.3]]))
    with student_of(model) as student:  # at the start, where only what is linear in the LoRA counts
        Bipolar(objective=objective).loss(student, batch).backward()
        both = gradients(student)
        for parameter in student.parameters():
            parameter.grad = None
        objective.loss(student, batch).backward()
        for gradient, alone in zip(both, gradients(student), strict=True):
            torch.testing.assert_close(gradient, alone, rtol=1e-4, atol=1e-7)


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


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_out_of_range_is_refused(scale):
    with pytest.raises(InvalidValueError, match="need a finite scale above 0"):
        Bipolar(scale=scale)


def test_an_objective_of_several_stages_cannot_be_reversed():
    with pytest.raises(
        InvalidValueError, match="an objective with a training plan of its own, or a companion, cannot be reversed"
    ):
        Bipolar(objective=TwoStage())


def test_a_reversed_slider_of_rewards_has_each_pictures_opposite_reward(tiny_model, two_pairs):
    objective = Bipolar(objective=NegativeAware())
    batch = batch_of(tiny_model, two_pairs, rewards=torch.tensor([[0.2, 0.9], [0.5, 0.0]]))
    reversed_batch = dataclasses.replace(
        batch, before=batch.after, after=batch.before, rewards=torch.tensor([[0.1, 0.8], [1.0, 0.5]])
    )
    with student_of(tiny_model) as student:
        perturb(student)
        loss = objective.loss(student, batch)
        for up in student.parameters()[1::2]:
            up.data.neg_()
        torch.testing.assert_close(objective.loss(student, reversed_batch), loss)
