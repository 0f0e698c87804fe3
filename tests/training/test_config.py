"""The settings of a training: what is refused, and the learning rate of every step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artaug.errors import InvalidValueError
from artaug.training import DifferentialLoRATrainer, Schedule, TrainingConfig


@pytest.mark.parametrize(
    "option",
    [
        {"rank": 0},
        {"steps": 0},
        {"batch_size": 0},
        {"echo": 0},
        {"micro_batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"max_grad_norm": 0.0},
        {"warmup": -0.1},
        {"warmup": 1.1},
        {"ema": 0.0},
        {"ema": 1.0},
        {"sigma_range": (0.5, 0.5)},
        {"sigma_range": (-0.1, 1.0)},
        {"sigma_range": (0.0, 1.1)},
    ],
    ids=repr,
)
def test_a_setting_out_of_its_range_is_refused_and_quoted(option):
    ((name, value),) = option.items()
    with pytest.raises(InvalidValueError) as error:
        TrainingConfig(**option)
    assert f"TrainingConfig({name}={value!r}): need" in str(error.value)


@pytest.mark.parametrize(
    "option",
    [
        {"rank": 1},
        {"steps": 1},
        {"batch_size": 1},
        {"micro_batch_size": 1},
        {"warmup": 0.0},
        {"warmup": 1.0},
        {"ema": 1e-9},
        {"sigma_range": (0.0, 1.0)},
        {"targets": ""},
    ],
    ids=repr,
)
def test_a_setting_at_the_end_of_its_range_is_accepted(option):
    ((name, value),) = option.items()
    assert getattr(TrainingConfig(**option), name) == value


def test_all_settings_that_are_wrong_are_named_at_once():
    with pytest.raises(InvalidValueError, match=r"\(rank=0, ema=2.0\)"):
        TrainingConfig(rank=0, ema=2.0)


def test_targets_that_are_no_regular_expression_are_refused_under_the_trainers_name():
    with pytest.raises(InvalidValueError, match=r"DifferentialLoRATrainer\(targets='\('\) is no regular expression"):
        DifferentialLoRATrainer(targets="(")


def rates_of(steps, **options):
    config = TrainingConfig(learning_rate=1.0, **options)
    return [config.learning_rate_at(step, steps=steps) for step in range(1, steps + 1)]


def test_the_learning_rate_rises_linearly_and_then_follows_the_schedule():
    assert rates_of(4, warmup=0.5) == [0.5, 1.0, 1.0, 1.0]
    assert rates_of(4, warmup=1.0) == [0.25, 0.5, 0.75, 1.0]
    assert rates_of(4, warmup=0.0, schedule=Schedule.LINEAR) == [1.0, 0.75, 0.5, 0.25]
    assert rates_of(6, warmup=0.3, schedule=Schedule.LINEAR) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]  # 1.8: 2 warmup steps
    cosine = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert rates_of(4, warmup=0.0, schedule=Schedule.COSINE) == cosine


@given(steps=st.integers(1, 60), warmup=st.floats(0, 1), schedule=st.sampled_from(Schedule))
def test_no_step_has_a_rate_of_zero_or_above_the_learning_rate(steps, warmup, schedule):
    rates = rates_of(steps, warmup=warmup, schedule=schedule)
    warmup_steps = math.ceil(warmup * steps)
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:warmup_steps] == sorted(rates[:warmup_steps])
    assert rates[warmup_steps:] == sorted(rates[warmup_steps:], reverse=True)
    if warmup_steps < steps:
        assert rates[warmup_steps] == 1
