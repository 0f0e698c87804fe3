"""The step and strength of a LoRA, chosen by pictures of held-out prompts drawn as a user would draw them."""

import pytest
from PIL import ImageChops
from tests.training.conftest import TinySynthesizer

from artaug.diffusion import DiffusersSynthesizer
from artaug.errors import ContractError, InvalidValueError, StorageError
from artaug.pairs import ImagePair
from artaug.plan import Plan
from artaug.scorers import FunctionScorer
from artaug.synthesis import picture_seeds
from artaug.training import Checkpoints, DifferentialLoRATrainer, TwoStage, Validation, ValidationResult
from artaug.training.validation import best_result
from support.tiny_flux import TINY_SIZE, tiny_flux


def mean_lightness(image):
    return image.convert("L").resize((1, 1)).getpixel((0, 0)) / 255


BRIGHTNESS = FunctionScorer(function=lambda image, _: mean_lightness(image), name="bright")
DARKNESS = FunctionScorer(function=lambda image, _: -mean_lightness(image), name="dark")
UNSEEN = ("a blue cube", "a green cone", "a red disc")


def brighter_pairs(synthesizer):
    """Two pictures of one prompt, and each of them brighter."""
    plan = Plan("a red cone")
    before = [synthesizer.synthesize(plan, seed=seed) for seed in range(2)]
    return [
        ImagePair(prompt=plan.prompt, seed=seed, before=image, after=ImageChops.screen(image, image), plan=plan)
        for seed, image in enumerate(before)
    ]


@pytest.fixture(scope="module")
def synthesizer():
    return TinySynthesizer()


@pytest.fixture(scope="module")
def pairs(synthesizer):
    return brighter_pairs(synthesizer)


@pytest.fixture(scope="module")
def validated(synthesizer, pairs):
    """A training of six steps with three validations at one strength."""
    return trainer_of().train(pairs, synthesizer, seed=0, validation=validation_of(), progress=False)


def trainer_of(**options):
    return DifferentialLoRATrainer(**{"rank": 4, "steps": 6, "learning_rate": 3e-2, "warmup": 0.0, **options})


def validation_of(**options):
    return Validation(**{"scorer": BRIGHTNESS, "prompts": UNSEEN, "every": 2, "batch_size": 2, **options})


def result_of(step, win_rate, *, gain=0.0, strength=1.0):
    return ValidationResult(step=step, strength=strength, win_rate=win_rate, gain=gain)


def test_every_step_and_strength_that_is_due_is_validated_and_the_best_is_chosen(synthesizer, pairs):
    training = trainer_of().train(pairs, synthesizer, seed=0, validation=validation_of(strengths=(0.5, 2.0)))
    steps_and_strengths = [(result.step, result.strength) for result in training.validations]
    assert steps_and_strengths == [(step, strength) for step in (2, 4, 6) for strength in (0.5, 2.0)]
    assert training.best_validation == max(training.validations, key=lambda result: (result.win_rate, result.gain))
    assert training.steps == 6


def test_what_is_validated_is_what_the_result_draws():
    synthesizer = DiffusersSynthesizer(pipeline=tiny_flux(), width=TINY_SIZE, height=TINY_SIZE, steps=2)
    results = []
    validation = validation_of(every=3, strengths=(0.5, 2.0), on_validation=results.append)
    training = trainer_of().train(brighter_pairs(synthesizer), synthesizer, seed=0, validation=validation)
    best = next(result for result in results if result == training.best_validation)
    assert len(results) == 4
    assert all(len(result.images) == len(UNSEEN) for result in results)
    assert not any(result.images for result in training.validations)
    _, validation_seed = picture_seeds(0, 2)  # the first is that of the only group of pairs
    base, drawn = (
        validation_of().score(drawer, seed=validation_seed)[0]
        for drawer in (synthesizer, synthesizer.with_lora(training.lora))
    )
    gains = [score - base_score for score, base_score in zip(drawn, base, strict=True)]
    assert sum(gains) / len(gains) == pytest.approx(best.gain, abs=2e-3)  # strength folded in, up to rounding


def test_validating_does_not_change_what_is_learned(synthesizer, pairs, validated):
    plain = trainer_of().train(pairs, synthesizer, seed=0)
    assert validated.losses == plain.losses


def test_training_stops_when_the_scores_stop_rising(synthesizer, pairs):
    training = trainer_of(steps=40).train(
        pairs, synthesizer, seed=0, validation=validation_of(scorer=DARKNESS, every=1, patience=2)
    )
    assert training.steps < 40
    assert len(training.validations) == training.steps == training.best_validation.step + 2


def test_a_resumed_training_validates_nothing_twice_and_chooses_the_same(tmp_path, synthesizer, pairs, validated):
    checkpoints = Checkpoints(folder=tmp_path, every=2)

    def stop(event):
        if event.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_of().train(
            pairs, synthesizer, seed=0, validation=validation_of(), checkpoints=checkpoints, on_step=stop
        )
    results = []
    resumed = trainer_of().train(
        pairs, synthesizer, seed=0, validation=validation_of(on_validation=results.append), checkpoints=checkpoints
    )
    assert [result.step for result in results] == [6]
    assert (resumed.validations, resumed.losses) == (validated.validations, validated.losses)


