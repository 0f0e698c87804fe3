"""The paired difference: against its formula, how far it goes, where, and that the difference of nothing is nothing."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug.errors import InvalidValueError
from artaug.training import PairedDifference
from support.training_steps import (
    PARTLY_INSIDE,
    SCHEDULES,
    batch_of,
    clean_estimate_of,
    gradients,
    mean,
    noisy_latents,
    paired_target_of,
    perturb,
    step_of,
    student_of,
    target_at_before_of,
)

each_schedule = pytest.mark.parametrize("kind", SCHEDULES)

SETTINGS = [
    {},
    {"outside_weight": 0.2},
    {"composite": True},
    {"reach": 2.0},
    {"at_before": 1.0},
    {"at_before": 0.3},
    {"at_before": 0.5, "reach": 1.5, "outside_weight": 0.2, "composite": True},
]


@each_schedule
@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_loss_and_gradient_follow_the_formula(make_model, two_pairs, kind, settings):
    objective = PairedDifference(**settings)
    with step_of(make_model(noise_schedule=SCHEDULES[kind]), kind, two_pairs, region_mask=PARTLY_INSIDE) as step:
        batch, share = step.batch, objective.at_before
        weights = torch.tensor([1.0, 0.6, 0.2, 0.2]) if "outside_weight" in settings else 1.0
        d = objective.reach * (batch.region_mask if objective.composite else 1.0) * (batch.after - batch.before)

        def reference():
            z_a = noisy_latents(kind, batch.before + d, batch)
            at_after = step.predict(z_a) - paired_target_of(kind, step.teacher_b, d, batch)
            at_before = step.predict(step.z_b) - target_at_before_of(kind, step.teacher_b, d, batch)
            return (weights * ((1 - share) * at_after**2 + share * at_before**2)).mean()

        step.assert_same(objective, reference)


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_weights_by_noise_level_are_in_the_loss_and_the_gradient_of_both_targets(make_model, two_pairs, kind):
    with step_of(make_model(noise_schedule=SCHEDULES[kind]), kind, two_pairs) as step:
        batch, snr = step.batch, 1 / step.batch.sigmas**2 - 1
        d = batch.after - batch.before

        def reference():
            at_after = step.predict(step.z_a) - paired_target_of(kind, step.teacher_b, d, batch)
            at_before = step.predict(step.z_b) - target_at_before_of(kind, step.teacher_b, d, batch)
            weights = snr.clamp(max=0.7) / (snr if kind == "epsilon" else snr + 1)
            return (weights * mean(at_after**2 + at_before**2) / 2).mean()

        step.assert_same(PairedDifference(at_before=0.5, weighting=aa.MinSNR(gamma=0.7)), reference)


# --- what the targets ask for ------------------------------------------------------------------------------------


def tensors_of(seed):
    """Clean before and after, noise and a teacher's prediction: each (3, 2, 2, 2), in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 2, 2, 2, generator=generator, dtype=torch.float64)


@each_schedule
@given(seed=st.integers(0, 2**32), sigma=st.floats(0.01, 0.99))
def test_the_clean_estimate_at_before_moves_by_the_square_of_the_level_times_the_difference(kind, seed, sigma):
    before, after, noise, teacher = tensors_of(seed)
    batch = aa.training.PairBatch(
        before=before, after=after, conditioning={}, noise=noise, sigmas=torch.full((3,), sigma, dtype=torch.float64)
    )
    z_b = noisy_latents(kind, before, batch)
    target = SCHEDULES[kind].target_at_before(teacher, after - before, batch.sigmas)
    torch.testing.assert_close(target, target_at_before_of(kind, teacher, after - before, batch))
    moved = clean_estimate_of(kind, z_b, target, batch) - clean_estimate_of(kind, z_b, teacher, batch)
    torch.testing.assert_close(moved, sigma**2 * (after - before))


@each_schedule
@given(seed=st.integers(0, 2**32))
def test_at_pure_noise_both_targets_are_the_same(kind, seed):
    before, after, _, teacher = tensors_of(seed)
    schedule, pure = SCHEDULES[kind], torch.ones(3, dtype=torch.float64)
    assert torch.equal(
        schedule.target_at_before(teacher, after - before, pure), schedule.paired_target(teacher, after - before, pure)
    )


@each_schedule
@given(seed=st.integers(0, 2**32))
def test_where_there_is_no_noise_a_picture_before_stays_as_it_is(kind, seed):
    before, after, _, teacher = tensors_of(seed)
    none = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(SCHEDULES[kind].target_at_before(teacher, after - before, none), teacher)


