"""Predictions at several scales of a LoRA, in forward passes and where they are computed again."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from artaug.diffusion import Flux
from artaug.training import Bipolar, PairBatch, PairedDifference
from support.family_laws import family_of, picture
from support.tiny_flux import tiny_flux
from support.training_steps import batch_of, frozen_prediction, gradients, perturb, student_of


def checkpointed(model, **options):
    """Compute the blocks of a tiny model again in the backward pass."""
    for block in model.module.blocks:
        block.forward = partial(checkpoint, block.forward, **options)
    return model


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.25, 1.0, 4.0])
def test_a_prediction_at_a_scale_is_that_of_the_scaled_update_in_the_weights(make_model, two_pairs, scale):
    wrapped, plain = make_model(), make_model()
    batch = batch_of(wrapped, two_pairs)
    with student_of(wrapped) as student:
        perturb(student)
        prediction = student.predict(batch.before, batch.sigmas, batch.conditioning, scale=scale)
        lora = student.to_lora()
    for name, layer in lora.layers.items():
        plain.module.get_submodule(name).weight.data += scale * layer.delta()
    plain.module.eval()
    torch.testing.assert_close(prediction, frozen_prediction(plain, batch.before, batch), rtol=1e-4, atol=1e-5)


def test_a_scale_ends_with_its_prediction_and_with_an_exception(tiny_model, two_pairs):
    batch = batch_of(tiny_model, two_pairs)
    with student_of(tiny_model) as student:
        perturb(student)
        predict = partial(student.predict, batch.before, batch.sigmas, batch.conditioning)
        plain = predict()
        scaled = predict(scale=-0.5)
        assert torch.equal(predict(), plain)
        scaled.sum().backward()
        assert torch.equal(frozen_prediction(tiny_model, batch.before, batch), plain)
        with pytest.raises(KeyError, match="embeds"):
            student.predict(batch.before, batch.sigmas, {}, scale=-0.5)
        assert torch.equal(frozen_prediction(tiny_model, batch.before, batch), plain)


def mixed_loss(student, batch):
    """Predictions at several scales in one loss that is not a sum of theirs."""
    predict = partial(student.predict, sigmas=batch.sigmas, conditioning=batch.conditioning)
    first, second, third = predict(batch.before), predict(batch.after, scale=-1.0), predict(batch.before, scale=0.25)
    return (first * second).mean() + (third - first.detach()).square().mean()


@pytest.mark.parametrize(
    ("loss", "reentrant"),
    [(mixed_loss, False), (mixed_loss, True), (Bipolar().loss, False)],
    ids=["mixed", "mixed, reentrant", "Bipolar"],
)
def test_layers_that_are_computed_again_are_computed_at_their_own_scale(make_model, two_pairs, loss, reentrant):
    found = []
    for model in (make_model(), checkpointed(make_model(), use_reentrant=reentrant)):
        batch = batch_of(model, two_pairs)
        with student_of(model, targets="blocks|proj_in") as student:
            perturb(student)
            loss(student, batch).backward()
            found.append(gradients(student))
            assert {layer.scaling["artaug"] for layer in student.wrapped.values()} == {1.0}
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-8)


def flux_gradients(*, checkpoints, sequential):
    flux = family_of(Flux, tiny_flux())
    if checkpoints:
        flux.module.enable_gradient_checkpointing()
    before, after = flux.encode_images([picture(1), picture(2)]).split(1)
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    prompt, sigmas = flux.encode_prompts(["a red barn"]), torch.tensor([0.6])
    with student_of(flux, targets=r"blocks.*(attn|ff)") as student:
        perturb(student)
        if sequential:
            objective = PairedDifference()
            batch = PairBatch(before=before, after=after, conditioning=prompt, noise=noise, sigmas=sigmas)
            reversed_batch = PairBatch(before=after, after=before, conditioning=prompt, noise=noise, sigmas=sigmas)
            for direction, scale in ((batch, 1.0), (reversed_batch, -1.0)):
                (objective.loss(ScaledStudent(student, scale), direction) / 2).backward()
        else:
            batch = PairBatch(before=before, after=after, conditioning=prompt, noise=noise, sigmas=sigmas)
            Bipolar().loss(student, batch).backward()
        return gradients(student)


class ScaledStudent:
    """A student at a scale, with which one backward pass is done before the next prediction begins."""

    def __init__(self, student, scale):
        self.noise_schedule, self.teacher_predict = student.noise_schedule, student.teacher_predict
        self.predict = partial(student.predict, scale=scale)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_real_transformer_has_the_gradient_of_both_directions(checkpoints):
    expected = flux_gradients(checkpoints=False, sequential=True)
    gradient = flux_gradients(checkpoints=checkpoints, sequential=False)
    assert any(layer.count_nonzero() for layer in expected)
    for layer, other in zip(expected, gradient, strict=True):
        torch.testing.assert_close(other, layer, rtol=1e-4, atol=1e-7)
