"""Jobs run one after the other until the time is up: what fits is begun, and every row is on disk before the next one.

A worker process takes one job after the other, since starting CUDA and building 12 billion weights costs more than most
jobs. A worker whose job failed ends, whatever it failed with: after an error of a kernel CUDA answers nothing else, and
memory that an exception still refers to is not free. The next job gets a new one. The log has a line of JSON for every
event; it is only added to, so that whoever is killed at any moment, all that was measured before is there. Nothing here
knows torch: what a job needs is imported where it runs.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

Row = Mapping[str, Any]
State = Literal["finished", "failed", "stopped", "skipped"]
"""With all rows; with an exception, a dead process or far too late; killed at the end of the time; not begun, since it
would not have fitted."""

_LONGEST = 3.0
"""A job is stopped after this many times its estimate: what hangs may not take the time of all others."""
_GRACE_S = 5.0
_PROCESSES = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
_MESSAGE = 2000


@dataclass(frozen=True, kw_only=True)
class Job:
    """A part of a benchmark, small enough to be left out."""

    name: str
    benchmark: str
    """Whose file in ``benchmarks/results`` its rows belong to."""
    seconds: float
    """How long it is expected to take."""
    rows: Callable[[], Iterable[Row]]
    """Measures; a function that pickle finds by name."""
    cudnn_attention: bool = True
    """Whether attention may run in cuDNN's kernels on a GPU."""


