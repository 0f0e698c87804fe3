"""Training as a whole: its results, its errors, and that it leaves no trace."""

import math

import pytest
import torch

from artaug.diffusion import DiffusersSynthesizer
from artaug.errors import (
    ContractError,
    InvalidValueError,
    NothingToLearnError,
    TrainingDivergedError,
)
from artaug.lora.lora import LoRA, LowRank
from artaug.pair_folders import pairs_from_folder, pairs_to_folder
from artaug.pairs import ImagePair
from artaug.plan import Plan
from artaug.training import (
    DifferentialLoRATrainer,
    Objective,
    PairedDifference,
    StepEvent,
    SupervisedFineTuning,
    TwoStage,
)
from artaug.training.injection import find_target_layers
from support.tiny_flux import TINY_SIZE, tiny_flux

OBJECTIVES = [PairedDifference(), SupervisedFineTuning(), TwoStage(), TwoStage(per_pair=False)]


def trainer_of(**options):
    return DifferentialLoRATrainer(**{"rank": 4, "steps": 8, "learning_rate": 1e-2, **options})


def state_of(module):
    """Everything that training could leave behind."""
    return (
        [(name, id(layer), layer.training, sorted(layer.__dict__)) for name, layer in module.named_modules()],
        [(name, id(weight), weight.requires_grad, weight.grad) for name, weight in module.named_parameters()],
        [tuple(layer._forward_hooks) for layer in module.modules()],  # noqa: SLF001 - torch shows them no other way
        {name: tensor.clone() for name, tensor in module.state_dict().items()},
    )


def assert_as_before(module, state):
    *structure, weights = state_of(module)
    assert structure == list(state[:3])
    assert all(torch.equal(weights[name], tensor) for name, tensor in state[3].items())


def same(lora, other):
    return lora.layers.keys() == other.layers.keys() and all(
        torch.equal(layer.down, other.layers[name].down) and torch.equal(layer.up, other.layers[name].up)
        for name, layer in lora.layers.items()
    )


def filled_lora(module, *, scale=0.1):
    generator = torch.Generator().manual_seed(5)
    return LoRA(
        {
            name: LowRank(
                scale * torch.randn(2, layer.in_features, generator=generator),
                torch.randn(layer.out_features, 2, generator=generator),
            )
            for name, layer in find_target_layers(module, "blocks").items()
        }
    )


class Broken(Objective):
    """Finite for two steps, then multiplied by a factor."""

    def __init__(self, factor):
        self.factor = factor
        self.calls = 0

    def loss(self, model, batch):
        self.calls += 1
        loss = model.predict(batch.after, batch.sigmas, batch.conditioning).square().mean()
        return loss if self.calls < 3 else loss * self.factor


@pytest.mark.parametrize(("objective", "left"), [(PairedDifference(), 0.1), (SupervisedFineTuning(), 0.7)], ids=repr)
def test_one_pair_is_learned_in_seconds(tiny_model, pair_of, objective, left):
    trainer = trainer_of(rank=16, steps=60, batch_size=16, objective=objective, sigma_range=(0.5, 1.0))
    losses = trainer.train([pair_of(1)], tiny_model, seed=0).losses
    assert sum(losses[-10:]) < left * sum(losses[:10])


def test_a_training_reports_every_step(tiny_model, two_pairs):
    events = []
    training = trainer_of(steps=5).train(two_pairs, tiny_model, seed=0, on_step=events.append)
    assert (training.pairs, training.steps, len(training.losses)) == (2, 5, 5)
    assert training.seconds > 0
    assert all(isinstance(event, StepEvent) for event in events)
    assert [event.step for event in events] == [1, 2, 3, 4, 5]
    assert {event.steps for event in events} == {5}
    assert tuple(event.loss for event in events) == training.losses


def test_pairs_of_a_folder_train_to_the_same_lora_as_in_memory(tiny_model, make_model, two_pairs, tmp_path):
    pairs_to_folder(two_pairs, tmp_path)
    stored = trainer_of().train(pairs_from_folder(tmp_path), make_model(), seed=0)
    assert same(stored.lora, trainer_of().train(two_pairs, tiny_model, seed=0).lora)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_the_same_seed_gives_the_same_lora_bit_for_bit(make_model, two_pairs, objective):
    first, again, other = (
        trainer_of(objective=objective).train(two_pairs, make_model(), seed=seed) for seed in (3, 3, 4)
    )
    assert same(first.lora, again.lora)
    assert first.losses == again.losses
    assert not same(first.lora, other.lora)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_every_objective_takes_the_same_number_of_steps(tiny_model, two_pairs, objective):
    assert len(trainer_of(steps=9, objective=objective).train(two_pairs, tiny_model, seed=0).losses) == 9


