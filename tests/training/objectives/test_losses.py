"""The parts that objectives share: NormGuard's penalty."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug.training.objectives.losses import norm_excess

seeds = st.integers(0, 2**32)


def predictions_of(seed, length):
    """A teacher's predictions, (4, 3, 2, 2), and others that are ``length`` times as long, turned."""
    generator = torch.Generator().manual_seed(seed)
    teacher, other = torch.randn(2, 4, 3, 2, 2, generator=generator, dtype=torch.float64)
    norms = [tensor.flatten(1).norm(dim=1)[:, None, None, None] for tensor in (teacher, other)]
    return teacher, (length * norms[0] / norms[1] * other).requires_grad_()


@given(seed=seeds, length=st.floats(0, 0.999))
def test_a_prediction_that_is_no_longer_than_the_teachers_costs_nothing(seed, length):
    teacher, prediction = predictions_of(seed, length)
    norm_excess(prediction, teacher).sum().backward()
    assert norm_excess(prediction, teacher).eq(0).all()
    assert prediction.grad.count_nonzero() == 0


@given(seed=seeds, length=st.floats(1.001, 10))
def test_a_longer_one_costs_the_square_of_its_excess_and_is_pulled_towards_zero(seed, length):
    teacher, prediction = predictions_of(seed, length)
    penalty = norm_excess(prediction, teacher)
    torch.testing.assert_close(penalty, torch.full((4,), (length - 1) ** 2, dtype=torch.float64))
    penalty.sum().backward()
    # d (|v| / |v0| - 1)^2 / dv = 2 (|v| / |v0| - 1) v / (|v| |v0|): along v alone, so that its direction stays.
    norms = teacher.flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(prediction.grad, 2 * (length - 1) / (length * norms**2) * prediction.detach())


@given(seed=seeds, length=st.floats(0.1, 10), unit=st.floats(1e-3, 1e3))
def test_the_penalty_has_no_unit(seed, length, unit):
    teacher, prediction = predictions_of(seed, length)
    torch.testing.assert_close(norm_excess(unit * prediction, unit * teacher), norm_excess(prediction, teacher))


def test_the_teachers_own_prediction_costs_nothing_and_has_no_gradient():
    teacher, _ = predictions_of(0, 1.0)
    prediction = teacher.clone().requires_grad_()
    norm_excess(prediction, teacher).sum().backward()
    assert norm_excess(prediction, teacher).eq(0).all()
    assert prediction.grad.count_nonzero() == 0


@pytest.mark.parametrize("objective", [aa.DirectPreference(), aa.NegativeAware()], ids=repr)
def test_without_a_norm_guard_a_model_that_predicts_zeros_can_be_trained(objective):
    """A freshly built transformer may end in zeros, than which every prediction is infinitely longer."""

    class FromZero:
        noise_schedule = aa.training.FlowMatching()
        factor = torch.full((1, 4), 0.1, requires_grad=True)

        def predict(self, noisy, sigmas, conditioning, *, scale=1.0):
            return scale * self.factor.expand(noisy.shape)

        def teacher_predict(self, noisy, sigmas, conditioning):
            return torch.zeros_like(noisy)

    ones = torch.ones(2, 4)
    batch = aa.training.PairBatch(
        before=-ones, after=ones, conditioning={}, noise=0 * ones, sigmas=torch.full((2,), 0.5)
    )
    loss = objective.loss(FromZero(), batch)
    loss.backward()
    assert loss.isfinite()
    assert FromZero.factor.grad.isfinite().all()
