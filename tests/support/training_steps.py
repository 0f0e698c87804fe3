"""One training step by hand: a batch, a student, and the formulas of the noise schedules written out once more."""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch.func import functional_call

from artaug.training import EpsilonPrediction, FlowMatching, PairBatch, VPrediction
from artaug.training.injection import inject_adapter

SCHEDULES = {"flow": FlowMatching(), "epsilon": EpsilonPrediction(), "v": VPrediction()}
PARTLY_INSIDE = torch.tensor([1.0, 0.5, 0.0, 0.0]).expand(2, 3, 4, 4)
"""The region mask of two pictures of four by four: their left column, and half of the next."""


def batch_of(model, pairs, seed=0, *, region_mask=None, rewards=None):
    generator = torch.Generator().manual_seed(seed)
    before = model.encode_images([pair.before for pair in pairs])
    return PairBatch(
        before=before.float(),
        after=model.encode_images([pair.after for pair in pairs]).float(),
        conditioning=model.encode_prompts([pair.prompt for pair in pairs]),
        noise=torch.randn(before.shape, generator=generator),
        sigmas=torch.rand(len(pairs), generator=generator),
        region_mask=region_mask,
        rewards=rewards,
    )


def student_of(model, *, targets="blocks"):
    return inject_adapter(model, rank=4, targets=targets, generator=torch.Generator().manual_seed(0))


def perturb(student):
    """Give a fresh LoRA an effect, so that student and teacher differ."""
    generator = torch.Generator().manual_seed(1)
    for factor in student.parameters():
        factor.data += 0.1 * torch.randn(factor.shape, generator=generator)


def gradients(student):
    return [factor.grad.clone() for factor in student.parameters()]


def noisy_latents(kind, clean, batch):
    s = batch.sigmas[:, None, None, None]
    return (1 - s) * clean + s * batch.noise if kind == "flow" else (1 - s**2).sqrt() * clean + s * batch.noise


def target_of(kind, clean, batch):
    s = batch.sigmas[:, None, None, None]
    return {
        "flow": batch.noise - clean,
        "epsilon": batch.noise,
        "v": (1 - s**2).sqrt() * batch.noise - s * clean,
    }[kind]


def paired_target_of(kind, teacher, difference, batch):
    s = batch.sigmas[:, None, None, None]
    return {"flow": teacher - difference, "epsilon": teacher, "v": teacher - s * difference}[kind]


def target_at_before_of(kind, teacher, difference, batch):
    s = batch.sigmas[:, None, None, None]
    move = {"flow": s, "epsilon": (1 - s**2).sqrt() * s, "v": s}[kind]
    return teacher - move * difference


def clean_estimate_of(kind, noisy, prediction, batch):
    s = batch.sigmas[:, None, None, None]
    alpha = (1 - s**2).sqrt()
    return {
        "flow": noisy - s * prediction,
        "epsilon": (noisy - s * prediction) / alpha,
        "v": alpha * noisy - s * prediction,
    }[kind]


def prediction_of(model, noisy, batch):
    """The prediction of the module itself, with the LoRA that is on it."""
    return model.module(noisy, batch.sigmas, batch.conditioning["embeds"])


@torch.no_grad()
def frozen_prediction(model, noisy, batch):
    """The prediction of the module before a LoRA is on it."""
    return prediction_of(model, noisy, batch)


def mean(errors):
    """The mean over the latents of each row: shape (batch,)."""
    return errors.flatten(1).mean(1)


@dataclass(frozen=True)
class Step:
    """A batch and a perturbed student of it, and what the papers' formulas are made of: all numbers in float64."""

    kind: str
    model: object
    student: object
    batch: PairBatch
    """In float64; its noisy latents are `z_b` and `z_a`."""
    z_b: torch.Tensor
    z_a: torch.Tensor
    teacher_b: torch.Tensor
    """The prediction for `z_b` without the LoRA."""
    teacher_a: torch.Tensor

    def predict(self, noisy, *, scale=1.0):
        """The module's own prediction, in float64 and with gradient, with the factors themselves times ``scale``."""
        scaled = {name: scale * factor for name, factor in self.model.module.named_parameters() if ".lora_B." in name}
        prompts = self.batch.conditioning["embeds"]
        inputs = (noisy.float(), self.batch.sigmas.float(), prompts)
        return functional_call(self.model.module, scaled, inputs).double()

    def assert_same(self, objective, reference, *, rel=1e-5):
        """The loss and the gradient of every factor are those of the reference, which is called without arguments."""
        losses, all_gradients = [], []
        single = float_batch(self.batch)
        for loss in (objective.loss(self.student, single), reference()):
            for factor in self.student.parameters():
                factor.grad = None
            loss.backward()
            losses.append(loss.item())
            all_gradients.append(gradients(self.student))
        assert losses[0] == pytest.approx(losses[1], rel=rel)
        for gradient, expected in zip(*all_gradients, strict=True):
            assert expected.norm() > 0
            assert (gradient - expected).norm() <= rel * expected.norm()


def float_batch(batch):
    return _to(batch, torch.float32)


def _to(batch, dtype):
    names = ("before", "after", "noise", "sigmas", "region_mask", "rewards")
    tensors = {name: getattr(batch, name) for name in names}
    moved = {name: None if tensor is None else tensor.to(dtype) for name, tensor in tensors.items()}
    return PairBatch(**moved, conditioning=batch.conditioning)


@contextmanager
def step_of(model, kind, pairs, *, region_mask=None, rewards=None):
    """One step of a model whose schedule is ``SCHEDULES[kind]``."""
    batch = _to(batch_of(model, pairs, region_mask=region_mask, rewards=rewards), torch.float64)
    model.module.eval()
    z_b, z_a = (noisy_latents(kind, clean, batch) for clean in (batch.before, batch.after))
    teacher_b, teacher_a = (frozen_prediction(model, z.float(), float_batch(batch)).double() for z in (z_b, z_a))
    with student_of(model) as student:
        perturb(student)
        yield Step(kind, model, student, batch, z_b, z_a, teacher_b, teacher_a)
