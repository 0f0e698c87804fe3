"""Companions: whose gradient is whose, trainings that are killed and resumed, and what they change in the student: nothing."""

from contextlib import suppress
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import artaug as aa
from artaug.diffusion import Flux, estimate
from artaug.errors import ContractError, InvalidValueError, LoRAMismatchError, ModelError
from artaug.testing import check_objective
from artaug.training import Checkpoints, Companion, TrainingPrompt
from artaug.training.batches import EncodedPairs
from artaug.training.config import TrainingConfig
from artaug.training.injection import inject_adapter
from support.family_laws import family_of
from support.tiny_flux import tiny_flux
from support.training_steps import SCHEDULES, perturb

PROMPTS = [TrainingPrompt(prompt=prompt, size=(4, 4)) for prompt in ("a red barn", "a lake", "a blue door")]


class Pooled(nn.Module):
    """A number for each row: the mean over tokens of a linear map of every layer's features."""

    def __init__(self, channels):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(count, 1) for count in channels)

    def forward(self, features):
        scores = [layer(part).flatten(1).mean(1) for layer, part in zip(self.maps, features, strict=True)]
        return torch.stack(scores).mean(0)


@dataclass(frozen=True, kw_only=True)
class Distilled(aa.Objective):
    """Variational score distillation in one step, beside a head that tells the student's draws from noise."""

    reads_pictures = False
    extra_noise = 1
    updates: int = 1
    asks: bool = True
    learning_rate: float | None = 3e-2
    head: bool = True
    adapter: object = aa.PlainLoRA()

    @property
    def companion(self):
        parts = {"features": "attn", "head": Pooled} if self.head else {}
        return Companion(
            loss=self.fake_loss, learning_rate=self.learning_rate, updates=self.updates, adapter=self.adapter, **parts
        )

    def draw(self, model, batch):
        start, highest = batch.extra_noise[0], torch.full_like(batch.sigmas, 0.99)
        return model.noise_schedule.predict_x0(start, model.predict(start, highest, batch.conditioning), highest)

    def loss(self, model, batch):
        clean = self.draw(model, batch)
        if not self.asks:
            return clean.square().mean()
        noisy = model.noise_schedule.add_noise(clean, batch.noise, batch.sigmas)
        with torch.no_grad():
            teacher, fake = (
                model.noise_schedule.predict_x0(noisy, predict(noisy, batch.sigmas, batch.conditioning), batch.sigmas)
                for predict in (model.teacher_predict, model.companion_predict)
            )
        loss = 0.5 * (clean - (clean + teacher - fake).detach()).square().mean()
        if self.head:
            loss = loss - 0.1 * model.companion_head(noisy, batch.sigmas, batch.conditioning).mean()
        return loss

    def fake_loss(self, model, batch):
        with torch.no_grad():
            clean = self.draw(model, batch)
        noisy = model.noise_schedule.add_noise(clean, batch.noise, batch.sigmas)
        target = model.noise_schedule.target(clean, batch.noise, batch.sigmas)
        if not self.adapter:
            loss = torch.zeros(())
        else:
            loss = (model.companion_predict(noisy, batch.sigmas, batch.conditioning) - target).square().mean()
        if self.head:
            real, drawn = (
                model.companion_head(each, batch.sigmas, batch.conditioning) for each in (batch.noise, noisy)
            )
            loss = loss + nn.functional.softplus(drawn - real).mean()
        return loss


def trainer_of(objective, **options):
    return aa.DifferentialLoRATrainer(
        objective=objective, **{"rank": 4, "steps": 8, "batch_size": 2, "learning_rate": 1e-2, **options}
    )


def batch_of(model, objective, samples=PROMPTS, **options):
    config = TrainingConfig(objective=objective, batch_size=2, **options)
    encoded = EncodedPairs.encode(model, samples, micro_batch_size=2, objective=objective)
    (step,) = encoded.batches(
        model, range(len(samples)), config, seed=0, indices=[0], companion_updates=objective.updates
    )
    return step


def student_of(model, objective, *, targets="blocks", adapter=None):
    return inject_adapter(
        model,
        rank=4,
        targets=targets,
        generator=torch.Generator().manual_seed(0),
        adapter=adapter or aa.PlainLoRA(),
        companion=objective.companion,
        companion_generator=torch.Generator().manual_seed(5),
    )