def test_global_randomness_is_neither_used_nor_changed(make_model, two_pairs):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = trainer_of().train(two_pairs, make_model(), seed=0)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert same(first.lora, trainer_of().train(two_pairs, make_model(), seed=0).lora)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_training_leaves_no_trace(tiny_model, two_pairs, objective):
    tiny_model.module.train()
    tiny_model.module.blocks[1].eval()
    tiny_model.module.proj_in.weight.requires_grad_(False)
    state = state_of(tiny_model.module)
    trainer_of(objective=objective).train(two_pairs, tiny_model, seed=0)
    assert_as_before(tiny_model.module, state)


@pytest.mark.parametrize("step", [1, 4])
def test_an_interrupted_training_leaves_no_trace(tiny_model, two_pairs, step):
    def stop(event):
        if event.step == step:
            raise KeyboardInterrupt

    state = state_of(tiny_model.module)
    trainer = trainer_of(objective=TwoStage(per_pair=False), steps=4)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(two_pairs, tiny_model, seed=0, on_step=stop)
    assert_as_before(tiny_model.module, state)


def test_a_failed_injection_leaves_no_trace(tiny_model, two_pairs):
    tiny_model.module.blocks[2].attn = OddLinear(64, 64)
    state = state_of(tiny_model.module)
    with pytest.raises(ValueError, match="OddLinear"):
        trainer_of(targets="attn").train(two_pairs, tiny_model, seed=0)
    assert_as_before(tiny_model.module, state)


