"""Plain fine-tuning against its formula."""

import pytest
import torch

import artaug as aa
from artaug.training import SupervisedFineTuning
from support.training_steps import PARTLY_INSIDE, SCHEDULES, mean, step_of, target_of


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("outside_weight", [1.0, 0.2])
def test_loss_and_gradient_follow_the_formula(make_model, two_pairs, kind, outside_weight):
    weights = torch.tensor([1.0, 0.6, 0.2, 0.2]) if outside_weight == 0.2 else 1.0
    with step_of(make_model(noise_schedule=SCHEDULES[kind]), kind, two_pairs, region_mask=PARTLY_INSIDE) as step:

        def reference():
            errors = (step.predict(step.z_a) - target_of(kind, step.batch.after, step.batch)) ** 2
            return (weights * errors).mean()

        step.assert_same(SupervisedFineTuning(outside_weight=outside_weight), reference)


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_weights_by_noise_level_are_in_the_loss_and_the_gradient(make_model, two_pairs, kind):
    with step_of(make_model(noise_schedule=SCHEDULES[kind]), kind, two_pairs) as step:
        snr = 1 / step.batch.sigmas**2 - 1

        def reference():
            errors = mean((step.predict(step.z_a) - target_of(kind, step.batch.after, step.batch)) ** 2)
            return (snr.clamp(max=0.7) / (snr if kind == "epsilon" else snr + 1) * errors).mean()

        step.assert_same(SupervisedFineTuning(weighting=aa.MinSNR(gamma=0.7)), reference)
