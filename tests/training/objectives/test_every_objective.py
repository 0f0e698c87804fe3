"""Laws of every objective: what equal pictures teach, what is not finite stops, memory is saved without another result."""

import dataclasses

import pytest
import torch
from PIL import Image, ImageChops

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer
from artaug.errors import TrainingDivergedError
from support.tiny_flux import TINY_SIZE, tiny_flux
from support.training_steps import SCHEDULES, batch_of, gradients, perturb, student_of

each_schedule = pytest.mark.parametrize("kind", SCHEDULES)

TEACH_NOTHING = [
    aa.PairedDifference(),
    aa.PairedDifference(reach=2.0, at_before=0.5),
    aa.Bipolar(),
    aa.Bipolar(objective=aa.SupervisedFineTuning()),
    aa.Bipolar(objective=aa.DirectPreference(safeguard=0.5)),
    aa.PairedPreference(),
    aa.DirectPreference(),
    aa.DirectPreference(safeguard=0.0, norm_guard=1.0),
    aa.NegativeAware(),
    aa.NegativeAware(beta=0.3, norm_guard=1.0),
]
TEACH_THE_PICTURE = [
    aa.SupervisedFineTuning(),
    aa.TwoStage(),
    aa.DirectPreference(safeguard=0.5),
]
OBJECTIVES = [*TEACH_NOTHING, *TEACH_THE_PICTURE]
ASK_SEVERAL_TIMES = [
    aa.PairedDifference(at_before=0.5),
    aa.DirectPreference(safeguard=0.5, norm_guard=1.0),
    aa.NegativeAware(norm_guard=1.0),
]


def first_gradients(model, pairs, objective, **options):
    """The gradients of a fresh LoRA."""
    with student_of(model) as student:
        objective.loss(student, batch_of(model, pairs, **options)).backward()
        return gradients(student)


@each_schedule
@pytest.mark.parametrize("objective", TEACH_NOTHING, ids=repr)
def test_equal_pictures_teach_nothing_at_the_start(make_model, pair_of, kind, objective):
    model = make_model(noise_schedule=SCHEDULES[kind])
    unchanged = first_gradients(model, [pair_of(1, changed=False), pair_of(2, changed=False)], objective)
    changed = first_gradients(model, [pair_of(1), pair_of(2)], objective)
    assert all(gradient.count_nonzero() == 0 for gradient in unchanged)
    assert any(gradient.count_nonzero() for gradient in changed)


@each_schedule
@pytest.mark.parametrize("objective", TEACH_THE_PICTURE, ids=repr)
def test_of_other_objectives_equal_pictures_teach_that_very_picture(make_model, pair_of, kind, objective):
    """They descend along fine-tuning on it."""
    model = make_model(noise_schedule=SCHEDULES[kind])
    pairs = [pair_of(1, changed=False)]
    found, tuned = first_gradients(model, pairs, objective), first_gradients(model, pairs, aa.SupervisedFineTuning())
    for gradient, other in zip(found, tuned, strict=True):
        assert (gradient * other).sum() >= 0.999 * gradient.norm() * other.norm()
    assert any(gradient.count_nonzero() for gradient in found)


def test_rewards_make_equal_pictures_teach_something(tiny_model, pair_of):
    """Two good pictures are both to be drawn, also where they are the same one."""
    pairs = [pair_of(1, changed=False)]
    good = first_gradients(tiny_model, pairs, aa.NegativeAware(), rewards=torch.tensor([[1.0, 1.0]]))
    assert any(gradient.count_nonzero() for gradient in good)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_the_loss_of_a_batch_is_the_mean_over_its_pairs(tiny_model, pair_of, objective):
    pairs = [pair_of(seed) for seed in range(3)]
    batch = batch_of(tiny_model, pairs)
    with student_of(tiny_model) as student:
        perturb(student)
        alone = [objective.loss(student, rows(batch, index)).item() for index in range(3)]
        assert objective.loss(student, batch).item() == pytest.approx(sum(alone) / 3, rel=1e-5)


def rows(batch, index):
    part = slice(index, index + 1)
    tensors = {name: getattr(batch, name)[part] for name in ("before", "after", "noise", "sigmas")}
    return dataclasses.replace(
        batch, **tensors, conditioning={name: text[part] for name, text in batch.conditioning.items()}
    )


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_a_prediction_that_is_not_a_number_stops_the_training(make_model, two_pairs, objective):
    class Spoilt(make_model):
        def predict(self, noisy, sigmas, conditioning):
            predictions = super().predict(noisy, sigmas, conditioning)
            # One latent of the student's, at the third step; the teacher is fine.
            return predictions * (torch.nan if len(events) == 2 and torch.is_grad_enabled() else 1.0)

    events = []
    trainer = aa.DifferentialLoRATrainer(rank=2, steps=4, learning_rate=1e-3, objective=together(objective))
    with pytest.raises(TrainingDivergedError, match="the loss was nan at step 3"):
        trainer.train(two_pairs, Spoilt(), seed=0, on_step=events.append)
    assert len(events) == 2


def together(objective):
    """Steps count over all pairs and stages: two pairs in two stages are two steps each of four."""
    return (
        dataclasses.replace(objective, per_pair=False, copy_fraction=0.25) if objective == aa.TwoStage() else objective
    )


@pytest.mark.parametrize("objective", ASK_SEVERAL_TIMES, ids=repr)
def test_memory_is_saved_without_another_result_where_a_step_has_several_predictions(objective):
    plain = training_of(objective)
    for options in ({"gradient_checkpointing": True}, {"micro_batch_size": 1}):
        saving = training_of(objective, **options)
        assert saving.losses == pytest.approx(plain.losses, rel=1e-5)
        for name, layer in plain.lora.layers.items():
            update = layer.delta()
            assert update.count_nonzero()
            assert (saving.lora.layers[name].delta() - update).norm() <= 1e-3 * update.norm()


class PlainSteps(aa.Optimizer):
    """Steps in proportion to gradients; Adam divides by their size, where the least of them are rounding."""

    def build(self, parameters, *, learning_rate):
        return torch.optim.SGD(parameters, lr=learning_rate)


def training_of(objective, **options):
    before = Image.linear_gradient("L").resize((TINY_SIZE, TINY_SIZE)).convert("RGB")
    pairs = [
        aa.ImagePair(prompt=prompt, seed=0, before=before, after=ImageChops.invert(before), plan=aa.Plan(prompt))
        for prompt in ("a red cone", "a blue cube")
    ]
    synthesizer = DiffusersSynthesizer(pipeline=tiny_flux(), width=TINY_SIZE, height=TINY_SIZE, steps=2)
    trainer = aa.DifferentialLoRATrainer(
        rank=4, steps=2, batch_size=2, learning_rate=1e-2, optimizer=PlainSteps(), objective=objective, **options
    )
    return trainer.train(pairs, synthesizer, seed=0, progress=False)
