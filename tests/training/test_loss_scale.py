"""Loss scaling of float16 models: torch's rule, undone exactly, and steps that overflow are skipped."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug.errors import TrainingDivergedError
from artaug.training import loss_scale
from artaug.training.batches import StepBatch
from artaug.training.distributed import SINGLE_PROCESS, World
from artaug.training.loss_scale import LossScale, computes_in_float16
from artaug.training.optimizer_loop import OptimizerLoop
from support.tiny_unet import tiny_sd15
from support.training_steps import batch_of, gradients, perturb, student_of

MANY_LATENTS = 1e-6
"""The gradient of a mean over the latents of large pictures, beside that of a tiny model's."""
CPU = torch.device("cpu")


def small_loss(student, batch):
    return aa.PairedDifference().loss(student, batch) * MANY_LATENTS


def rows_of(batch, rows):
    tensors = {name: getattr(batch, name)[rows] for name in ("before", "after", "noise", "sigmas")}
    return replace(batch, **tensors, conditioning={name: text[rows] for name, text in batch.conditioning.items()})


def step_of(loop, model, micro_batches, *, number=1, loss=small_loss, max_grad_norm=math.inf, world=SINGLE_PROCESS):
    batch = StepBatch(model, micro_batches)
    return loop.step(batch, loss, number=number, learning_rate=0.1, max_grad_norm=max_grad_norm, world=world)


def loop_of(student, scale, **options):
    return OptimizerLoop(student, torch.optim.SGD(student.parameters(), lr=0.1), loss_scale=scale, **options)


def spoil(number):
    """A loss of which only the gradient is not finite."""

    def loss(student, batch):
        value = small_loss(student, batch)
        value.register_hook(lambda gradient: gradient * number)
        return value

    return loss