class OddLinear(torch.nn.Module):
    """Looks linear to us, and PEFT cannot wrap it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.matrix = torch.nn.Parameter(torch.zeros(outputs, inputs))


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_step(tiny_model, two_pairs, factor):
    state = state_of(tiny_model.module)
    events = []
    with pytest.raises(
        TrainingDivergedError, match=r"the loss was (nan|inf) at step 3\. Lower the learning rate"
    ) as error:
        trainer_of(objective=Broken(factor)).train(two_pairs, tiny_model, seed=0, on_step=events.append)
    assert error.value.step == 3
    assert len(events) == 2
    assert_as_before(tiny_model.module, state)


def test_an_absurd_learning_rate_is_a_divergence_error(tiny_model, two_pairs):
    with pytest.raises(TrainingDivergedError):
        trainer_of(learning_rate=1e30, warmup=0).train(two_pairs, tiny_model, seed=0)


@pytest.mark.parametrize(
    ("spoil", "message"), [(lambda loss: loss.detach(), "without gradient"), (lambda loss: loss[None], r"\(1,\)")]
)
def test_an_objective_that_returns_no_loss_is_named(tiny_model, two_pairs, spoil, message):
    class Spoilt(Objective):
        def loss(self, model, batch):
            return spoil(PairedDifference().loss(model, batch))

    with pytest.raises(ContractError, match=message):
        trainer_of(objective=Spoilt()).train(two_pairs, tiny_model, seed=0)


def test_equal_pictures_teach_exactly_nothing(tiny_model, pair_of):
    training = trainer_of().train([pair_of(1, changed=False)], tiny_model, seed=0)
    assert training.losses == pytest.approx([math.log(2)] * len(training.losses)), "no preference, in no step"
    assert all(layer.up.count_nonzero() == 0 for layer in training.lora.layers.values())


def test_the_loras_of_earlier_rounds_are_part_of_the_teacher_and_stay(make_model, pair_of):
    applied = filled_lora(make_model().module)
    model = make_model(applied=(applied,))
    state = state_of(model.module)
    unchanged = trainer_of().train([pair_of(1, changed=False)], model, seed=0)
    assert all(layer.up.count_nonzero() == 0 for layer in unchanged.lora.layers.values())
    assert_as_before(model.module, state)
    plain = trainer_of().train([pair_of(1)], make_model(), seed=0)
    assert plain.losses != trainer_of().train([pair_of(1)], model, seed=0).losses


def test_a_sixteen_bit_model_is_trained_in_float32(make_model, two_pairs):
    model = make_model(dtype=torch.bfloat16)
    training = trainer_of(steps=20).train(two_pairs, model, seed=0)
    assert {factor.dtype for layer in training.lora.layers.values() for factor in (layer.down, layer.up)} == {
        torch.float32
    }
    assert {weight.dtype for weight in model.module.parameters()} == {torch.bfloat16}
    assert any(layer.delta().abs().max() > 0 for layer in training.lora.layers.values())


def test_pictures_and_prompts_are_encoded_once(tiny_model, two_pairs):
    trainer_of(objective=TwoStage()).train(two_pairs, tiny_model, seed=0)
    assert (tiny_model.calls.images, tiny_model.calls.prompts) == (4, 2)


def test_the_first_stage_makes_the_model_draw_the_pictures_before(tiny_model, pair_of):
    pair = pair_of(1)
    copy_loss = TwoStage().training_plan(1).stages[0].loss

    class Copy(Objective):
        def loss(self, model, batch):
            return copy_loss(model, batch)

    lora = trainer_of(objective=Copy(), rank=16, steps=80, batch_size=16).train([pair], tiny_model, seed=0).lora
    clean, conditioning = tiny_model.encode_images([pair.before] * 32), tiny_model.encode_prompts([pair.prompt] * 32)
    generator = torch.Generator().manual_seed(9)
    noise, sigmas = torch.randn(clean.shape, generator=generator), torch.rand(32, generator=generator)
    noisy = tiny_model.noise_schedule.add_noise(clean, noise, sigmas)

    def error():
        prediction = tiny_model.predict(noisy, sigmas, conditioning)
        return (tiny_model.noise_schedule.predict_x0(noisy, prediction, sigmas) - clean).square().mean()

    tiny_model.module.eval()
    plain = error()
    with lora.applied_to(tiny_model.module):
        assert error() < 0.65 * plain


def test_per_pair_loras_are_averaged_exactly(make_model, two_pairs):
    trainer = trainer_of(objective=TwoStage(), steps=8)
    both = trainer.train(two_pairs, make_model(), seed=0).lora
    alone = trainer_of(objective=TwoStage(), steps=4).train(two_pairs[:1], make_model(), seed=0).lora
    for name, layer in both.layers.items():
        first, second = (LowRank(layer.down[rows], 2 * layer.up[:, rows]) for rows in (slice(0, 4), slice(4, 8)))
        assert torch.equal(first.down, alone.layers[name].down)
        assert torch.equal(first.up, alone.layers[name].up)
        torch.testing.assert_close(layer.delta(), (first.delta() + second.delta()) / 2)


def test_the_second_stage_starts_from_a_model_that_copies(make_model, pair_of):
    two = trainer_of(objective=TwoStage(), steps=100, rank=16, batch_size=16).train(
        [pair_of(1, changed=False)], make_model(), seed=0
    )
    assert sum(two.losses[50:60]) < 0.8 * sum(two.losses[:10])


def test_too_few_steps_for_all_pairs_and_stages_are_refused(tiny_model, two_pairs):
    with pytest.raises(
        InvalidValueError, match=r"steps=3 are too few for TwoStage.*2 group\(s\) of pairs with 2 stage"
    ):
        trainer_of(objective=TwoStage(), steps=3).train(two_pairs, tiny_model, seed=0)


def test_without_pairs_there_is_nothing_to_learn(tiny_model):
    with pytest.raises(NothingToLearnError, match="received 0 pairs"):
        trainer_of().train([], tiny_model, seed=0)


def test_the_learning_rate_rises_over_the_warmup(make_model, pair_of):
    """A first step of Adam is as long as the learning rate, so the first update shows the rate."""
    first_steps = {
        warmup: trainer_of(steps=1, warmup=warmup).train([pair_of(1)], make_model(), seed=0).lora
        for warmup in (0.0, 1.0)
    }
    assert same(first_steps[0.0], first_steps[1.0])
    halved = trainer_of(steps=2, warmup=1.0).train([pair_of(1)], make_model(), seed=0).lora
    full = trainer_of(steps=2, warmup=0.0).train([pair_of(1)], make_model(), seed=0).lora
    longest = {name: layer.up.abs().max() for name, layer in full.layers.items()}
    assert all(layer.up.abs().max() < longest[name] for name, layer in halved.layers.items())


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_unless_switched_off(tiny_model, two_pairs, capsys, progress):
    trainer_of().train(two_pairs, tiny_model, seed=0, progress=progress)
    assert ("train: 8/8 steps (100%)" in capsys.readouterr().err) is progress


def test_a_flux_pipeline_is_trained_and_its_own_loader_reads_the_result(tmp_path):
    pipeline = tiny_flux()
    synthesizer = DiffusersSynthesizer(pipeline=pipeline, width=TINY_SIZE, height=TINY_SIZE, steps=2)
    before, after = (synthesizer.synthesize(Plan("a red cone"), seed=seed) for seed in (0, 1))
    pair = ImagePair(prompt="a red cone", seed=0, before=before, after=after, plan=Plan("a red cone"))
    state = state_of(pipeline.transformer)
    training = trainer_of(steps=10).train([pair], synthesizer, seed=0)
    assert_as_before(pipeline.transformer, state)
    learned = synthesizer.with_lora(training.lora, scale=20.0).synthesize(Plan("a red cone"), seed=0)
    assert learned != before
    pipeline.load_lora_weights(training.lora.scaled(20.0).save(tmp_path / "lora.safetensors"))
    loaded = synthesizer.synthesize(Plan("a red cone"), seed=0)
    assert max(high for _, high in difference_of(loaded, learned).getextrema()) <= 1


def difference_of(image, other):
    from PIL import ImageChops  # noqa: PLC0415

    return ImageChops.difference(image, other)