def perturb_companion(student):
    generator = torch.Generator().manual_seed(2)
    for factor in student.companion.parameters():
        factor.data += 0.1 * torch.randn(factor.shape, generator=generator)


def same(one, other):
    return one.losses == other.losses and all(
        torch.equal(layer.down, other.lora.layers[name].down) and torch.equal(layer.up, other.lora.layers[name].up)
        for name, layer in one.lora.layers.items()
    )


def test_the_companion_starts_at_the_teacher_and_each_role_has_its_own_update(tiny_model):
    objective = Distilled()
    (batch,) = batch_of(tiny_model, objective).micro_batches
    inputs = (batch.noise, batch.sigmas, batch.conditioning)
    with torch.no_grad():
        tiny_model.module.eval()
        plain = tiny_model.predict(*inputs)
    with student_of(tiny_model, objective) as student, torch.no_grad():
        assert torch.equal(student.companion_predict(*inputs), plain)
        perturb(student)
        learned = student.predict(*inputs)
        assert torch.equal(student.companion_predict(*inputs), plain)
        perturb_companion(student)
        assert not torch.equal(student.companion_predict(*inputs), plain)
        assert torch.equal(student.predict(*inputs), learned)
        assert torch.equal(student.teacher_predict(*inputs), plain)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_loss_reaches_the_parameters_of_its_own_learner_alone(make_model, kind):
    model, objective = make_model(noise_schedule=SCHEDULES[kind]), Distilled()
    step = batch_of(model, objective)
    with student_of(model, objective) as student:
        perturb(student)
        objective.loss(student, step.micro_batches[0]).backward()
        assert all(parameter.grad is not None for parameter in student.parameters())
        assert all(parameter.grad is None for parameter in student.companion.parameters())
        for parameter in student.parameters():
            parameter.grad = None
        with student.roles.learning("companion"):
            objective.fake_loss(student, step.for_companion[0].micro_batches[0]).backward()
        assert all(parameter.grad is None for parameter in student.parameters())
        assert all(parameter.grad is not None for parameter in student.companion.parameters())
        assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("role", ["teacher", "companion", "head"])
def test_the_gradient_to_the_noisy_latents_is_that_of_finite_differences(make_model, role):
    model, objective = make_model(dtype=torch.float64), Distilled()
    (batch,) = batch_of(model, objective).micro_batches
    with student_of(model, objective) as student:
        for parameter in (*student.parameters(), *student.companion.parameters()):
            parameter.data = parameter.data.double()
        perturb(student)
        perturb_companion(student)

        def value(noisy):
            inputs = (noisy, batch.sigmas.double(), batch.conditioning)
            if role == "teacher":
                return student.teacher_predict(*inputs, with_gradient=True).double().square().mean()
            if role == "companion":
                return student.companion_predict(*inputs).double().square().mean()
            student.companion.head.float()
            return student.companion_head(*inputs).double().square().mean()

        noisy = batch.noise.double().requires_grad_()
        value(noisy).backward()
        direction = noisy.grad / noisy.grad.norm()
        with torch.no_grad():
            slope = (value(noisy + 1e-2 * direction) - value(noisy - 1e-2 * direction)) / 2e-2
        assert noisy.grad.norm().item() == pytest.approx(slope.item(), rel=1e-2)


@pytest.mark.parametrize("adapter", [aa.PlainLoRA(), aa.LoKr(factor=2), aa.DoRA()], ids=repr)
def test_gradient_checkpointing_changes_no_gradient(adapter):
    gradients = []
    for checkpoints in (False, True):
        family = family_of(Flux, tiny_flux())
        if checkpoints:
            family.module.enable_gradient_checkpointing()
        objective = Distilled()
        samples = [TrainingPrompt(prompt=sample.prompt, size=(family.width, family.height)) for sample in PROMPTS]
        step = batch_of(family, objective, samples)
        with student_of(family, objective, targets=r"blocks.*(attn|ff)", adapter=adapter) as student:
            perturb(student)
            perturb_companion(student)
            with student.roles.learning("companion"):
                objective.fake_loss(student, step.for_companion[0].micro_batches[0]).backward()
            objective.loss(student, step.micro_batches[0]).backward()
            gradients.append(
                [
                    torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
                    for parameter in (*student.parameters(), *student.companion.parameters())
                ]
            )
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-7)


