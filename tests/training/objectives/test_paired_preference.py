"""Preference along the paired difference: against its formula, its kinship with DPO, and how far it goes."""

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import softplus

from artaug.errors import InvalidValueError
from artaug.training import DirectPreference, FlowMatching, PairBatch, PairedPreference
from support.training_steps import (
    PARTLY_INSIDE,
    SCHEDULES,
    batch_of,
    gradients,
    mean,
    paired_target_of,
    perturb,
    step_of,
    student_of,
)

each_schedule = pytest.mark.parametrize("kind", SCHEDULES)


@each_schedule
@pytest.mark.parametrize(
    "settings", [{}, {"beta": 2.0, "anchor": 0.3}, {"outside_weight": 0.2}, {"norm_guard": 4.0}], ids=repr
)
def test_loss_and_gradient_follow_the_formula(make_model, two_pairs, kind, settings):
    objective = PairedPreference(**settings)
    with step_of(make_model(noise_schedule=SCHEDULES[kind]), kind, two_pairs, region_mask=PARTLY_INSIDE) as step:
        weights = torch.tensor([1.0, 0.6, 0.2, 0.2]) if "outside_weight" in settings else 1.0
        d = step.batch.after - step.batch.before
        edit = paired_target_of(kind, step.teacher_b, d, step.batch) - step.teacher_a

        def reference():
            v_a, v_b = step.predict(step.z_a), step.predict(step.z_b)
            u_a, u_b = v_a - step.teacher_a, v_b - step.teacher_b
            margin, distance = mean(weights * (u_a + u_b) * edit), mean(u_a**2 + u_b**2)
            half = objective.beta / 2
            excess = sum(
                (v.flatten(1).norm(dim=1) / v0.flatten(1).norm(dim=1) - 1).clamp(min=0) ** 2
                for v, v0 in ((v_a, step.teacher_a), (v_b, step.teacher_b))
            )
            held = objective.anchor * distance + objective.norm_guard * excess
            return (softplus(-half * margin) + half * held).mean()

        step.assert_same(objective, reference)


@each_schedule
def test_compositing_takes_back_what_changed_outside_the_regions(make_model, two_pairs, kind):
    model = make_model(noise_schedule=SCHEDULES[kind])
    batch = batch_of(model, two_pairs, region_mask=PARTLY_INSIDE)
    after = batch.before + PARTLY_INSIDE * (batch.after - batch.before)
    pasted = dataclasses.replace(batch, after=after, region_mask=None)
    with student_of(model) as student:
        perturb(student)
        composed = PairedPreference(composite=True).loss(student, batch)
        assert torch.equal(composed, PairedPreference().loss(student, pasted))
        assert not torch.equal(composed, PairedPreference().loss(student, batch))


@each_schedule
def test_equal_pictures_teach_nothing_and_hold_the_student_to_the_teacher(make_model, pair_of, kind):
    model = make_model(noise_schedule=SCHEDULES[kind])
    batch = batch_of(model, [pair_of(1, changed=False), pair_of(2, changed=False)])
    with student_of(model) as student:
        loss = PairedPreference().loss(student, batch)
        loss.backward()
        assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
        assert all(gradient.count_nonzero() == 0 for gradient in gradients(student))
        perturb(student)
        assert PairedPreference().loss(student, batch) > loss


@dataclasses.dataclass(frozen=True, eq=False)
class Mover:
    """A flow model that knows nothing of a picture, and adds the same to its prediction everywhere."""

    added: torch.Tensor
    noise_schedule: FlowMatching = dataclasses.field(default_factory=FlowMatching)

    def predict(self, noisy, sigmas, conditioning, *, scale=1.0):
        return self.teacher_predict(noisy, sigmas, conditioning) + scale * self.added

    def teacher_predict(self, noisy, sigmas, conditioning):
        return noisy.sin()


def a_batch():
    generator = torch.Generator().manual_seed(0)
    before, difference, noise = (torch.randn(3, 64, generator=generator, dtype=torch.float64) for _ in range(3))
    return PairBatch(
        before=before,
        after=before + 0.5 * difference,
        conditioning={},
        noise=noise,
        sigmas=torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64),
    )


def test_where_the_student_adds_the_same_at_both_pictures_it_is_dpo():
    batch = a_batch()
    generator = torch.Generator().manual_seed(1)
    added = torch.randn(3, 64, generator=generator, dtype=torch.float64)
    ours = PairedPreference(beta=7.0, anchor=0.2).loss(Mover(added), batch)
    assert ours.item() == pytest.approx(DirectPreference(beta=7.0, anchor=0.2).loss(Mover(added), batch).item())


@pytest.mark.parametrize("anchor", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("beta", [0.01, 5.0, 50.0])
def test_the_edit_is_learned_as_far_as_the_anchor_lets_it(anchor, beta):
    batch = a_batch()
    one = PairBatch(
        **{name: getattr(batch, name)[1:2] for name in ("before", "after", "noise", "sigmas")}, conditioning={}
    )
    z_b, z_a = (FlowMatching().add_noise(clean, one.noise, one.sigmas) for clean in (one.before, one.after))
    edit = z_b.sin() - (one.after - one.before) - z_a.sin()
    steps = torch.linspace(0, 6, 1201, dtype=torch.float64)
    losses = [PairedPreference(beta=beta, anchor=anchor).loss(Mover(x * edit), one).item() for x in steps]
    x = steps[losses.index(min(losses))].item()
    size = edit.square().mean().item()
    assert 1 / (1 + math.exp(beta * x * size)) == pytest.approx(2 * anchor * x, abs=0.01)
    assert x <= 1 / (4 * anchor) + 0.005
    if beta == 0.01:
        assert x == pytest.approx(1 / (4 * anchor), rel=0.02)


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": math.inf}, {"anchor": 0.0}, {"anchor": math.nan}])
def test_weights_out_of_range_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(InvalidValueError, match=rf"PairedPreference\({name}={value}\): need a finite number, above 0"):
        PairedPreference(**options)


@pytest.mark.parametrize("name", ["outside_weight", "norm_guard"])
def test_weights_below_zero_are_refused(name):
    with pytest.raises(InvalidValueError, match=rf"PairedPreference\({name}=-1"):
        PairedPreference(**{name: -1.0})
