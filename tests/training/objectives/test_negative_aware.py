"""Negative-aware fine-tuning against its paper: loss, gradient, rewards, and where it ends on a toy with a closed form."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from artaug.errors import InvalidValueError
from artaug.training import NegativeAware, PairBatch
from support.training_steps import (
    SCHEDULES,
    batch_of,
    clean_estimate_of,
    gradients,
    mean,
    perturb,
    step_of,
    student_of,
)

each_schedule = pytest.mark.parametrize("kind", SCHEDULES)
MIXED = torch.tensor([[0.2, 0.9], [0.5, 0.0]])


@each_schedule
@pytest.mark.parametrize("rewards", [None, MIXED], ids=["pairs", "rewards"])
@pytest.mark.parametrize("settings", [{}, {"beta": 0.1, "anchor": 0.3}, {"norm_guard": 0.7}], ids=repr)
def test_loss_and_gradient_follow_the_paper(make_model, two_pairs, kind, rewards, settings):
    objective = NegativeAware(**settings)
    model = make_model(noise_schedule=SCHEDULES[kind])
    with step_of(model, kind, two_pairs, rewards=rewards) as step:
        batch, beta = step.batch, objective.beta
        rewards_b, rewards_a = (0.0, 1.0) if rewards is None else batch.rewards.T

        def policy_loss(z, clean, old, reward):
            v = step.predict(z)
            positive, negative = (1 - beta) * old + beta * v, (1 + beta) * old - beta * v
            errors = []
            for implicit in (positive, negative):
                error = clean_estimate_of(kind, z, implicit, batch) - clean
                errors.append(mean(error**2) / mean(error.detach().abs()))
            longer = (v.flatten(1).norm(dim=1) / old.flatten(1).norm(dim=1) - 1).clamp(min=0)
            held = objective.anchor * mean((v - old) ** 2) + objective.norm_guard * longer**2
            return (reward * errors[0] + (1 - reward) * errors[1]) / beta + held

        def reference():
            losses = policy_loss(step.z_b, batch.before, step.teacher_b, rewards_b)
            return (losses + policy_loss(step.z_a, batch.after, step.teacher_a, rewards_a)).mean()

        step.assert_same(objective, reference)


@each_schedule
def test_without_rewards_after_has_one_of_1_and_before_of_0(make_model, two_pairs, kind):
    model = make_model(noise_schedule=SCHEDULES[kind])
    batch = batch_of(model, two_pairs)
    told = dataclasses.replace(batch, rewards=torch.tensor([[0.0, 1.0]]).expand(2, 2))
    with student_of(model) as student:
        perturb(student)
        torch.testing.assert_close(NegativeAware().loss(student, told), NegativeAware().loss(student, batch))


@each_schedule
def test_which_picture_is_called_before_makes_no_difference_where_both_have_rewards(make_model, two_pairs, kind):
    model = make_model(noise_schedule=SCHEDULES[kind])
    batch = batch_of(model, two_pairs, rewards=MIXED)
    swapped = dataclasses.replace(batch, before=batch.after, after=batch.before, rewards=batch.rewards.flip(1))
    with student_of(model) as student:
        perturb(student)
        torch.testing.assert_close(NegativeAware().loss(student, swapped), NegativeAware().loss(student, batch))


@each_schedule
def test_rewards_of_a_half_have_no_gradient_at_the_start(make_model, two_pairs, kind):
    model = make_model(noise_schedule=SCHEDULES[kind])
    with student_of(model) as student:
        NegativeAware().loss(student, batch_of(model, two_pairs, rewards=torch.full((2, 2), 0.5))).backward()
        assert all(gradient.count_nonzero() == 0 for gradient in gradients(student))


@each_schedule
def test_the_opposite_rewards_have_the_opposite_gradient_at_the_start(make_model, two_pairs, kind):
    model = make_model(noise_schedule=SCHEDULES[kind])
    found = []
    for rewards in (MIXED, 1 - MIXED):
        with student_of(model) as student:
            NegativeAware().loss(student, batch_of(model, two_pairs, rewards=rewards)).backward()
            found.append(gradients(student))
    for gradient, opposite in zip(*found, strict=True):
        torch.testing.assert_close(gradient, -opposite, rtol=1e-4, atol=1e-6)
    assert any(gradient.count_nonzero() for gradient in found[0])


@pytest.mark.parametrize("reward", [0.0, 0.3, 1.0])
def test_rewards_of_equal_pictures_that_sum_to_one_teach_nothing_at_the_start(tiny_model, pair_of, reward):
    batch = batch_of(tiny_model, [pair_of(1, changed=False)], rewards=torch.tensor([[reward, 1 - reward]]))
    with student_of(tiny_model) as student:
        NegativeAware().loss(student, batch).backward()
        assert all(gradient.abs().max() < 1e-6 for gradient in gradients(student))


class Moved:
    """A student that predicts ``offset`` beside a teacher whose velocity is ``error`` off."""

    noise_schedule = SCHEDULES["flow"]

    def __init__(self, batch, error, offset):
        self.velocity = batch.noise - batch.before + error
        self.offset = offset

    def predict(self, noisy, sigmas, conditioning, *, scale=1.0):
        return self.velocity + scale * self.offset

    def teacher_predict(self, noisy, sigmas, conditioning):
        return self.velocity


@given(seed=st.integers(0, 2**32), size=st.floats(0.01, 0.9))
def test_equal_pictures_draw_a_student_back_to_the_teacher_but_along_the_teachers_error(seed, size):
    picture, noise, error, other = torch.randn(
        4, 1, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    batch = PairBatch(before=picture, after=picture, conditioning={}, noise=noise, sigmas=torch.tensor([0.6]).double())
    across = other - (other * error).sum() / error.square().sum() * error
    pulls = []
    for direction in (across, error):
        offset = (size * direction).requires_grad_()
        NegativeAware(anchor=0.0).loss(Moved(batch, error, offset), batch).backward()
        pulls.append((offset.grad * direction).sum().item())
    assert pulls[0] > 1e-3
    assert pulls[1] == pytest.approx(0, abs=1e-9)


# --- where it ends -----------------------------------------------------------------------------------------------


class Toy:
    """The teacher estimates the mean of both pictures; the student moves that by ``x`` times their difference."""

    def __init__(self, kind, batch, x):
        self.kind, self.noise_schedule, self.batch, self.x = kind, SCHEDULES[kind], batch, x

    def predict(self, noisy, sigmas, conditioning, *, scale=1.0):
        return self._prediction_of(noisy, scale * self.x)

    def teacher_predict(self, noisy, sigmas, conditioning):
        return self._prediction_of(noisy, 0.0)

    def _prediction_of(self, noisy, x):
        """What predicts the clean estimate, solved from `clean_estimate_of`."""
        estimate = (self.batch.before + self.batch.after) / 2 + x * (self.batch.after - self.batch.before)
        s = self.batch.sigmas[:, None, None, None]
        alpha = (1 - s**2).sqrt()
        return (
            ({"flow": noisy - estimate, "epsilon": noisy - alpha * estimate, "v": alpha * noisy - estimate}[self.kind])
            / s
        )


def slope(kind, objective, seed, x, rewards=None):
    """The derivative of the loss by the toy student's ``x``."""
    before, after, noise = torch.randn(
        3, 1, 3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    batch = PairBatch(
        before=before, after=after, conditioning={}, noise=noise, sigmas=torch.tensor([0.6]).double(), rewards=rewards
    )
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    objective.loss(Toy(kind, batch, x), batch).backward()
    return x.grad.item()


@each_schedule
@given(seed=st.integers(0, 2**32), beta=st.floats(0.05, 5))
def test_it_ends_where_the_paper_says_which_is_further_the_smaller_beta_is(kind, seed, beta):
    """Theorem 3.2: ``v = v0 + 2 / beta Delta`` with ``Delta = p(good) (v+ - v0)``.

    Half of the pictures are good, and ``v+``, the mean of the good ones, is *after*, half a difference from ``v0``: so the
    student ends ``1 / (2 beta)`` of the difference from the teacher.
    """
    objective, end = NegativeAware(beta=beta, anchor=0.0), 1 / (2 * beta)
    assert slope(kind, objective, seed, 0.9 * end) < 0 < slope(kind, objective, seed, 1.1 * end)


@each_schedule
@given(seed=st.integers(0, 2**32), reward=st.floats(0.55, 1))
def test_errors_over_their_own_size_count_rewards_as_votes(kind, seed, reward):
    """Divided by its size, an error counts as its absolute value does, whose sum is least at a median, not at a mean."""
    rewards = torch.tensor([[1 - reward, reward]], dtype=torch.float64)
    objective = NegativeAware(anchor=0.0)
    assert slope(kind, objective, seed, 0.45, rewards) < 0 < slope(kind, objective, seed, 0.55, rewards)


@given(seed=st.integers(0, 2**32), anchor=st.floats(0.5, 5))
def test_the_anchor_stops_it_earlier(seed, anchor):
    plain, anchored = (slope("flow", NegativeAware(anchor=weight), seed, 0.4) for weight in (0.0, anchor))
    assert anchored > plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"beta=0.0\): need a finite number, above 0"),
        ({"beta": math.inf}, r"beta=inf\)"),
        ({"anchor": -1.0}, r"anchor=-1.0\): need a finite number, at least 0"),
        ({"norm_guard": math.nan}, r"norm_guard=nan\)"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(InvalidValueError, match=rf"NegativeAware\({message}"):
        NegativeAware(**options)