def test_a_training_that_its_validation_ended_is_not_run_again(tmp_path, synthesizer, pairs):
    def train(**callbacks):
        validation = validation_of(scorer=DARKNESS, every=1, patience=2, on_validation=callbacks.get("on_validation"))
        return trainer_of(steps=40).train(
            pairs,
            synthesizer,
            seed=0,
            validation=validation,
            checkpoints=Checkpoints(folder=tmp_path, every=1000),
            on_step=callbacks.get("on_step"),
        )

    first, events = train(), []
    again = train(on_step=events.append, on_validation=events.append)
    assert not events
    assert (again.validations, again.losses, again.seconds) == (first.validations, first.losses, first.seconds)
    assert again.lora.digest == first.lora.digest


def test_base_pictures_of_a_validation_are_drawn_once(tmp_path, pairs):
    checkpoints, plain = Checkpoints(folder=tmp_path, every=1000), TinySynthesizer()
    drawn = []

    def counted(plan, *, seed):
        drawn.append(plan.prompt)
        return TinySynthesizer.synthesize(plain, plan, seed=seed)

    def stop(_event):
        raise KeyboardInterrupt

    plain.synthesize = counted
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trainer_of().train(pairs, plain, seed=0, validation=validation_of(), checkpoints=checkpoints, on_step=stop)
    assert len(drawn) == len(set(drawn))


@pytest.mark.parametrize("step", [4, 6])
def test_a_training_killed_in_a_validation_repeats_it(tmp_path, synthesizer, pairs, validated, step):
    checkpoints = Checkpoints(folder=tmp_path, every=2)

    def stop(result):
        if result.step == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_of().train(
            pairs, synthesizer, seed=0, validation=validation_of(on_validation=stop), checkpoints=checkpoints
        )
    resumed = trainer_of().train(pairs, synthesizer, seed=0, validation=validation_of(), checkpoints=checkpoints)
    assert (resumed.validations, resumed.losses) == (validated.validations, validated.losses)


def test_a_training_is_not_resumed_under_another_validation(tmp_path, synthesizer, pairs):
    checkpoints = Checkpoints(folder=tmp_path, every=2)
    trainer_of().train(pairs, synthesizer, seed=0, validation=validation_of(), checkpoints=checkpoints)
    other = validation_of(prompts=UNSEEN[:2])
    with pytest.raises(StorageError, match=r"another training \(validation: bright on 3 prompts .* there, bright on 2"):
        trainer_of().train(pairs, synthesizer, seed=0, validation=other, checkpoints=checkpoints)


def test_a_training_in_stages_is_validated_once_at_its_end(synthesizer, pairs):
    training = trainer_of(objective=TwoStage()).train(pairs, synthesizer, seed=0, validation=validation_of(every=1))
    assert [result.step for result in training.validations] == [6]


def test_a_synthesizer_that_returns_too_few_pictures_is_named(pairs):
    class Forgetful(TinySynthesizer):
        def synthesize_batch(self, plans, *, seeds):
            return super().synthesize_batch(plans, seeds=seeds)[:1]

    with pytest.raises(ContractError, match=r"Forgetful\.synthesize_batch returned 1 answer for 2 plans"):
        trainer_of().train(pairs, Forgetful(), seed=0, validation=validation_of())


def test_the_best_result_wins_more_then_gains_more_then_came_first():
    assert best_result([result_of(1, 0.5), result_of(2, 0.9), result_of(3, 0.7)]).step == 2
    assert best_result([result_of(1, 0.5, gain=0.1), result_of(2, 0.5, gain=0.2)]).step == 2
    assert best_result([result_of(1, 0.5), result_of(2, 0.5)]).step == 1


def test_patience_counts_validations_since_the_best():
    rates = [0.5, 0.6, 0.6, 0.55]
    results = [result_of(step, rate) for step, rate in enumerate(rates, start=1)]
    stops = [validation_of(patience=2).should_stop(results[:count]) for count in range(5)]
    assert stops == [False, False, False, False, True]
    assert not validation_of().should_stop(results)


def test_patience_counts_validations_and_not_strengths():
    validation = validation_of(patience=1, strengths=(0.5, 1.0))
    rates = [0.4, 0.6, 0.5, 0.5]
    results = [
        result_of(step, rates[2 * step + index], strength=strength)
        for step in range(2)
        for index, strength in enumerate(validation.strengths)
    ]
    assert [validation.should_stop(results[:count]) for count in (2, 4)] == [False, True]


@pytest.mark.parametrize(
    "options",
    [
        {"prompts": ()},
        {"prompts": "a hill"},
        {"prompts": ("a hill", " ")},
        {"every": 0},
        {"strengths": ()},
        {"strengths": (0.0,)},
        {"patience": 0},
        {"batch_size": 0},
    ],
    ids=repr,
)
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(InvalidValueError, match=r"Validation|prompt"):
        validation_of(**options)
