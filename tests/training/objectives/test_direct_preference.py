"""Direct preference against its formula, and how far it goes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import softplus

from artaug.errors import InvalidValueError
from artaug.training import DirectPreference, FlowMatching, PairBatch, SupervisedFineTuning
from artaug.training.objectives.direct_preference import safe_scale
from support.training_steps import (
    PARTLY_INSIDE,
    SCHEDULES,
    batch_of,
    gradients,
    mean,
    perturb,
    step_of,
    student_of,
    target_of,
)

each_schedule = pytest.mark.parametrize("kind", SCHEDULES)


@each_schedule
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"outside_weight": 0.2, "anchor": 0.1},
        {"norm_guard": 0.7},
        {"safeguard": 0.0},
        {"safeguard": 0.5, "outside_weight": 0.2},
        {"safeguard": 1.0, "norm_guard": 0.7, "beta": 20.0},
    ],
    ids=repr,
)
def test_loss_and_gradient_follow_the_papers(make_model, two_pairs, kind, settings):
    objective = DirectPreference(**{"beta": 3.0, **settings})
    weights = torch.tensor([1.0, 0.6, 0.2, 0.2]) if objective.outside_weight == 0.2 else 1.0
    with step_of(make_model(noise_schedule=SCHEDULES[kind]), kind, two_pairs, region_mask=PARTLY_INSIDE) as step:
        y_b, y_a = (target_of(kind, clean, step.batch) for clean in (step.batch.before, step.batch.after))
        half = objective.beta / 2

        def reference():
            v_b, v_a = step.predict(step.z_b), step.predict(step.z_a)
            error_b, error_a = mean(weights * (v_b - y_b) ** 2), mean(weights * (v_a - y_a) ** 2)
            frozen_b, frozen_a = (
                mean(weights * (step.teacher_b - y_b) ** 2),
                mean(weights * (step.teacher_a - y_a) ** 2),
            )
            loss = softplus(-half * ((frozen_a - error_a) - (frozen_b - error_b)))
            if objective.safeguard is not None:
                # The gradient of the loss by the margin, times that of the margin, in which before counts lambda times.
                scale = papers_scale(error_a, error_b, v_a, v_b, objective.safeguard)
                slope = half * (1 - torch.exp(-loss.detach()))
                loss = with_gradient_of(loss, slope * (error_a - scale * error_b))
            held = mean((v_b - step.teacher_b) ** 2) + mean((v_a - step.teacher_a) ** 2)
            longer = excess(v_b, step.teacher_b) ** 2 + excess(v_a, step.teacher_a) ** 2
            return (loss + half * (objective.anchor * held + objective.norm_guard * longer)).mean()

        step.assert_same(objective, reference)


def papers_scale(error_a, error_b, v_a, v_b, mu):
    """Equation 16 of arXiv 2511.03317, with the gradients of both errors by the predictions, pair by pair."""
    (g_a,), (g_b,) = (
        torch.autograd.grad(error.sum(), prediction, retain_graph=True)
        for error, prediction in ((error_a, v_a), (error_b, v_b))
    )
    dot, norm2 = (g_a * g_b).sum((1, 2, 3)), g_a.square().sum((1, 2, 3))
    return torch.tensor([min(1.0, (1 - mu) * n / d) if d > 0 else 1.0 for n, d in zip(norm2, dot, strict=True)])


def with_gradient_of(value, other):
    return value.detach() + other - other.detach()


def excess(prediction, teacher):
    """How much longer than the teacher's a prediction is, as a part of the teacher's; 0 if it is shorter."""
    lengths = [tensor.square().sum((1, 2, 3)).sqrt() for tensor in (prediction, teacher)]
    return (lengths[0] / lengths[1] - 1).clamp(min=0)


# --- safeguards --------------------------------------------------------------------------------------------------


def residuals_of(seed, shared):
    """Residuals at after and before, (4, 3, 2, 2), with ``shared`` of one in the other."""
    generator = torch.Generator().manual_seed(seed)
    after, other = torch.randn(2, 4, 3, 2, 2, generator=generator, dtype=torch.float64)
    return after, shared * after + 3 * other


@given(seed=st.integers(0, 2**32), shared=st.floats(-10, 10), safeguard=st.floats(0, 1))
def test_the_safeguard_keeps_its_share_of_the_descent_of_after(seed, shared, safeguard):
    """To first order, a step along ``-g_a + scale g_b`` changes the error of after by its product with ``g_a``."""
    after, before = residuals_of(seed, shared)
    scale = safe_scale(after, before, safeguard)
    assert ((scale >= 0) & (scale <= 1)).all()
    step = -after + scale[:, None, None, None] * before
    change, descent = (step * after).sum((1, 2, 3)), after.square().sum((1, 2, 3))
    assert (change <= -safeguard * descent + 1e-9 * descent).all()


@given(seed=st.integers(0, 2**32), shared=st.floats(-10, 10), safeguard=st.floats(0, 0.99))
def test_the_safeguard_takes_no_more_of_before_than_it_has_to(seed, shared, safeguard):
    after, before = residuals_of(seed, shared)
    scale = safe_scale(after, before, safeguard)
    change = ((-after + scale[:, None, None, None] * before) * after).sum((1, 2, 3))
    limit = -safeguard * after.square().sum((1, 2, 3))
    assert ((scale == 1) | torch.isclose(change, limit)).all()


@given(seed=st.integers(0, 2**32), safeguard=st.floats(0, 1))
def test_a_before_that_does_not_pull_against_after_is_left_alone(seed, safeguard):
    after, other = residuals_of(seed, 0.0)
    along = (after * other).sum((1, 2, 3), keepdim=True)
    assert (safe_scale(after, -other * along.sign(), safeguard) == 1).all()


def test_the_safeguard_is_each_pairs_own():
    after, before = residuals_of(3, 2.0)
    alone = [safe_scale(after[[row]], before[[row]], 0.5).item() for row in range(4)]
    assert safe_scale(after, before, 0.5).tolist() == pytest.approx(alone)
    assert len(set(alone)) == 4


@each_schedule
@pytest.mark.parametrize("safeguard", [0.0, 0.5, 1.0])
def test_a_safeguard_changes_the_gradient_and_not_the_loss(make_model, two_pairs, kind, safeguard):
    model = make_model(noise_schedule=SCHEDULES[kind])
    batch = batch_of(model, two_pairs)
    with student_of(model) as student:
        perturb(student)
        plain, guarded = (
            loss_and_gradients(student, DirectPreference(safeguard=value), batch) for value in (None, safeguard)
        )
    assert guarded[0] == plain[0]
    if safeguard == 1.0:  # nothing that pulls against after is left, so the gradients differ
        assert not all(torch.equal(gradient, other) for gradient, other in zip(guarded[1], plain[1], strict=True))


def loss_and_gradients(student, objective, batch):
    for factor in student.parameters():
        factor.grad = None
    loss = objective.loss(student, batch)
    loss.backward()
    return loss.item(), gradients(student)


def test_with_the_whole_safeguard_equal_pictures_are_fine_tuned_on(tiny_model, pair_of):
    """The law of nothing does not hold: of two gradients that cancel, the safeguard takes a part of one away."""
    batch = batch_of(tiny_model, [pair_of(1, changed=False)])
    with student_of(tiny_model) as student:
        _, guarded = loss_and_gradients(student, DirectPreference(safeguard=1.0), batch)
        _, tuned = loss_and_gradients(student, SupervisedFineTuning(), batch)
    for gradient, other in zip(guarded, tuned, strict=True):
        torch.testing.assert_close(gradient, 20 / 4 * other)  # beta / 2, and the slope of -log sigmoid at 0


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