def test_the_distilled_gradient_is_the_difference_of_scores(tiny_model):
    objective = Distilled(head=False)
    (batch,) = batch_of(tiny_model, objective).micro_batches
    with student_of(tiny_model, objective) as student:
        perturb(student)
        perturb_companion(student)
        clean = objective.draw(student, batch)
        with torch.no_grad():
            s = batch.sigmas[:, None, None, None]
            noisy = (1 - s) * clean + s * batch.noise
            inputs = (noisy, batch.sigmas, batch.conditioning)
            # (v_fake - v_teacher) s is the difference of clean estimates, x0_teacher - x0_fake.
            difference = s * (student.companion_predict(*inputs) - student.teacher_predict(*inputs))
        expected = torch.autograd.grad((clean * -difference).sum() / clean.numel(), student.parameters())
        objective.loss(student, batch).backward()
        for parameter, gradient in zip(student.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-8)


def test_a_companion_that_is_not_asked_changes_nothing(make_model):
    @dataclass(frozen=True, kw_only=True)
    class Alone(Distilled):
        companion = None

    beside = trainer_of(Distilled(asks=False, updates=2)).train(PROMPTS, make_model(), seed=3, progress=False)
    alone = trainer_of(Alone(asks=False)).train(PROMPTS, make_model(), seed=3, progress=False)
    assert same(beside, alone)


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (Distilled(), {}),
        (Distilled(updates=2), {"micro_batch_size": 1, "ema": 0.9, "schedule": aa.Schedule.COSINE}),
        (Distilled(adapter=None, learning_rate=None), {"optimizer": aa.ScheduleFree()}),
        (Distilled(adapter=aa.FullRank(), head=False), {"echo": 2}),
    ],
    ids=["plain", "two updates", "a head alone", "full rank"],
)
def test_a_resumed_training_ends_bit_for_bit_as_one_never_stopped(tmp_path, make_model, objective, options):
    if objective.adapter is None:
        objective = HeadAlone(learning_rate=None, adapter=None)
    trainer, companion_losses = trainer_of(objective, **options), {}

    def noting(event):
        companion_losses.setdefault(event.step, set()).add(event.companion_loss)

    whole = trainer.train(PROMPTS, make_model(), seed=3, on_step=noting, progress=False)
    checkpoints = Checkpoints(folder=tmp_path, every=2)
    for stop in (3, 6):

        def stopping(event, stop=stop):
            noting(event)
            if event.step == stop:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            trainer.train(PROMPTS, make_model(), seed=3, checkpoints=checkpoints, on_step=stopping, progress=False)
    resumed = trainer.train(PROMPTS, make_model(), seed=3, checkpoints=checkpoints, on_step=noting, progress=False)
    assert same(resumed, whole)
    assert [len(losses) for losses in companion_losses.values()] == [1] * 8
    assert None not in set().union(*companion_losses.values())


@dataclass(frozen=True, kw_only=True)
class HeadAlone(Distilled):
    """An adversary on the teacher's features."""

    def loss(self, model, batch):
        return -model.companion_head(self.draw(model, batch), batch.sigmas, batch.conditioning).mean()


def test_nothing_is_left_on_the_model(make_model):
    model = make_model()
    before = {name: (type(part), part.training) for name, part in model.module.named_modules()}
    trainer_of(Distilled()).train(PROMPTS, model, seed=3, progress=False)
    assert {name: (type(part), part.training) for name, part in model.module.named_modules()} == before
    assert not model.module.blocks[0].attn._forward_hooks  # noqa: SLF001 - torch has no public list of hooks


def test_the_checks_of_objectives_call_the_companion():
    check_objective(Distilled())
    check_objective(HeadAlone(adapter=None))

    @dataclass(frozen=True, kw_only=True)
    class Detached(Distilled):
        def fake_loss(self, model, batch):
            return super().fake_loss(model, batch).detach()

    with pytest.raises(AssertionError, match=r"the companion's loss of a batch .* has no gradient"):
        check_objective(Detached())


