"""Direct preference against its formula, and how far it goes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import softplus

from artaug.errors import InvalidValueError
from artaug.training import DirectPreference, FlowMatching, PairBatch
from support.training_steps import (
    SCHEDULES,
    batch_of,
    frozen_prediction,
    gradients,
    noisy_latents,
    perturb,
    prediction_of,
    student_of,
    target_of,
)

each_schedule = pytest.mark.parametrize("kind", SCHEDULES)


@each_schedule
@pytest.mark.parametrize("outside_weight", [1.0, 0.2])
def test_direct_preference_follows_its_formula(make_model, two_pairs, kind, outside_weight):
    model = make_model(noise_schedule=SCHEDULES[kind])
    mask = torch.tensor([1.0, 0.5, 0.0, 0.0]).expand(2, 3, 4, 4)
    batch = batch_of(model, two_pairs, region_mask=mask)
    weights = outside_weight + (1 - outside_weight) * mask
    model.module.eval()
    z = {name: noisy_latents(kind, getattr(batch, name), batch) for name in ("after", "before")}
    y = {name: target_of(kind, getattr(batch, name), batch) for name in z}
    reference = {name: frozen_prediction(model, z[name], batch) for name in z}
    with student_of(model) as student:
        perturb(student)
        policy = {name: prediction_of(model, z[name], batch) for name in z}
        policy_errors, reference_errors = (
            {name: (weights * (prediction[name] - y[name]) ** 2).mean(dim=(1, 2, 3)) for name in z}
            for prediction in (policy, reference)
        )
        preference = (
            reference_errors["after"] - policy_errors["after"] + policy_errors["before"] - reference_errors["before"]
        )
        distance = sum(((policy[name] - reference[name]) ** 2).mean(dim=(1, 2, 3)) for name in z)
        expected = (softplus(-3.0 / 2 * preference) + 0.1 * 3.0 / 2 * distance).mean()
        loss = DirectPreference(beta=3.0, anchor=0.1, outside_weight=outside_weight).loss(student, batch)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@each_schedule
@pytest.mark.parametrize("beta", [20.0, 5000.0])
def test_training_starts_without_a_preference_and_with_a_gradient_towards_one(make_model, two_pairs, kind, beta):
    model = make_model(noise_schedule=SCHEDULES[kind])
    objective, batch = DirectPreference(beta=beta), batch_of(model, two_pairs)
    with student_of(model) as student:
        loss = objective.loss(student, batch)
        assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
        loss.backward()
        assert any(gradient.count_nonzero() for gradient in gradients(student))
        for factor in student.parameters():
            factor.data -= 1e-2 / beta * factor.grad
        assert objective.loss(student, batch) < loss


def test_an_unchanged_pair_has_no_preference_and_is_held_to_the_teacher(tiny_model, pair_of):
    batch = batch_of(tiny_model, [pair_of(1, changed=False)])
    with student_of(tiny_model) as student:
        loss = DirectPreference().loss(student, batch)
        loss.backward()
        assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
        assert all(gradient.abs().max() < 1e-6 for gradient in gradients(student))
        perturb(student)
        assert DirectPreference().loss(student, batch) > loss
        assert DirectPreference(anchor=0.0).loss(student, batch).item() == pytest.approx(math.log(2), abs=1e-6)


class Mover:
    """A student that moves its clean estimate by ``x`` times the difference, and whose teacher sees no difference."""

    noise_schedule = FlowMatching()

    def __init__(self, difference, x):
        self.difference, self.x = difference, x

    def predict(self, noisy, sigmas, conditioning, *, scale=1.0):
        return torch.ones_like(noisy) - scale * self.x * self.difference

    def teacher_predict(self, noisy, sigmas, conditioning):
        return torch.ones_like(noisy)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@given(seed=st.integers(0, 2**32), beta=st.floats(1.0, 20.0), anchor=st.floats(0.05, 0.2))
def test_the_anchor_decides_how_far_to_go(seed, beta, anchor):
    generator = torch.Generator().manual_seed(seed)
    before, after, noise = torch.randn(3, 1, 64, generator=generator, dtype=torch.float64)
    batch = PairBatch(before=before, after=after, conditioning={}, noise=noise, sigmas=torch.tensor([0.6]).double())
    m = (after - before).square().mean().item()
    low, high = 0.0, 6.0  # where sigmoid(-beta m x) = 2 anchor x, by bisection
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if sigmoid(-beta * m * middle) > 2 * anchor * middle else (low, middle)
    x = torch.tensor(low, dtype=torch.float64, requires_grad=True)
    DirectPreference(beta=beta, anchor=anchor).loss(Mover(after - before, x), batch).backward()
    assert x.grad.abs() < 1e-6 * beta * m


def test_the_defaults_go_as_far_as_the_edit_where_pairs_differ_as_much_as_is_usual():
    difference = torch.full((1, 64), 0.2**0.5)
    batch = PairBatch(
        before=torch.zeros(1, 64),
        after=difference,
        conditioning={},
        noise=torch.ones(1, 64),
        sigmas=torch.tensor([0.6]),
    )
    losses = [DirectPreference().loss(Mover(difference, torch.tensor(x / 20)), batch).item() for x in range(60)]
    assert losses.index(min(losses)) / 20 == pytest.approx(1.0, abs=0.051)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0},
        {"beta": math.inf},
        {"anchor": -1.0},
        {"anchor": math.nan},
        {"norm_guard": -1.0},
        {"safeguard": 1.5},
    ],
)
def test_weights_out_of_range_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(InvalidValueError, match=rf"DirectPreference\({name}={value}\): need a finite number"):
        DirectPreference(**options)


def test_an_outside_weight_below_zero_is_refused():
    with pytest.raises(InvalidValueError, match=r"DirectPreference\(outside_weight=-1"):
        DirectPreference(outside_weight=-1.0)
