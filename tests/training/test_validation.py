"""The step and strength of a LoRA, chosen by held-out pictures drawn as a user would draw them."""

import pytest

from artaug.diffusion import DiffusersSynthesizer
from artaug.errors import InvalidValueError, ModelError, StorageError
from artaug.pairs import ImagePair
from artaug.plan import Plan
from artaug.scorers import FunctionScorer
from artaug.training import Checkpoints, DifferentialLoRATrainer, TwoStage, Validation, ValidationResult
from artaug.training.validation import best_result
from support.tiny_flux import TINY_SIZE, tiny_flux

BRIGHTNESS = FunctionScorer(
    function=lambda image, _: image.convert("L").resize((1, 1)).getpixel((0, 0)) / 255, name="bright"
)
UNSEEN = ("a blue cube", "a green cone", "a red disc")


@pytest.fixture(scope="module")
def synthesizer():
    return DiffusersSynthesizer(pipeline=tiny_flux(), width=TINY_SIZE, height=TINY_SIZE, steps=2)


@pytest.fixture(scope="module")
def pairs(synthesizer):
    plan = Plan("a red cone")
    drawn = [synthesizer.synthesize(plan, seed=seed) for seed in range(2)]
    return [
        ImagePair(prompt=plan.prompt, seed=seed, before=image, after=image.point(lambda one: 255 - one // 4), plan=plan)
        for seed, image in enumerate(drawn)
    ]


def trainer_of(**options):
    return DifferentialLoRATrainer(**{"rank": 4, "steps": 6, "learning_rate": 3e-2, "warmup": 0.0, **options})


def held_out(**options):
    return Validation(**{"scorer": BRIGHTNESS, "prompts": UNSEEN, "every": 2, "batch_size": 2, **options})


def look(step, win_rate, *, gain=0.0, strength=1.0):
    return ValidationResult(step=step, strength=strength, win_rate=win_rate, gain=gain)


def test_looks_are_taken_at_their_steps_and_strengths_and_the_best_is_chosen(synthesizer, pairs):
    training = trainer_of().train(pairs, synthesizer, seed=0, validation=held_out(strengths=(0.5, 2.0)))
    assert [(one.step, one.strength) for one in training.validations] == [(s, f) for s in (2, 4, 6) for f in (0.5, 2.0)]
    assert training.best_validation == max(training.validations, key=lambda one: (one.win_rate, one.gain))
    assert training.steps == 6


def test_what_was_looked_at_is_what_the_result_draws(synthesizer, pairs):
    seen = []
    training = trainer_of().train(
        pairs, synthesizer, seed=0, validation=held_out(strengths=(0.5, 2.0), on_validation=seen.append)
    )
    chosen = next(one for one in seen if one == training.best_validation)
    assert len(seen) == 6
    assert all(len(one.images) == len(UNSEEN) for one in seen)
    assert not any(one.images for one in training.validations)
    before, after = (
        held_out().score(one, seed=validation_seed(0))[0] for one in (synthesizer, synthesizer.with_lora(training.lora))
    )
    gains = [one - other for one, other in zip(after, before, strict=True)]
    assert sum(gains) / len(gains) == pytest.approx(chosen.gain, abs=2e-3)  # strength folded in, up to rounding


def validation_seed(seed):
    from artaug.synthesis import picture_seeds  # noqa: PLC0415

    return picture_seeds(seed, 2)[-1]


def test_looking_does_not_change_what_is_learned(synthesizer, pairs):
    plain = trainer_of().train(pairs, synthesizer, seed=0)
    watched = trainer_of().train(pairs, synthesizer, seed=0, validation=held_out(every=1))
    assert watched.losses == plain.losses


def test_it_stops_when_pictures_stop_getting_better(synthesizer, pairs):
    worse = FunctionScorer(function=lambda image, _: -image.convert("L").resize((1, 1)).getpixel((0, 0)), name="dark")
    training = trainer_of(steps=40).train(
        pairs, synthesizer, seed=0, validation=held_out(scorer=worse, every=1, patience=2)
    )
    assert training.steps < 40
    assert len(training.validations) == training.steps == training.best_validation.step + 2


def test_a_resumed_training_looks_no_second_time_and_chooses_the_same(tmp_path, synthesizer, pairs):
    checkpoints = Checkpoints(folder=tmp_path, every=2)
    whole = trainer_of().train(pairs, synthesizer, seed=0, validation=held_out())

    def stop(event):
        if event.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_of().train(pairs, synthesizer, seed=0, validation=held_out(), checkpoints=checkpoints, on_step=stop)
    seen = []
    resumed = trainer_of().train(
        pairs, synthesizer, seed=0, validation=held_out(on_validation=seen.append), checkpoints=checkpoints
    )
    assert [one.step for one in seen] == [6]
    assert (resumed.validations, resumed.losses) == (whole.validations, whole.losses)


def test_a_training_killed_while_it_looks_looks_again(tmp_path, synthesizer, pairs):
    checkpoints = Checkpoints(folder=tmp_path, every=2)
    whole = trainer_of().train(pairs, synthesizer, seed=0, validation=held_out())

    def stop(look):
        if look.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_of().train(pairs, synthesizer, seed=0, validation=held_out(on_validation=stop), checkpoints=checkpoints)
    resumed = trainer_of().train(pairs, synthesizer, seed=0, validation=held_out(), checkpoints=checkpoints)
    assert (resumed.validations, resumed.losses) == (whole.validations, whole.losses)


def test_a_training_is_not_resumed_under_another_examination(tmp_path, synthesizer, pairs):
    checkpoints = Checkpoints(folder=tmp_path, every=2)
    trainer_of().train(pairs, synthesizer, seed=0, validation=held_out(), checkpoints=checkpoints)
    with pytest.raises(StorageError, match=r"another training \(validation: bright on 3 prompts .* there, bright on 2"):
        trainer_of().train(pairs, synthesizer, seed=0, validation=held_out(prompts=UNSEEN[:2]), checkpoints=checkpoints)


def test_a_training_in_stages_is_looked_at_once_at_its_end(synthesizer, pairs):
    training = trainer_of(objective=TwoStage()).train(pairs, synthesizer, seed=0, validation=held_out(every=1))
    assert [one.step for one in training.validations] == [6]


def test_whoever_draws_nothing_cannot_be_looked_at(tiny_model, two_pairs):
    with pytest.raises(ModelError, match="validation draws pictures, and TinyModel cannot draw any"):
        trainer_of().train(two_pairs, tiny_model, seed=0, validation=held_out())


def test_the_best_look_wins_more_then_gains_more_then_came_first():
    assert best_result([look(1, 0.5), look(2, 0.9), look(3, 0.7)]).step == 2
    assert best_result([look(1, 0.5, gain=0.1), look(2, 0.5, gain=0.2)]).step == 2
    assert best_result([look(1, 0.5), look(2, 0.5)]).step == 1


def test_patience_counts_looks_since_the_best():
    rates = [0.5, 0.6, 0.6, 0.55]
    looks = [look(step, rate) for step, rate in enumerate(rates, start=1)]
    assert [held_out(patience=2).should_stop(looks[:count]) for count in range(5)] == [False, False, False, False, True]
    assert not held_out().should_stop(looks)


@pytest.mark.parametrize(
    "options",
    [{"prompts": ()}, {"every": 0}, {"strengths": ()}, {"strengths": (0.0,)}, {"patience": 0}, {"batch_size": 0}],
    ids=repr,
)
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(InvalidValueError, match="need at least one prompt and one strength"):
        held_out(**options)