Prepare = Callable[[Job], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What the log says of a job."""

    name: str
    benchmark: str
    state: State
    estimate: float
    """Seconds."""
    seconds: float
    message: str
    rows: tuple[Row, ...]
    environment: Mapping[str, Any]


class Log:
    """The file of events; each is on disk when `write` returns."""

    def __init__(self, path: Path) -> None:
        """Add to ``path``; a line that a killed process did not finish is closed first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        if path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size:
            self._append("\n")

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        """Add one event."""
        self._append(json.dumps({"event": event, "at": round(time.time(), 3), **values}) + "\n")

    def _append(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def events(path: Path) -> Iterator[Mapping[str, Any]]:
    """The events of a log, without a line that was cut off."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            yield json.loads(line)


def attempts(path: Path) -> dict[str, Attempt]:
    """The best attempt at every job, in the order of the first: a finished one, else one with the most rows."""
    best: dict[str, Attempt] = {}
    begun: Mapping[str, Any] = {}
    environment: Mapping[str, Any] = {}
    rows: list[Row] = []

    def close(state: State, seconds: float, message: str) -> None:
        attempt = Attempt(
            name=begun["job"],
            benchmark=begun["benchmark"],
            state=state,
            estimate=begun["estimate"],
            seconds=seconds,
            message=message,
            rows=tuple(rows),
            environment=environment,
        )
        before = best.get(attempt.name)
        if before is None or _worth(attempt) >= _worth(before):
            best[attempt.name] = attempt

    for event in events(path):
        match event["event"]:
            case "job":
                if begun:  # the scheduler itself was killed
                    close("stopped", 0.0, "the scheduler was killed")
                begun, environment, rows = event, {}, []
            case "environment":
                environment = event["environment"]
            case "row":
                rows.append(event["row"])
            case "end":
                close(event["state"], event["seconds"], event["message"])
                begun = {}
            case _:  # a session's beginning
                pass
    if begun:
        close("stopped", 0.0, "the scheduler was killed")
    return best


def last_line(message: str) -> str:
    """What an exception says, without the lines that led to it."""
    return message.rpartition("\n")[2]


def _worth(attempt: Attempt) -> tuple[bool, int, bool]:
    return attempt.state == "finished", len(attempt.rows), attempt.state != "skipped"


def run(
    jobs: Sequence[Job],
    log: Log,
    *,
    minutes: float,
    start_seconds: float,
    prepare: Prepare,
) -> None:
    """Run what fits, in order; jobs that the log says are finished, or failed, are not run again.

    Args:
        jobs: the most valuable first.
        log: where events go.
        minutes: until the end.
        start_seconds: what a new worker needs before its first job.
        prepare: called in the worker before each job; returns what is recorded of the machine.
    """
    twice = [name for name, count in Counter(job.name for job in jobs).items() if count > 1]
    if twice:
        raise ValueError(f"jobs with one name: {', '.join(twice)}. Their rows could not be told apart: rename them.")
    ends = time.monotonic() + 60 * minutes
    done = {name for name, attempt in attempts(log.path).items() if attempt.state in {"finished", "failed"}}
    skipped: State = "skipped"
    worker = None
    try:
        for job in jobs:
            if job.name in done:
                continue
            left, needs = ends - time.monotonic(), job.seconds + (0 if worker else start_seconds)
            log.write("job", {"job": job.name, "benchmark": job.benchmark, "estimate": job.seconds})
            start = time.monotonic()
            if needs > left:
                state, message = skipped, f"needs {needs:.0f} s, {max(left, 0):.0f} s are left"
            else:
                worker = worker or Worker(prepare)
                state, message = worker.run(job, log, ends=ends, at_most=start_seconds + _LONGEST * job.seconds)
            seconds = round(time.monotonic() - start, 2)
            log.write("end", {"job": job.name, "state": state, "seconds": seconds, "message": message})
            print(f"{state}: {job.name}, {seconds:.0f} s. {last_line(message)}", flush=True)
            if worker and state in {"failed", "stopped"}:
                worker.kill()
                worker = None
    finally:
        if worker:
            worker.end()


class Worker:
    """A process that takes jobs, in a process group of its own with all that it starts."""

    def __init__(self, prepare: Prepare) -> None:
        """Start it."""
        self.connection, other = _PROCESSES.Pipe()
        self.process = _PROCESSES.Process(target=_work, args=(other, prepare))
        self.process.start()
        other.close()

    def run(self, job: Job, log: Log, *, ends: float, at_most: float) -> tuple[State, str]:
        """Give it a job and log what it measures, until a time or for some seconds at most; how that ended."""
        until = min(ends, time.monotonic() + at_most)
        try:
            self.connection.send(job)
            while self.connection.poll(max(0.0, until - time.monotonic())):
                kind, value = self.connection.recv()
                match kind:
                    case "finished":
                        return "finished", ""
                    case "failed":
                        return "failed", value
                    case _:
                        log.write(kind, {"job": job.name, kind: value})
        except (EOFError, ConnectionError):
            self.process.join()
            return "failed", f"its process ended with code {self.process.exitcode}"
        return ("stopped", "the time was up") if until == ends else ("failed", f"had not ended after {at_most:.0f} s")

    def end(self) -> None:
        """Let it end by itself, if it waits for a job."""
        self.connection.close()
        self.process.join(_GRACE_S)
        self.kill()

    def kill(self) -> None:
        """End it and all that it started."""
        if self.process.pid:
            with suppress(ProcessLookupError):  # it has had no time to make its group, or has ended
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def _as_json(values: Mapping[str, Any]) -> Any:  # noqa: ANN401 - what json gives
    """The values as the log will hold them; what JSON cannot hold is the error of the job, not of the log."""
    return json.loads(json.dumps(values))


def _work(connection: Connection, prepare: Prepare) -> None:
    """What a worker does: take jobs, send rows."""
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError):  # whoever gave the jobs is gone
        while True:
            job = connection.recv()
            try:
                connection.send(("environment", _as_json(prepare(job))))
                for row in job.rows():
                    connection.send(("row", _as_json(row)))
            except BaseException:
                connection.send(("failed", traceback.format_exc()[-_MESSAGE:].rstrip()))
                raise
            connection.send(("finished", None))


def _end_with_parent() -> None:
    """Whoever gave the jobs may be killed while one hangs: it would hold the GPU, and slow what is measured next."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os.killpg(0, signal.SIGKILL)
