"""Tasks beside each other: results in order, no more under way than asked for, and none left open."""

import threading
from concurrent.futures import Future

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artaug._internal.lanes import Lane
from artaug.run.flow import run_in_order


def nothing():
    pass


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 5), st.randoms(use_true_random=False))
def test_results_come_in_the_order_of_the_tasks_whatever_ends_first_and_never_more_are_under_way(waits, depth, random):
    open_tasks, most, pending = set(), 0, []

    def task(number, steps):
        nonlocal most
        open_tasks.add(number)
        most = max(most, len(open_tasks))
        for _ in range(steps):
            future = Future()
            pending.append(future)
            yield future
        open_tasks.discard(number)
        return number

    def something_happens():
        waiting = [future for future in pending if not future.done()]
        if waiting:
            random.choice(waiting).set_result(None)

    # Nobody else ends a future here: the poll between two looks does.
    tasks = (task(number, steps) for number, steps in enumerate(waits))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("artaug.run.flow._POLL_S", 0.0)
        assert list(run_in_order(tasks, depth=depth, poll=something_happens)) == list(range(len(waits)))
    assert most <= depth


@given(st.integers(1, 5), st.integers(0, 4))
def test_whatever_ends_it_every_task_under_way_is_closed_the_oldest_first_and_none_begins_after(depth, failing):
    begun, closed = [], []

    def task(number):
        begun.append(number)
        try:
            if number == failing:
                raise ArithmeticError
            yield Future()  # never done
        finally:
            closed.append(number)
        return number

    def stop():
        raise InterruptedError

    with pytest.raises(ArithmeticError if failing < depth else InterruptedError):
        list(run_in_order(map(task, range(10)), depth=depth, poll=stop))
    assert begun == list(range(min(failing + 1, depth)))
    still_open = [number for number in begun if number != failing]
    assert [number for number in closed if number != failing] == still_open


def test_an_error_of_a_task_that_is_closed_keeps_none_of_the_others_open():
    closed = []

    def task(number):
        try:
            yield Future()
        finally:
            closed.append(number)
            if number == 0:
                raise OSError("the disk is full")

    flow = run_in_order(map(task, range(3)), depth=3, poll=lambda: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(OSError, match="disk is full"):
        next(flow)
    assert closed == [0, 1, 2]


def test_a_consumer_that_stops_looking_closes_the_tasks():
    closed = []

    def task(number):
        try:
            if number:
                yield Future()
        finally:
            closed.append(number)
        return number

    flow = run_in_order(map(task, range(3)), depth=3, poll=nothing)
    assert next(flow) == 0
    flow.close()
    assert closed[0] == 0


def test_calls_of_a_lane_run_beside_each_other_and_raise_where_they_are_asked():
    meeting = threading.Barrier(2, timeout=20)
    with Lane(2, name="test") as lane:
        both = [lane.submit(meeting.wait) for _ in range(2)]
        assert sorted(future.result(20) for future in both) == [0, 1]
        failed = lane.submit(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            failed.result(20)


def test_a_call_that_is_cancelled_before_its_turn_is_never_made():
    release, made = threading.Event(), []
    with Lane(1, name="test") as lane:
        first = lane.submit(lambda: release.wait(20))
        second = lane.submit(lambda: made.append(1))
        assert second.cancel()
        release.set()
        assert first.result(20)
        lane.submit(nothing).result(20)
    assert made == []
