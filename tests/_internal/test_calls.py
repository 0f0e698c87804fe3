"""Calls of users' objects: which exceptions are tried again, and how those that are not name their source."""

import logging
import time

import pytest

import artaug as aa
from artaug._internal.calls import call_part
from support.clock import FakeTime


@pytest.fixture
def clock(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr("artaug._internal.calls.time", fake)
    return fake


def raising(*errors):
    """A function that raises each of some errors, and then answers."""
    remaining = list(errors)

    def function():
        if remaining:
            raise remaining.pop(0)
        return "an answer"

    return function


def call(function, **options):
    return call_part(function, owner="Mine", inputs="the plan of 'a pear'", **options)


@pytest.mark.parametrize("error_class", [aa.PartError, aa.ScoringError])
def test_a_bug_is_raised_at_once_and_wrapped_once(clock, error_class):
    bug = KeyError("boxes")
    with pytest.raises(error_class) as caught:
        call(lambda: call(raising(bug), error_class=error_class))
    assert str(caught.value) == "Mine raised KeyError: 'boxes', for the plan of 'a pear'."
    assert caught.value.__cause__ is bug
    assert type(caught.value) is error_class
    assert clock.slept == []


@pytest.mark.parametrize("error", [aa.NonFiniteError("NaN"), MemoryError("no room")], ids=repr)
def test_an_error_of_artaug_and_running_out_of_memory_stay_themselves_and_get_a_note(clock, error):
    with pytest.raises(type(error)) as caught:
        call(raising(error))
    assert caught.value is error
    assert error.__notes__ == ["Raised by Mine, for the plan of 'a pear'."]
    assert clock.slept == []


def test_what_passes_is_tried_again_and_logged_once(clock, caplog):
    with caplog.at_level(logging.WARNING):
        assert call(raising(TimeoutError("slow"), ConnectionResetError(), TimeoutError())) == "an answer"
    assert len(clock.slept) == 3
    (record,) = caplog.records
    assert record.getMessage() == (
        "Mine raised TimeoutError: slow, for the plan of 'a pear'; it is tried again for up to 10 minutes"
    )


def test_what_does_not_pass_for_ten_minutes_ends_the_run_and_says_how_to_go_on(clock):
    def function():
        raise TimeoutError("slow")

    with pytest.raises(
        aa.PartError, match=r"Mine has not answered for 10 minutes, after .* for the plan of 'a pear'"
    ) as caught:
        call(function)
    assert "TimeoutError: slow" in str(caught.value)
    assert "run the same call to go on" in str(caught.value)
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert 560 < sum(clock.slept) <= 600


def test_the_error_of_an_inner_call_that_was_tried_for_ten_minutes_is_not_tried_again(clock):
    def function():
        raise TimeoutError

    with pytest.raises(aa.PartError):
        call(lambda: call(function))
    assert sum(clock.slept) <= 600


def test_a_call_that_cannot_be_repeated_is_not():
    with pytest.raises(aa.PartError, match="Mine raised TimeoutError"):
        call(raising(TimeoutError()), retry=False)


def test_an_interruption_ends_the_wait(monkeypatch):
    def interrupted(_seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(raising(TimeoutError()))
