"""Stopping in order: real processes and real signals; what was there before is called, put back and obeyed."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from artaug.run.interruption import GracefulStop
from artaug.run.storage.lock import RunLock

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="it has no kill")

LOOP = """
import signal, sys, time
from artaug.run.interruption import GracefulStop

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
with GracefulStop() as stop:
    print("ready", end="")  # in a buffer, which the end of the process has to flush
    open(sys.argv[1], "w").close()
    for chunk in range(1000):
        deadline = time.monotonic() + {chunk_s}
        while time.monotonic() < deadline:
            time.sleep(0.01)
        print(" chunk", end="")
        stop.raise_if_requested("1 chunk is kept.")
print(" end", end="")
"""


@pytest.fixture
def started(tmp_path):
    """Start the loop in a process of its own, and wait until it handles signals."""
    processes = []

    def start(*, chunk_s=0.1):
        path = tmp_path / str(len(processes))
        process = subprocess.Popen(
            [sys.executable, "-c", LOOP.format(chunk_s=chunk_s), str(path)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        while not path.exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def handlers():
    """Python's own handlers, and after the test what was there before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def current():
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)


def test_the_first_signals_finish_the_chunk_and_the_process_ends_as_its_sender_expects(started):
    interrupted, terminated = started(), started()
    interrupted.send_signal(signal.SIGINT)
    terminated.send_signal(signal.SIGTERM)

    out, err = interrupted.communicate(timeout=20)
    assert interrupted.returncode in (-signal.SIGINT, 130)
    assert out.startswith("ready chunk")
    assert " end" not in out
    assert "SIGINT: stopping in order" in err.splitlines()[1]
    assert "A second signal stops at once." in err
    assert "KeyboardInterrupt: stopped by SIGINT. 1 chunk is kept." in err

    out, err = terminated.communicate(timeout=20)
    assert terminated.returncode == -signal.SIGTERM
    assert out.startswith("ready chunk")
    assert " end" not in out
    assert err.splitlines()[-1] == "artaug: stopped by SIGTERM. 1 chunk is kept."
    assert "Traceback" not in err


def test_a_second_signal_stops_at_once(started):
    """Of a chunk of a minute nothing is waited for."""
    process = started(chunk_s=60)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert "stopping in order" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode in (-signal.SIGINT, 130)
    assert "KeyboardInterrupt: stopped at once by a second signal" in err
    assert "chunk" not in out


def test_a_second_sigterm_ends_the_process_at_once():
    def twice():
        with GracefulStop():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            os._exit(1)

    assert in_child(twice) == -signal.SIGTERM


def test_a_handler_that_exits_does_so_at_the_safe_point():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    with pytest.raises(SystemExit) as caught, GracefulStop() as stop:  # noqa: PT012 - the block itself raises
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested == signal.SIGTERM
        stop.raise_if_requested("1 chunk is kept.")
    assert caught.value.code == 7
    assert caught.value.__notes__ == ["Stopped by SIGTERM. 1 chunk is kept."]


def test_a_signal_is_asked_for_raised_at_the_safe_point_and_all_handlers_are_put_back():
    before = current()
    with GracefulStop() as stop:
        assert stop.requested is None
        stop.raise_if_requested("Nothing.")
    assert current() == before
    with pytest.raises(KeyboardInterrupt, match=r"^stopped by SIGINT\. 3 pictures are kept\.$"), GracefulStop() as stop:  # noqa: PT012 - the block itself raises
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == signal.SIGINT
        stop.raise_if_requested("3 pictures are kept.")
    assert current() == before
    with pytest.raises(ValueError, match="a bug"), GracefulStop():
        raise ValueError("a bug")
    assert current() == before


def test_a_signal_after_the_last_safe_point_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt, match=r"The run is complete\."), GracefulStop():
        signal.raise_signal(signal.SIGINT)


def test_an_error_after_a_signal_is_the_error():
    with pytest.raises(ValueError, match="a bug"), GracefulStop():  # noqa: PT012 - the block itself raises
        signal.raise_signal(signal.SIGINT)
        raise ValueError("a bug")


def test_handlers_that_were_there_are_called_at_every_signal_and_stay():
    calls = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *call: calls.append(call))
    before = current()
    with pytest.raises(KeyboardInterrupt, match="at once by a second signal, SIGINT"), GracefulStop() as stop:  # noqa: PT012 - the block itself raises
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
    assert [number for number, _ in calls] == [signal.SIGTERM, signal.SIGINT]
    assert all(frame is not None for _, frame in calls)
    assert current() == before


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with GracefulStop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_handler_of_a_c_library_is_left_alone(monkeypatch):
    """``signal.signal`` cannot put it back."""
    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    installed = []
    monkeypatch.setattr(signal, "signal", lambda *call: installed.append(call))
    with GracefulStop():
        pass
    assert installed == []


