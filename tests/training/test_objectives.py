"""Objectives against references of a few lines, and their training plans."""

import dataclasses
import math

import pytest
import torch

from artaug.errors import InvalidValueError
from artaug.training import (
    DirectPreference,
    Objective,
    PairBatch,
    PairedDifference,
    Stage,
    SupervisedFineTuning,
    TrainingPlan,
    TwoStage,
)
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


def mask_of(*columns):
    """The region mask of two pictures of four by four, by columns."""
    return torch.tensor(columns).expand(2, 3, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise_schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_difference_of_nothing_is_nothing(make_model, pair_of, noise_schedule, dtype):
    model = make_model(noise_schedule=noise_schedule, dtype=dtype)
    batch = batch_of(model, [pair_of(1, changed=False), pair_of(2, changed=False)])
    with student_of(model) as student:
        loss = PairedDifference().loss(student, batch)
        loss.backward()
        assert loss.item() == 0.0
        assert all(factor.grad.count_nonzero() == 0 for factor in student.parameters())


def test_a_changed_pair_has_a_loss_and_a_gradient(tiny_model, two_pairs):
    with student_of(tiny_model) as student:
        loss = PairedDifference().loss(student, batch_of(tiny_model, two_pairs))
        loss.backward()
        assert loss.item() > 0.01
        assert any(factor.grad.count_nonzero() for factor in student.parameters())


@each_schedule
def test_paired_difference_follows_its_formula(make_model, two_pairs, kind):
    model = make_model(noise_schedule=SCHEDULES[kind])
    batch = batch_of(model, two_pairs)
    model.module.eval()
    teacher = frozen_prediction(model, noisy_latents(kind, batch.before, batch), batch)
    target = paired_target_of(kind, teacher, batch.after - batch.before, batch)
    with student_of(model) as student:
        perturb(student)
        expected = (prediction_of(model, noisy_latents(kind, batch.after, batch), batch) - target).square().mean()
        assert PairedDifference().loss(student, batch).item() == pytest.approx(expected.item(), rel=1e-5)


@each_schedule
def test_paired_difference_weights_errors_outside_the_regions(make_model, two_pairs, kind):
    model = make_model(noise_schedule=SCHEDULES[kind])
    mask = mask_of(1.0, 0.5, 0.0, 0.0)
    batch = batch_of(model, two_pairs, region_mask=mask)
    model.module.eval()
    teacher = frozen_prediction(model, noisy_latents(kind, batch.before, batch), batch)
    target = paired_target_of(kind, teacher, batch.after - batch.before, batch)
    with student_of(model) as student:
        perturb(student)
        errors = (prediction_of(model, noisy_latents(kind, batch.after, batch), batch) - target).square()
        expected = (errors * torch.tensor([1.0, 0.6, 0.2, 0.2])).mean()
        assert PairedDifference(outside_weight=0.2).loss(student, batch).item() == pytest.approx(
            expected.item(), rel=1e-5
        )


@pytest.mark.parametrize(
    "objective", [PairedDifference(outside_weight=0.2), SupervisedFineTuning(outside_weight=0.2)], ids=repr
)
def test_regions_that_broadcast_are_the_same_regions(tiny_model, two_pairs, objective):
    full, broadcast = (
        batch_of(tiny_model, two_pairs, region_mask=mask)
        for mask in (mask_of(1.0, 0.5, 0.0, 0.0), torch.tensor([1.0, 0.5, 0.0, 0.0]).expand(2, 1, 1, 4))
    )
    with student_of(tiny_model) as student:
        perturb(student)
        assert torch.equal(objective.loss(student, full), objective.loss(student, broadcast))


@each_schedule
def test_compositing_takes_back_what_changed_outside_the_regions(make_model, two_pairs, kind):
    model = make_model(noise_schedule=SCHEDULES[kind])
    mask = mask_of(1.0, 0.5, 0.0, 0.0)
    batch = batch_of(model, two_pairs, region_mask=mask)
    pasted = dataclasses.replace(batch, after=batch.before + mask * (batch.after - batch.before), region_mask=None)
    with student_of(model) as student:
        perturb(student)
        composed = PairedDifference(composite=True).loss(student, batch)
        torch.testing.assert_close(composed, PairedDifference().loss(student, pasted))
        assert composed.item() != pytest.approx(PairedDifference().loss(student, batch).item(), rel=1e-3)


@each_schedule
@pytest.mark.parametrize(
    "objective", [PairedDifference(outside_weight=0.3), PairedDifference(composite=True)], ids=repr
)
def test_the_difference_of_nothing_is_nothing_in_regions_too(make_model, pair_of, kind, objective):
    model = make_model(noise_schedule=SCHEDULES[kind])
    pairs = [pair_of(1, changed=False), pair_of(2, changed=False)]
    with student_of(model) as student:
        loss = objective.loss(student, batch_of(model, pairs, region_mask=mask_of(1.0, 0.5, 0.0, 0.0)))
        loss.backward()
        assert loss.item() == 0.0
        assert all(gradient.count_nonzero() == 0 for gradient in gradients(student))


def test_a_change_outside_the_plan_is_not_learned(tiny_model, two_pairs):
    batch = batch_of(tiny_model, two_pairs, region_mask=mask_of(0.0, 0.0, 0.0, 0.0))
    with student_of(tiny_model) as student:
        loss = PairedDifference(composite=True).loss(student, batch)
        loss.backward()
        assert loss.item() == 0.0
        assert all(gradient.count_nonzero() == 0 for gradient in gradients(student))


@pytest.mark.parametrize(
    "objective", [PairedDifference(outside_weight=0.3, composite=True), SupervisedFineTuning(outside_weight=0.3)]
)
def test_without_regions_everything_counts_as_inside(tiny_model, two_pairs, objective):
    batch = batch_of(tiny_model, two_pairs)
    plain = dataclasses.replace(objective, outside_weight=1.0)
    with student_of(tiny_model) as student:
        perturb(student)
        assert torch.equal(objective.loss(student, batch), plain.loss(student, batch))


@pytest.mark.parametrize("outside_weight", [-0.1, math.inf, math.nan])
@pytest.mark.parametrize("kind", [PairedDifference, SupervisedFineTuning])
def test_a_weight_out_of_range_is_refused(kind, outside_weight):
    with pytest.raises(
        InvalidValueError, match=rf"{kind.__name__}\(outside_weight=.*need a finite weight of at least 0"
    ):
        kind(outside_weight=outside_weight)


@each_schedule
@pytest.mark.parametrize(
    "objective", [SupervisedFineTuning(), SupervisedFineTuning(outside_weight=0.2), TwoStage()], ids=repr
)
def test_fine_tuning_follows_its_formula(make_model, two_pairs, objective, kind):
    model = make_model(noise_schedule=SCHEDULES[kind])
    batch = batch_of(model, two_pairs, region_mask=mask_of(1.0, 0.5, 0.0, 0.0))
    weights = torch.tensor([1.0, 0.6, 0.2, 0.2]) if objective == SupervisedFineTuning(outside_weight=0.2) else 1.0
    with student_of(model) as student:
        perturb(student)
        prediction = prediction_of(model, noisy_latents(kind, batch.after, batch), batch)
        expected = (weights * (prediction - target_of(kind, batch.after, batch)) ** 2).mean()
        assert objective.loss(student, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_copying_stage_fine_tunes_on_the_pictures_before(tiny_model, two_pairs):
    batch = batch_of(tiny_model, two_pairs)
    reversed_batch = PairBatch(
        before=batch.after, after=batch.before, conditioning=batch.conditioning, noise=batch.noise, sigmas=batch.sigmas
    )
    copy_stage, _ = TwoStage().training_plan(2).stages
    with student_of(tiny_model) as student:
        assert torch.equal(copy_stage.loss(student, batch), SupervisedFineTuning().loss(student, reversed_batch))


def test_the_teacher_is_the_model_without_the_lora(tiny_model, two_pairs):
    batch = batch_of(tiny_model, two_pairs)
    plain = tiny_model.module.eval()(batch.before, batch.sigmas, batch.conditioning["embeds"])
    with student_of(tiny_model) as student:
        perturb(student)
        inputs = (batch.before, batch.sigmas, batch.conditioning)
        assert torch.equal(student.teacher_predict(*inputs), plain)
        assert not student.teacher_predict(*inputs).requires_grad
        assert not torch.equal(student.predict(*inputs), plain)
        assert student.predict(*inputs).requires_grad


def test_a_users_objective_is_one_method(tiny_model, two_pairs):
    class Pull(Objective):
        def loss(self, model, batch):
            return model.predict(batch.after, batch.sigmas, batch.conditioning).square().mean()

    with student_of(tiny_model) as student:
        assert Pull().loss(student, batch_of(tiny_model, two_pairs)).requires_grad
    assert Pull().training_plan(3).groups == ((0, 1, 2),)


@pytest.mark.parametrize("objective", [PairedDifference(), SupervisedFineTuning(), TwoStage(per_pair=False)], ids=repr)
def test_pairs_are_learned_together_by_default(objective):
    assert objective.training_plan(3).groups == ((0, 1, 2),)


def test_the_papers_recipe_learns_every_pair_alone_in_two_stages():
    plan = TwoStage(copy_fraction=0.25).training_plan(3)
    assert plan.groups == ((0,), (1,), (2,))
    assert [stage.share for stage in plan.stages] == [0.25, 0.75]


@pytest.mark.parametrize("copy_fraction", [0.0, 1.0, -1.0, float("nan")])
def test_two_stages_need_a_share_of_the_steps_each(copy_fraction):
    with pytest.raises(InvalidValueError, match="above 0 and below 1"):
        TwoStage(copy_fraction=copy_fraction)


@pytest.mark.parametrize(
    ("groups", "shares"),
    [((), (1.0,)), (((),), (1.0,)), (((0,), ()), (1.0,)), (((0,),), ()), (((0,),), (0.0,)), (((0,),), (1.0, 0.0))],
)
def test_a_training_plan_without_groups_or_stages_is_refused(groups, shares):
    with pytest.raises(InvalidValueError, match="a TrainingPlan needs at least one group"):
        TrainingPlan(groups, tuple(Stage(PairedDifference().loss, share) for share in shares))


@pytest.mark.parametrize("objective", [PairedDifference(), SupervisedFineTuning(), DirectPreference()], ids=repr)
def test_by_default_errors_count_the_same_inside_and_outside_the_regions(tiny_model, two_pairs, objective):
    batch = batch_of(tiny_model, two_pairs)
    with_regions = dataclasses.replace(batch, region_mask=mask_of(1.0, 0.5, 0.0, 0.0))
    with student_of(tiny_model) as student:
        perturb(student)
        assert torch.equal(objective.loss(student, with_regions), objective.loss(student, batch))


@pytest.mark.parametrize(
    ("outside_weight", "expected"),
    [(0.0, [1.0, 0.5, 0.0, 0.0]), (0.5, [1.0, 0.75, 0.5, 0.5]), (1.0, None), (2.0, [1.0, 1.5, 2.0, 2.0])],
)
def test_the_weight_of_an_error_is_linear_in_the_region_mask(tiny_model, two_pairs, outside_weight, expected):
    weights = batch_of(tiny_model, two_pairs, region_mask=mask_of(1.0, 0.5, 0.0, 0.0)).loss_weights(outside_weight)
    assert (None if weights is None else weights[0, 0, 0].tolist()) == expected


@pytest.mark.parametrize("kind", [PairedDifference, SupervisedFineTuning, DirectPreference])
def test_errors_outside_the_regions_may_count_nothing(kind):
    assert kind(outside_weight=0.0).outside_weight == 0


def test_by_default_both_stages_take_half_of_the_steps_and_pairs_are_learned_alone():
    training_plan = TwoStage().training_plan(2)
    assert [stage.share for stage in training_plan.stages] == [0.5, 0.5]
    assert training_plan.groups == ((0,), (1,))