@given(overflows=st.lists(st.booleans(), max_size=40))
def test_the_scale_follows_torchs_own_rule(overflows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scale, "_GROWTH_INTERVAL", 3)
        scaler, scale = torch.amp.GradScaler("cpu", growth_interval=3), LossScale()
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=0.0)
        for overflow in overflows:
            assert scale.value == scaler.get_scale()
            scaler.scale(parameter.sum() * (math.inf if overflow else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scale = scale.after_overflow() if overflow else scale.after_step()
        assert scale.value == scaler.get_scale()
        assert scale.skipped_steps == sum(overflows)


@pytest.mark.parametrize("cuts", [[slice(0, 4)], [slice(0, 1), slice(1, 4)]], ids=["one batch", "micro batches"])
def test_small_gradients_of_a_float16_model_are_kept(make_model, pair_of, cuts):
    found = {}
    for name, dtype, scale in [
        ("exact", torch.float32, None),
        ("scaled", torch.float16, LossScale()),
        ("plain", torch.float16, None),
    ]:
        model = make_model(dtype=torch.float16)
        model.module, model.dtype = model.module.to(dtype), dtype  # the same weights
        batch = batch_of(model, [pair_of(seed) for seed in range(4)])
        with student_of(model) as student:
            perturb(student)
            step_of(loop_of(student, scale, ema=None), model, [rows_of(batch, rows) for rows in cuts])
            found[name] = torch.cat([gradient.flatten() for gradient in gradients(student)]).double()
    error = {name: float((value - found["exact"]).norm() / found["exact"].norm()) for name, value in found.items()}
    assert error["scaled"] < 0.02
    assert error["plain"] > 0.2  # what the scale is for


@pytest.mark.parametrize("max_grad_norm", [math.inf, 1e-8])
def test_the_scale_is_undone_to_the_bit_before_anything_is_clipped(make_model, two_pairs, max_grad_norm):
    ends = []
    for scale in (None, LossScale(value=2.0**40)):
        model = make_model()
        batch = batch_of(model, two_pairs)
        with student_of(model) as student:
            perturb(student)
            result = step_of(loop_of(student, scale, ema=None), model, [batch], max_grad_norm=max_grad_norm)
            ends.append((result.loss, result.gradient_norm, student.tensors()))
    (loss, norm, tensors), (other_loss, other_norm, other_tensors) = ends
    assert (loss, norm) == (other_loss, other_norm)
    for layer, parts in tensors.items():
        assert all(torch.equal(tensor, other_tensors[layer][name]) for name, tensor in parts.items())


@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_a_step_that_overflows_is_skipped_and_leaves_everything_but_the_scale(make_model, two_pairs, number):
    model = make_model(dtype=torch.float16)
    batch = batch_of(model, two_pairs)
    with student_of(model) as student:
        loop = OptimizerLoop(
            student, aa.AdamW().build(student.parameters(), learning_rate=0.1), ema=0.5, loss_scale=LossScale()
        )
        before = loop.snapshot(export=False)
        skipped = step_of(loop, model, [batch], loss=spoil(number))
        after = loop.snapshot(export=False)
        taken = step_of(loop, model, [batch], number=2)
    assert (skipped.is_skipped, skipped.loss_scale) == (True, 2.0**16)
    assert math.isfinite(skipped.loss)
    assert (taken.is_skipped, taken.loss_scale) == (False, 2.0**15)
    assert after.loss_scale == LossScale(value=2.0**15, skipped_steps=1)
    assert (after.optimizer["state"], after.ema_updates) == ({}, 0)
    for name in ("adapter", "ema"):
        for layer, parts in getattr(before, name).items():
            assert all(torch.equal(getattr(after, name)[layer][part], tensor) for part, tensor in parts.items())


def test_an_overflow_in_one_process_skips_the_step_in_all(make_model, two_pairs, monkeypatch):
    def all_reduce(_, tensors):
        tensors[1].fill_(math.inf)  # the sum with what another process has

    monkeypatch.setattr(World, "all_reduce", all_reduce)
    model = make_model(dtype=torch.float16)
    with student_of(model) as student:
        loop = loop_of(student, LossScale(), ema=None)
        assert step_of(loop, model, [batch_of(model, two_pairs)], world=World(0, 2)).is_skipped


@pytest.mark.parametrize("scale", [None, LossScale(value=1.0)], ids=["not scaled", "least scale"])
def test_a_gradient_that_no_smaller_scale_can_mend_ends_the_training(make_model, two_pairs, scale):
    model = make_model()
    with student_of(model) as student, pytest.raises(TrainingDivergedError, match=r"gradient norm.*bfloat16"):
        step_of(loop_of(student, scale, ema=None), model, [batch_of(model, two_pairs)], loss=spoil(math.inf))


def test_a_loss_that_overflows_is_not_blamed_on_the_scale(make_model, two_pairs):
    model = make_model(dtype=torch.float16)
    with student_of(model) as student:
        loop = loop_of(student, LossScale(), ema=None)
        with pytest.raises(TrainingDivergedError, match="the loss was inf"):
            step_of(loop, model, [batch_of(model, two_pairs)], loss=lambda *args: small_loss(*args) * math.inf)


class Overflowing(aa.Objective):
    """Overflows float16 until the scale is low enough."""

    def loss(self, model, batch):
        value = aa.PairedDifference().loss(model, batch)
        value.register_hook(lambda gradient: gradient * (math.inf if gradient.abs() > 2.0**13 else 1.0))
        return value


@pytest.mark.parametrize("objective", [Overflowing(), aa.TwoStage(per_pair=False)], ids=["overflowing", "two stages"])
def test_a_resumed_float16_training_goes_on_with_its_scale(tmp_path, make_model, two_pairs, objective):
    trainer = aa.DifferentialLoRATrainer(rank=4, steps=10, batch_size=2, objective=objective, ema=0.9)
    events = []
    whole = trainer.train(two_pairs, make_model(dtype=torch.float16), seed=3, on_step=events.append)
    checkpoints = aa.Checkpoints(folder=tmp_path, every=2)

    def stop(event):
        if event.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.train(two_pairs, make_model(dtype=torch.float16), seed=3, checkpoints=checkpoints, on_step=stop)
    rest = []
    resumed = trainer.train(
        two_pairs, make_model(dtype=torch.float16), seed=3, checkpoints=checkpoints, on_step=rest.append
    )
    assert [event.loss_scale for event in rest] == [event.loss_scale for event in events[4:]]
    assert (resumed.losses, resumed.skipped_steps) == (whole.losses, whole.skipped_steps)
    assert all(torch.equal(layer.up, resumed.lora.layers[name].up) for name, layer in whole.lora.layers.items())


def test_skipped_steps_are_counted_reported_and_warned_of(make_model, two_pairs, caplog):
    trainer = aa.DifferentialLoRATrainer(rank=4, steps=10, batch_size=1, objective=Overflowing())
    events = []
    training = trainer.train(two_pairs, make_model(dtype=torch.float16), seed=0, on_step=events.append)
    assert training.skipped_steps == 3
    assert [event.loss_scale for event in events] == [2.0**16, 2.0**15, 2.0**14, *[2.0**13] * 7]
    assert [event.is_skipped for event in events] == [True] * 3 + [False] * 7
    assert "3 of 10 steps overflowed float16" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_models_are_not_scaled(make_model, two_pairs, dtype):
    events = []
    trainer = aa.DifferentialLoRATrainer(rank=4, steps=1, batch_size=1)
    trainer.train(two_pairs, make_model(dtype=dtype), seed=0, on_step=events.append)
    assert [event.loss_scale for event in events] == [None]


def test_float16_is_found_wherever_a_model_computes_in_it():
    layer = torch.nn.Linear(2, 2)
    assert not computes_in_float16(layer, CPU)
    assert not computes_in_float16(torch.nn.Linear(2, 2).to(torch.bfloat16), CPU)
    with torch.autocast("cpu", torch.float16):
        assert computes_in_float16(layer, CPU)
    layer.compute_dtype = torch.float16  # bitsandbytes' name
    assert computes_in_float16(layer, CPU)
    unet = tiny_sd15().unet.to(torch.float16)
    assert computes_in_float16(unet, CPU)
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float16)
    assert computes_in_float16(unet, CPU)
