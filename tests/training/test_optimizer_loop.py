"""One run of the optimizer: gradients of all pairs, clipping, the moving average, and restoring it."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers.training_utils import EMAModel
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug.errors import ContractError, TrainingDivergedError
from artaug.training.batches import StepBatch
from artaug.training.distributed import SINGLE_PROCESS, World
from artaug.training.optimizer_loop import OptimizerLoop, ema_decay
from support.training_steps import batch_of, perturb, student_of

OBJECTIVE = aa.PairedDifference()


def rows_of(batch, start, stop):
    """Some pairs of a batch."""
    tensors = {name: getattr(batch, name)[start:stop] for name in ("before", "after", "noise", "sigmas")}
    return replace(batch, **tensors, conditioning={name: text[start:stop] for name, text in batch.conditioning.items()})


def take_step(optimizer_loop, model, micro_batches, *, number=1, world=SINGLE_PROCESS, loss=OBJECTIVE.loss, **options):
    settings = {"learning_rate": 1e-2, "max_grad_norm": math.inf, **options}
    return optimizer_loop.step(StepBatch(model, micro_batches), loss, number=number, world=world, **settings)


def sgd(student, **options):
    return torch.optim.SGD(student.parameters(), lr=0.1, **options)


def parameters_of(student):
    return [parameter.detach().clone() for parameter in student.parameters()]


@pytest.mark.parametrize("cuts", [(1,), (2,), (3,), (1, 2, 3)])
def test_micro_batches_of_any_sizes_give_the_step_of_the_batch(make_model, pair_of, cuts):
    steps = []
    for edges in ((), cuts):
        model = make_model()
        batch = batch_of(model, [pair_of(seed) for seed in range(4)])
        bounds = [0, *edges, 4]
        with student_of(model) as student:
            perturb(student)
            optimizer_loop = OptimizerLoop(student, sgd(student), ema=None)
            result = take_step(optimizer_loop, model, [rows_of(batch, *ends) for ends in pairwise(bounds)])
            steps.append((result, parameters_of(student)))
    (expected, parameters), (result, others) = steps
    assert (result.loss, result.gradient_norm) == pytest.approx((expected.loss, expected.gradient_norm), rel=1e-5)
    for parameter, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(other, parameter)


def test_processes_sum_their_parts_of_the_batch(make_model, pair_of, monkeypatch):
    """Two processes, one after the other: the first hands its tensors on, the second adds them."""
    model = make_model()
    batch = batch_of(model, [pair_of(seed) for seed in range(4)])
    with student_of(model) as student:
        perturb(student)
        before = parameters_of(student)
        expected = take_step(OptimizerLoop(student, sgd(student), ema=None), model, [batch])
        after = parameters_of(student)
        received = []

        def all_reduce(_, tensors):
            for tensor, other in zip(
                tensors, received or [torch.zeros_like(tensor) for tensor in tensors], strict=True
            ):
                tensor.add_(other)
            received[:] = [tensor.clone() for tensor in tensors]

        monkeypatch.setattr(World, "all_reduce", all_reduce)
        for rank in range(2):
            for parameter, value in zip(student.parameters(), before, strict=True):
                parameter.data = value.clone()
            part = rows_of(batch, 2 * rank, 2 * rank + 2)
            result = take_step(OptimizerLoop(student, sgd(student), ema=None), model, [part], world=World(rank, 2))
        assert result.loss == pytest.approx(expected.loss, rel=1e-5)
        for parameter, other in zip(student.parameters(), after, strict=True):
            torch.testing.assert_close(parameter.detach(), other)


def test_a_gradient_is_clipped_to_the_largest_norm_and_reported_as_it_was(tiny_model, two_pairs):
    batch = batch_of(tiny_model, two_pairs)
    with student_of(tiny_model) as student:
        perturb(student)
        optimizer_loop = OptimizerLoop(student, sgd(student), ema=None)
        before = parameters_of(student)
        result = take_step(optimizer_loop, tiny_model, [batch], learning_rate=0.5, max_grad_norm=1e-3)
        changes = [parameter.detach() - value for parameter, value in zip(student.parameters(), before, strict=True)]
    assert result.gradient_norm > 1e-2
    assert torch.cat([change.flatten() for change in changes]).norm() == pytest.approx(0.5 * 1e-3, rel=1e-3)


def test_the_moving_average_follows_its_recursion(tiny_model, two_pairs):
    batch, decay = batch_of(tiny_model, two_pairs), 0.25
    with student_of(tiny_model) as student:
        perturb(student)
        optimizer_loop = OptimizerLoop(student, sgd(student), ema=decay)
        average = parameters_of(student)
        for number in range(1, 6):
            take_step(optimizer_loop, tiny_model, [batch], number=number)
            updates = number - 1
            rising = min(decay, (1 + updates) / (10 + updates)) if updates else 0.0
            average = [
                rising * value + (1 - rising) * parameter.detach()
                for value, parameter in zip(average, student.parameters(), strict=True)
            ]
        snapshot = optimizer_loop.snapshot(export=True)
        expected = student.group_by_layer(average)
        exported = student.to_lora(expected)
    for layer, tensors in expected.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(snapshot.ema[layer][name], tensor)
        torch.testing.assert_close(snapshot.lora.layers[layer].delta(), exported.layers[layer].delta())


@given(decay=st.floats(0.01, 0.9999), path=st.lists(st.floats(-10, 10), min_size=1, max_size=30))
def test_the_moving_average_is_that_of_diffusers(decay, path):
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    reference, average = EMAModel([parameter], decay=decay), 0.0
    for updates, value in enumerate(path):
        parameter.data.fill_(value)
        reference.step([parameter])
        average = value + ema_decay(decay, updates) * (average - value)
    assert average == pytest.approx(reference.shadow_params[0].item(), abs=1e-6)


@pytest.mark.parametrize(("decay", "steps"), [(0.9, 20), (0.99, 100), (0.999, 400), (0.9999, 2000)])
def test_a_moving_average_keeps_nothing_of_the_start_and_nine_tenths_of_a_steady_change(decay, steps):
    of_start, average = 1.0, 0.0
    for updates in range(steps):
        of_start *= ema_decay(decay, updates)
        average = (updates + 1) / steps + ema_decay(decay, updates) * (average - (updates + 1) / steps)
    assert of_start == 0
    assert average > 0.75


@pytest.mark.parametrize(
    ("optimizer", "ema"),
    [(aa.AdamW(), None), (aa.AdamW(), 0.9), (aa.Prodigy(), 0.9), (aa.ScheduleFree(), None)],
    ids=repr,
)
def test_a_restored_loop_takes_the_same_step_to_the_bit(make_model, two_pairs, optimizer, ema):
    model = make_model()
    batch, ends = batch_of(model, two_pairs), []
    with student_of(model) as student:
        optimizer_loop = OptimizerLoop(student, optimizer.build(student.parameters(), learning_rate=1e-2), ema=ema)
        for number in (1, 2):
            take_step(optimizer_loop, model, [batch], number=number)
        saved = optimizer_loop.snapshot(export=False)
        assert saved.lora is None
        saved = replace(saved, optimizer=torch.utils._pytree.tree_map(copied, saved.optimizer))  # noqa: SLF001
        take_step(optimizer_loop, model, [batch], number=3)
        ends.append(optimizer_loop.snapshot(export=True))
    with student_of(model) as student:
        optimizer_loop = OptimizerLoop(student, optimizer.build(student.parameters(), learning_rate=1e-2), ema=ema)
        optimizer_loop.restore(saved.adapter, saved.ema, saved.optimizer, ema_updates=saved.ema_updates)
        take_step(optimizer_loop, model, [batch], number=3)
        ends.append(optimizer_loop.snapshot(export=True))
    never_stopped, restored = ends
    for name in ("adapter", "ema"):
        for layer, tensors in getattr(never_stopped, name).items():
            assert all(torch.equal(getattr(restored, name)[layer][part], tensor) for part, tensor in tensors.items())
    for layer, low_rank in never_stopped.lora.layers.items():
        assert torch.equal(restored.lora.layers[layer].up, low_rank.up)


def copied(value):
    """The optimizer goes on writing into the tensors of its state_dict."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def test_exporting_schedule_free_weights_does_not_change_the_training(make_model, two_pairs):
    ends = []
    for export in (False, True):
        model = make_model()
        batch = batch_of(model, two_pairs)
        with student_of(model) as student:
            optimizer = aa.ScheduleFree().build(student.parameters(), learning_rate=1e-2)
            optimizer_loop = OptimizerLoop(student, optimizer, ema=None)
            for number in (1, 2, 3):
                take_step(optimizer_loop, model, [batch], number=number)
                optimizer_loop.snapshot(export=export)
            ends.append(parameters_of(student))
    assert all(torch.equal(parameter, other) for parameter, other in zip(*ends, strict=True))


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_not_stepped_on(tiny_model, two_pairs, factor):
    batch = batch_of(tiny_model, two_pairs)
    with student_of(tiny_model) as student:
        perturb(student)
        optimizer_loop = OptimizerLoop(student, sgd(student), ema=0.5)
        before = parameters_of(student)
        with pytest.raises(TrainingDivergedError) as error:
            take_step(optimizer_loop, tiny_model, [batch], number=7, loss=lambda *args: OBJECTIVE.loss(*args) * factor)
        assert error.value.step == 7
        assert all(torch.equal(*both) for both in zip(parameters_of(student), before, strict=True))
        ema = optimizer_loop.snapshot(export=False).ema
        assert all(torch.equal(ema[layer][name], t) for layer, p in student.tensors().items() for name, t in p.items())


@pytest.mark.parametrize(
    ("spoil", "received"),
    [
        (lambda loss: loss[None], r"a tensor of shape \(1,\) with gradient"),
        (lambda loss: loss.detach(), r"a tensor of shape \(\) without gradient"),
        (lambda loss: loss.item(), r"\d\.\d+"),
        (lambda _: None, "None"),
    ],
)
def test_what_is_no_loss_is_named_as_the_objectives(tiny_model, two_pairs, spoil, received):
    def spoiled(*args):
        return spoil(OBJECTIVE.loss(*args))

    batch = batch_of(tiny_model, two_pairs)
    with student_of(tiny_model) as student:
        optimizer_loop = OptimizerLoop(student, sgd(student), ema=None)
        with pytest.raises(
            ContractError, match=rf"spoiled returned {received} for a batch of 2\. Expected a scalar tensor"
        ):
            take_step(optimizer_loop, tiny_model, [batch], loss=spoiled)
