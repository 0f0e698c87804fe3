"""What all objectives share: regions, training plans, the teacher, and one method of a user's own."""

import dataclasses
import math

import pytest
import torch

from artaug.errors import InvalidValueError
from artaug.training import (
    DirectPreference,
    Objective,
    PairedDifference,
    Stage,
    SupervisedFineTuning,
    TrainingPlan,
    TwoStage,
)
from support.training_steps import PARTLY_INSIDE, batch_of, perturb, student_of


@pytest.mark.parametrize(
    "objective", [PairedDifference(outside_weight=0.2), SupervisedFineTuning(outside_weight=0.2)], ids=repr
)
def test_regions_that_broadcast_are_the_same_regions(tiny_model, two_pairs, objective):
    full, broadcast = (
        batch_of(tiny_model, two_pairs, region_mask=mask)
        for mask in (PARTLY_INSIDE, torch.tensor([1.0, 0.5, 0.0, 0.0]).expand(2, 1, 1, 4))
    )
    with student_of(tiny_model) as student:
        perturb(student)
        assert torch.equal(objective.loss(student, full), objective.loss(student, broadcast))


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
    with_regions = dataclasses.replace(batch, region_mask=PARTLY_INSIDE)
    with student_of(tiny_model) as student:
        perturb(student)
        assert torch.equal(objective.loss(student, with_regions), objective.loss(student, batch))


@pytest.mark.parametrize(
    ("outside_weight", "expected"),
    [(0.0, [1.0, 0.5, 0.0, 0.0]), (0.5, [1.0, 0.75, 0.5, 0.5]), (1.0, None), (2.0, [1.0, 1.5, 2.0, 2.0])],
)
def test_the_weight_of_an_error_is_linear_in_the_region_mask(tiny_model, two_pairs, outside_weight, expected):
    weights = batch_of(tiny_model, two_pairs, region_mask=PARTLY_INSIDE).loss_weights(outside_weight)
    assert (None if weights is None else weights[0, 0, 0].tolist()) == expected


@pytest.mark.parametrize("kind", [PairedDifference, SupervisedFineTuning, DirectPreference])
def test_errors_outside_the_regions_may_count_nothing(kind):
    assert kind(outside_weight=0.0).outside_weight == 0
