"""The paper's recipe: each stage against its formula, and how the steps are divided."""

import pytest

import artaug as aa
from artaug.errors import InvalidValueError
from artaug.training import FlowMatching, TwoStage
from support.training_steps import SCHEDULES, mean, step_of, target_of


class StageOf:
    """One stage of a training, in the place of an objective."""

    def __init__(self, objective, number):
        self.loss = objective.training_plan(2).stages[number].loss


@pytest.mark.parametrize("kind", SCHEDULES)
def test_loss_and_gradient_of_both_stages_follow_the_formula(make_model, two_pairs, kind):
    with step_of(make_model(noise_schedule=SCHEDULES[kind]), kind, two_pairs) as step:

        def copy():
            return (step.predict(step.z_b) - target_of(kind, step.batch.before, step.batch)).square().mean()

        def learn():
            return (step.predict(step.z_a) - target_of(kind, step.batch.after, step.batch)).square().mean()

        step.assert_same(StageOf(TwoStage(), 0), copy)
        step.assert_same(StageOf(TwoStage(), 1), learn)


def test_weights_by_noise_level_are_in_the_loss_and_the_gradient_of_both_stages(make_model, two_pairs):
    with step_of(make_model(noise_schedule=FlowMatching()), "flow", two_pairs) as step:
        weights = aa.BellShaped().weights(FlowMatching(), step.batch.sigmas)
        objective = TwoStage(weighting=aa.BellShaped())
        for number, (noisy, clean) in enumerate(((step.z_b, step.batch.before), (step.z_a, step.batch.after))):

            def reference(noisy=noisy, clean=clean):
                return (weights * mean((step.predict(noisy) - (step.batch.noise - clean)) ** 2)).mean()

            step.assert_same(StageOf(objective, number), reference)


def test_the_papers_recipe_learns_every_pair_alone_in_two_stages():
    plan = TwoStage(copy_fraction=0.25).training_plan(3)
    assert plan.groups == ((0,), (1,), (2,))
    assert [stage.share for stage in plan.stages] == [0.25, 0.75]


def test_by_default_both_stages_take_half_of_the_steps_and_pairs_are_learned_alone():
    training_plan = TwoStage().training_plan(2)
    assert [stage.share for stage in training_plan.stages] == [0.5, 0.5]
    assert training_plan.groups == ((0,), (1,))


@pytest.mark.parametrize("copy_fraction", [0.0, 1.0, -1.0, float("nan")])
def test_two_stages_need_a_share_of_the_steps_each(copy_fraction):
    with pytest.raises(InvalidValueError, match="above 0 and below 1"):
        TwoStage(copy_fraction=copy_fraction)