def test_a_handler_that_others_installed_inside_stays():
    def theirs(*_):
        pass

    with GracefulStop():
        signal.signal(signal.SIGTERM, theirs)
    assert current() == (signal.default_int_handler, theirs)


def test_a_handler_put_on_top_inside_reaches_those_of_before_after_the_end():
    calls = []
    signal.signal(signal.SIGTERM, lambda number, _: calls.append(number))
    with GracefulStop():
        ours = signal.getsignal(signal.SIGTERM)

        def on_top(number, frame):
            ours(number, frame)

        signal.signal(signal.SIGTERM, on_top)
    signal.raise_signal(signal.SIGTERM)
    assert calls == [signal.SIGTERM]


def test_nested_blocks_both_know_and_the_line_is_written_once(capfd):
    before = current()
    with pytest.raises(KeyboardInterrupt, match=r"inner"), GracefulStop() as outer, GracefulStop() as inner:  # noqa: PT012 - the block itself raises
        signal.raise_signal(signal.SIGINT)
        assert outer.requested == inner.requested == signal.SIGINT
        inner.raise_if_requested("inner.")
    assert current() == before
    assert capfd.readouterr().err.count("stopping in order") == 1


def test_the_end_of_an_inner_block_leaves_the_stop_to_the_outer_one():
    with pytest.raises(KeyboardInterrupt, match=r"outer"), GracefulStop() as outer:  # noqa: PT012 - the block itself raises
        with GracefulStop():
            signal.raise_signal(signal.SIGINT)
        outer.raise_if_requested("outer.")


def test_in_another_thread_it_does_nothing():
    before, seen = current(), []

    def run():
        with GracefulStop() as stop:
            stop.raise_if_requested("Nothing.")
            seen.append((stop.requested, current()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_a_task_of_asyncio_is_interrupted_in_order():
    """Its handler cancels the task; a second signal would raise."""
    seen = []

    async def run():
        with GracefulStop() as stop:
            signal.raise_signal(signal.SIGINT)
            seen.append(stop.requested)
            stop.raise_if_requested("1 chunk is kept.")

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(run())
    assert seen == [signal.SIGINT]


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_forked_child_ends_by_the_signal_as_if_there_were_no_block(blocks, in_thread):
    """Else ``terminate`` of a pool, or of a data loader's worker, would end nothing."""
    children = []
    ready, is_ready = os.pipe()

    def fork():
        child = os.fork()
        if child == 0:
            os.write(is_ready, b".")
            time.sleep(60)
            os._exit(0)
        children.append(child)

    with contextlib.ExitStack() as stack:
        stop = [stack.enter_context(GracefulStop()) for _ in range(blocks)][-1]
        if in_thread:
            thread = threading.Thread(target=fork)
            thread.start()
            thread.join()
        else:
            fork()
        os.read(ready, 1)  # a signal that comes while Python is still forking would be another test
        os.kill(children[0], signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == -signal.SIGTERM
        assert stop.requested is None
    os.close(ready)
    os.close(is_ready)


def in_child(work):
    """The exit status of a forked child that does ``work``."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        code = 99
        try:
            with contextlib.suppress(KeyboardInterrupt):
                work()
                code = 0
        except SystemExit as exit_:
            code = exit_.code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_process_that_no_signal_ends_exits_with_the_status_of_one():
    def first_of_a_container():
        with GracefulStop() as stop:
            signal.raise_signal(signal.SIGTERM)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            stop.raise_if_requested("All is kept.")

    assert in_child(first_of_a_container) == 128 + signal.SIGTERM


def test_sigterm_ends_the_process_also_after_the_last_safe_point_and_after_an_error():
    def complete():
        with GracefulStop():
            signal.raise_signal(signal.SIGTERM)

    def failed():
        with GracefulStop():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("a bug")

    assert in_child(complete) == in_child(failed) == -signal.SIGTERM


def test_a_folder_is_let_go_of_before_sigterm_ends_the_process(tmp_path):
    def run():
        with GracefulStop() as stop, RunLock(tmp_path):
            signal.raise_signal(signal.SIGTERM)
            stop.raise_if_requested("All is kept.")

    assert in_child(run) == -signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_signal_within_a_print_is_written_all_the_same(capfd):
    """Buffered streams refuse a handler that prints while they print."""
    with contextlib.suppress(KeyboardInterrupt), GracefulStop() as stop:
        for _ in range(200):
            timer = threading.Timer(0.0005, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            for _ in range(200):
                print("x" * 100, file=sys.stderr)  # noqa: T201 - what it is about
            timer.join()
            stop.raise_if_requested("Enough.")
    assert "stopping in order" in capfd.readouterr().err
