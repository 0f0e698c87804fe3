"""Progress: an event per step, the throughput of that step alone, and a bar."""

import pytest

from artaug.training import progress
from artaug.training.progress import ProgressLog

STEP = {"loss": 0.5, "gradient_norm": 2.0, "learning_rate": 1e-3}


@pytest.fixture
def clock(monkeypatch):
    """A clock that is moved by hand."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(progress.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_an_event_describes_its_step(clock):
    events = []
    with ProgressLog(9, events.append, initial=4, show=False) as log:
        clock.now = 2.0
        log.log_step(5, pairs=8, **STEP)
        assert log.seconds == 2.0
    (event,) = events
    assert (event.step, event.steps, event.loss, event.gradient_norm, event.learning_rate) == (5, 9, 0.5, 2.0, 1e-3)
    assert (event.seconds, event.pairs_per_second) == (2.0, 4.0)


def test_the_throughput_of_a_step_counts_from_the_last_step_or_reset(clock):
    events = []
    with ProgressLog(9, events.append, initial=0, show=False) as log:
        clock.now = 1.0
        log.log_step(1, pairs=2, **STEP)
        clock.now = 1.5
        log.log_step(2, pairs=2, **STEP)
        clock.now = 61.5  # a minute in which a checkpoint was written
        log.reset_timer()
        clock.now = 62.0
        log.log_step(3, pairs=2, **STEP)
    assert [event.pairs_per_second for event in events] == [2.0, 4.0, 4.0]
    assert [event.seconds for event in events] == [1.0, 1.5, 62.0]


def test_a_resumed_training_shows_the_steps_it_has_behind_it(capsys):
    with ProgressLog(4, None, initial=3, show=True) as log:
        log.log_step(4, pairs=2, **STEP)
    shown = capsys.readouterr().err
    assert "75%" in shown
    assert "100%" in shown
    assert "loss 0.5" in shown


def test_no_progress_is_shown_by_default(capsys):
    with ProgressLog(1, None, initial=0, show=False) as log:
        log.log_step(1, pairs=2, **STEP)
    assert not capsys.readouterr().err


def test_an_exception_of_the_callback_ends_the_training():
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ProgressLog(1, stop, initial=0, show=False) as log:
        log.log_step(1, pairs=2, **STEP)
