"""One training step by hand: a batch, a student, and the formulas of the noise schedules written out once more."""

import torch

from artaug.training import EpsilonPrediction, FlowMatching, PairBatch, VPrediction
from artaug.training.student import inject_adapter

SCHEDULES = {"flow": FlowMatching(), "epsilon": EpsilonPrediction(), "v": VPrediction()}


def batch_of(model, pairs, seed=0, *, region_mask=None):
    generator = torch.Generator().manual_seed(seed)
    before = model.encode_images([pair.before for pair in pairs])
    return PairBatch(
        before=before.float(),
        after=model.encode_images([pair.after for pair in pairs]).float(),
        conditioning=model.encode_prompts([pair.prompt for pair in pairs]),
        noise=torch.randn(before.shape, generator=generator),
        sigmas=torch.rand(len(pairs), generator=generator),
        region_mask=region_mask,
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


def prediction_of(model, noisy, batch):
    """The prediction of the module itself, with the LoRA that is on it."""
    return model.module(noisy, batch.sigmas, batch.conditioning["embeds"])


@torch.no_grad()
def frozen_prediction(model, noisy, batch):
    """The prediction of the module before a LoRA is on it."""
    return prediction_of(model, noisy, batch)