def test_a_batch_has_the_noise_and_the_negative_prompt_that_are_asked_for(tiny_model):
    @dataclass(frozen=True, kw_only=True)
    class Guided(Distilled):
        negative_prompt = ""
        extra_noise = 2

    step = batch_of(tiny_model, Guided(updates=2))
    (batch,) = step.micro_batches
    assert torch.equal(batch.negative["embeds"], tiny_model.encode_prompts(["", ""])["embeds"])
    draws = [batch, *(update.micro_batches[0] for update in step.for_companion)]
    noises = [noise for each in draws for noise in (each.noise, *each.extra_noise)]
    assert len(noises) == 9
    correlations = torch.corrcoef(torch.stack([noise.flatten() for noise in noises]))
    assert (correlations - torch.eye(9)).abs().max() < 0.5
    assert len({tuple(each.sigmas.tolist()) for each in draws}) == 3
    (plain,) = batch_of(tiny_model, Distilled(updates=1)).micro_batches
    assert torch.equal(plain.noise, batch.noise)
    assert torch.equal(plain.sigmas, batch.sigmas)


def test_an_estimate_counts_the_companion():
    options = {"width": 64, "height": 64}
    with_companion, alone = (
        estimate(tiny_flux(), trainer=trainer_of(objective), **options)
        for objective in (Distilled(head=False), aa.SupervisedFineTuning())
    )
    assert with_companion.trainable_parameters == 2 * alone.trainable_parameters
    assert with_companion.adapter_bytes == 2 * alone.adapter_bytes
    assert with_companion.checkpoint_bytes == 2 * alone.checkpoint_bytes
    assert with_companion.lora_bytes == alone.lora_bytes
    more = estimate(tiny_flux(), trainer=trainer_of(Distilled(head=False, updates=3)), **options)
    assert more.flops_per_step > with_companion.flops_per_step > alone.flops_per_step
    assert more.activations_bytes == with_companion.activations_bytes
    assert estimate(tiny_flux(), trainer=trainer_of(Distilled()), **options).trainable_parameters > (
        with_companion.trainable_parameters
    )


@pytest.mark.parametrize(
    "options",
    [
        {"adapter": None},
        {"adapter": aa.DoRA()},
        {"features": "attn"},
        {"head": Pooled},
        {"learning_rate": 0.0},
        {"rank": 0},
        {"updates": 0},
    ],
    ids=repr,
)
def test_an_illegal_companion_is_refused(options):
    with pytest.raises(InvalidValueError, match=r"Companion\(.*: need an adapter or a head"):
        Companion(loss=lambda _model, _batch: torch.zeros(()), **options)


def test_what_a_loss_asks_of_a_companion_that_lacks_it_is_an_error(tiny_model):
    (batch,) = batch_of(tiny_model, Distilled()).micro_batches
    inputs = (batch.noise, batch.sigmas, batch.conditioning)
    with student_of(tiny_model, Distilled(head=False)) as student, pytest.raises(ModelError, match="has no head"):
        student.companion_head(*inputs)
    with student_of(tiny_model, HeadAlone(adapter=None)) as student, pytest.raises(ModelError, match="has no adapter"):
        student.companion_predict(*inputs)
    with (
        inject_adapter(tiny_model, rank=4, targets="blocks", generator=torch.Generator()) as student,
        pytest.raises(ModelError, match="there is none"),
    ):
        student.companion_predict(*inputs)


def test_features_that_select_nothing_are_refused_at_the_door(tiny_model):
    @dataclass(frozen=True, kw_only=True)
    class Elsewhere(Distilled):
        @property
        def companion(self):
            return Companion(loss=self.fake_loss, features="to_nowhere", head=Pooled)

    with pytest.raises(LoRAMismatchError, match="to_nowhere"):
        trainer_of(Elsewhere()).check(tiny_model, pairs=2)


def test_a_head_with_buffers_is_refused(tiny_model):
    @dataclass(frozen=True, kw_only=True)
    class Normed(Distilled):
        @property
        def companion(self):
            return Companion(loss=self.fake_loss, features="attn", head=lambda channels: nn.BatchNorm1d(channels[0]))

    with pytest.raises(ContractError, match=r"BatchNorm1d.*without buffers"), student_of(tiny_model, Normed()):
        pytest.fail("the block ran")


def test_a_slider_of_an_objective_with_a_companion_is_refused():
    with pytest.raises(InvalidValueError, match="or a companion, cannot be reversed"):
        aa.Bipolar(objective=Distilled())