@each_schedule
def test_both_ends_of_the_share_at_before_are_one_target_alone(make_model, two_pairs, kind):
    model = make_model(noise_schedule=SCHEDULES[kind])
    batch = batch_of(model, two_pairs)
    with student_of(model) as student:
        perturb(student)
        at_after, at_before, both = (
            PairedDifference(at_before=share).loss(student, batch).item() for share in (0.0, 1.0, 0.25)
        )
    assert both == pytest.approx(0.75 * at_after + 0.25 * at_before, rel=1e-6)
    assert at_after != pytest.approx(at_before, rel=1e-2)


@each_schedule
@pytest.mark.parametrize("settings", [{}, {"at_before": 0.5, "composite": True}], ids=repr)
def test_a_reach_of_two_is_a_picture_after_that_is_twice_as_far(make_model, two_pairs, kind, settings):
    model = make_model(noise_schedule=SCHEDULES[kind])
    batch = batch_of(model, two_pairs, region_mask=PARTLY_INSIDE)
    further = dataclasses.replace(batch, after=batch.before + 2 * (batch.after - batch.before))
    with student_of(model) as student:
        perturb(student)
        reached = PairedDifference(reach=2.0, **settings).loss(student, batch)
        torch.testing.assert_close(reached, PairedDifference(**settings).loss(student, further))


def test_a_batch_costs_one_prediction_with_gradient_a_target_and_one_of_the_teacher(two_pairs, tiny_model):
    for share, predictions in ((0.0, 1), (0.5, 2), (1.0, 1)):
        with student_of(tiny_model) as student:
            counted = Counted(student)
            PairedDifference(at_before=share).loss(counted, batch_of(tiny_model, two_pairs))
        assert (counted.predictions, counted.of_the_teacher) == (predictions, 1)


class Counted:
    """A student that counts what it is asked."""

    def __init__(self, student):
        self.student, self.noise_schedule = student, student.noise_schedule
        self.predictions = self.of_the_teacher = 0

    def predict(self, *inputs):
        self.predictions += 1
        return self.student.predict(*inputs)

    def teacher_predict(self, *inputs):
        self.of_the_teacher += 1
        return self.student.teacher_predict(*inputs)


# --- nothing, and regions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
@each_schedule
def test_the_difference_of_nothing_is_nothing(make_model, pair_of, kind, settings, dtype):
    model = make_model(noise_schedule=SCHEDULES[kind], dtype=dtype)
    pairs = [pair_of(1, changed=False), pair_of(2, changed=False)]
    with student_of(model) as student:
        loss = PairedDifference(**settings).loss(student, batch_of(model, pairs, region_mask=PARTLY_INSIDE))
        loss.backward()
        assert loss.item() == 0.0
        assert all(gradient.count_nonzero() == 0 for gradient in gradients(student))


def test_a_changed_pair_has_a_loss_and_a_gradient(tiny_model, two_pairs):
    with student_of(tiny_model) as student:
        loss = PairedDifference().loss(student, batch_of(tiny_model, two_pairs))
        loss.backward()
        assert loss.item() > 0.01
        assert any(gradient.count_nonzero() for gradient in gradients(student))


@each_schedule
@pytest.mark.parametrize("settings", [{}, {"at_before": 0.5}, {"reach": 2.0}], ids=repr)
def test_compositing_takes_back_what_changed_outside_the_regions(make_model, two_pairs, kind, settings):
    model = make_model(noise_schedule=SCHEDULES[kind])
    batch = batch_of(model, two_pairs, region_mask=PARTLY_INSIDE)
    pasted = dataclasses.replace(
        batch, after=batch.before + PARTLY_INSIDE * (batch.after - batch.before), region_mask=None
    )
    plain = PairedDifference(**settings)
    with student_of(model) as student:
        perturb(student)
        composed = PairedDifference(composite=True, **settings).loss(student, batch)
        torch.testing.assert_close(composed, plain.loss(student, pasted))
        assert composed.item() != pytest.approx(plain.loss(student, batch).item(), rel=1e-3)


@pytest.mark.parametrize("settings", [{}, {"at_before": 0.5, "reach": 2.0}], ids=repr)
def test_a_change_outside_the_plan_is_not_learned(tiny_model, two_pairs, settings):
    batch = batch_of(tiny_model, two_pairs, region_mask=torch.zeros(2, 3, 4, 4))
    with student_of(tiny_model) as student:
        loss = PairedDifference(composite=True, **settings).loss(student, batch)
        loss.backward()
        assert loss.item() == 0.0
        assert all(gradient.count_nonzero() == 0 for gradient in gradients(student))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reach": 0.0}, r"reach=0.0\): need a finite number, above 0\."),
        ({"reach": math.nan}, r"reach=nan\): need a finite number"),
        ({"at_before": -0.1}, r"at_before=-0.1\): need a finite number, at least 0 and at most 1\."),
        ({"at_before": 1.1}, r"at_before=1.1\): need a finite number, at least 0 and at most 1\."),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InvalidValueError, match=rf"PairedDifference\({message}"):
        PairedDifference(**settings)
