"""Replicas of one part: who is free, who has died, and who takes its place."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray import ObjectRefGenerator
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from artaug.errors import ClusterError, WorkerDiedError
from artaug.scale.payloads import Payload, dumps
from artaug.scale.replica import BuiltPart, Replica, Reply, Work

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_DIED = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError, GetTimeoutError)
"""The process is gone, or its reply is, with the node that held it; or it hangs, and is ended."""
_MAX_STARTS = 3
"""Of one replica, before the run ends: a model that does not load will not load the fourth time."""
_WAIT_S = 30.0
"""Between two looks at what a pool without a living replica waits for."""
_CLOSE_S = 10.0
"""How long the end of a pool waits for the threads that were building."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one replica takes of the cluster."""

    gpus: float
    cpus: float
    threads: int

    def __str__(self) -> str:
        """What a node must have for it."""
        return " and ".join(f"{count:g} {kind}" for kind, count in self._amounts.items() if count) or "nothing"

    def fit_a_node(self) -> bool:
        """Whether a node of the cluster has as much, free or not: a replica is on one node."""
        nodes: list[dict[str, Any]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        return any(all(node.get(kind, 0) >= count for kind, count in self._amounts.items()) for node in nodes)

    @property
    def _amounts(self) -> dict[str, float]:
        return {"GPU": self.gpus, "CPU": self.cpus}


@dataclass(eq=False)
class ReplicaPool:
    """Calls replicas of a part, each with one call at a time. Its methods may be called from many threads."""

    name: str
    """For errors and logs."""
    factory: Payload
    facts: Payload
    replicas: int
    resources: Resources
    timeout_s: float | None = None
    """What a call may take, and a streamed one between two reports, before its process counts as dead; None: for ever."""
    description: BuiltPart = field(init=False)
    """Of the first replica that started."""
    loads: int = field(default=0, init=False)
    """How often the part was built, by all replicas together."""
    _changed: threading.Condition = field(default_factory=threading.Condition, init=False)
    _free: deque[Any] = field(default_factory=deque, init=False)
    _alive: set[Any] = field(default_factory=set, init=False)
    _building: set[Any] = field(default_factory=set, init=False)
    _fault: ClusterError | None = field(default=None, init=False)
    _closed: bool = field(default=False, init=False)
    _deaths_in_a_row: int = field(default=0, init=False)
    _is_guest: bool = field(default=False, init=False)
    """Whether this is a copy in a worker: the replicas belong to another process, which sees to them."""

    def __reduce__(self) -> tuple[Callable[..., "ReplicaPool"], tuple[Any, ...]]:
        """What goes to a worker that uses this pool: it calls the replicas that live now, and starts none."""
        with self._changed:
            settings = self.name, self.factory, self.facts, self.replicas, self.resources, self.timeout_s
            return _guest, (settings, self.description, list(self._alive))

    @property
    def workers(self) -> str:
        """How many there are, in words."""
        return f"{self.replicas} worker{'s' * (self.replicas != 1)}"

    def adopt(self, replicas: Sequence[Any]) -> None:
        """Use the replicas of another process, which sees to them."""
        self._alive, self._free, self._is_guest = set(replicas), deque(replicas), True

    def start(self) -> None:
        """Build the replicas, and wait for the first one; the others join as they come.

        Raises:
            ClusterError: if it cannot be built.
        """
        for _ in range(self.replicas):
            self._begin_replica()
        with self._changed:
            self._wait_until(lambda: bool(self._alive))

    def wait_for_all(self) -> None:
        """Wait until every replica has been built.

        Raises:
            ClusterError: if one cannot be built.
        """
        with self._changed:
            self._wait_until(lambda: len(self._alive) == self.replicas)

    def call(self, work: Work, *, retries: int = 1) -> Any:  # noqa: ANN401 - what the work returns
        """Let a free replica do something, and wait for it; again, ``retries`` times, if its process dies at it.

        Raises:
            WorkerDiedError: if it dies each time.
            ClusterError: if there is no replica any more.
            BaseException: what the work raises.
        """
        payload = dumps(work, what=f"a call of {self.name}")
        return self._retried(lambda actor: self._in_time(actor.call.remote(payload)), retries)

    def stream(self, work: Work, *, on_report: Callable[[Any], object], retries: int = 1) -> Any:  # noqa: ANN401
        """As `call`, with ``on_report`` called in this thread with what the work reports; what it raises ends the work."""
        payload = dumps(work, what=f"a call of {self.name}")

        def follow(actor: Any) -> Reply:  # noqa: ANN401 - ray has no types
            reports = actor.stream.options(num_returns="streaming").remote(payload)
            while True:
                report = self._in_time(reports)
                if isinstance(report, Reply):
                    return report
                on_report(report)

        return self._retried(follow, retries)

    def close(self) -> None:
        """End the processes of all replicas, also of those that are being built."""
        with self._changed:
            self._closed, actors = True, [*self._alive, *self._building]
            self._alive.clear()
            self._free.clear()
            self._changed.notify_all()
        for actor in actors:
            _end(actor)
        with self._changed:
            self._changed.wait_for(lambda: not self._building, _CLOSE_S)

    def _in_time(self, awaited: Any) -> Any:  # noqa: ANN401 - ray has no types
        """What a reference has, or the next one of a generator of them."""
        if not ray.wait([awaited], timeout=self.timeout_s)[0]:
            raise GetTimeoutError(f"it has not answered within {self.timeout_s:g} s, its timeout_s")
        return ray.get(next(awaited) if isinstance(awaited, ObjectRefGenerator) else awaited)

    def _retried(self, ask: Callable[[Any], Reply], retries: int) -> Any:  # noqa: ANN401
        died = 0
        while True:
            actor = self._take()
            try:
                reply = ask(actor)
            except RayError as error:
                died += 1
                self._bury(actor, error)
                if not isinstance(error, _DIED):
                    raise ClusterError(f"{self.name}: {_summary(error)}") from error
                if died > retries:
                    raise WorkerDiedError(f"{_summary(error)} ({died} time{'s' * (died > 1)})") from error
                continue
            except BaseException:  # by the caller's function, or a signal: the replica is in the middle of something
                self._bury(actor, None)
                raise
            self._give_back(actor)
            return reply.value()

    def _take(self) -> Any:  # noqa: ANN401 - ray has no types
        with self._changed:
            self._wait_until(lambda: bool(self._free))
            return self._free.popleft()

    def _wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait, with the lock, and say twice a minute what for.

        Raises:
            ClusterError: if a replica could not be built, also where others are free, or the pool is closed.
        """
        start_s = time.monotonic()
        while True:
            if self._fault is not None:
                raise ClusterError(str(self._fault)) from self._fault.__cause__  # a new one: threads share the fault
            if self._closed:
                raise ClusterError(f"{self.name} was closed. Make it anew, from a cluster that is open.")
            if ready():
                return
            if not self._changed.wait(_WAIT_S) and not self._alive:
                self._check_room(time.monotonic() - start_s)

    def _give_back(self, actor: Any) -> None:  # noqa: ANN401
        with self._changed:
            self._deaths_in_a_row = 0
            if not self._closed:
                self._free.append(actor)
                self._changed.notify()

    def _bury(self, actor: Any, error: RayError | None) -> None:  # noqa: ANN401
        """Note that a replica is gone, and begin another one. Its process ends, if it has not: it would keep its GPU."""
        _end(actor)
        with self._changed:
            self._alive.discard(actor)
            if self._closed:
                return
            if error is not None:
                self._deaths_in_a_row += 1
                _LOG.warning("a worker of %s is gone, and another one takes its place: %s", self.name, _summary(error))
            if self._deaths_in_a_row > 4 + 2 * self.replicas:
                self._fail(
                    ClusterError(
                        f"{self.name}: {self._deaths_in_a_row} workers died one after the other, and none has finished a "
                        f"call between; the last one: {_summary(error)}. Look at the memory and the logs of the nodes; "
                        "the same call goes on from the store."
                    )
                )
                return
            if self._is_guest:
                if not self._alive:
                    self._fail(ClusterError(f"{self.name}: its workers are gone."))
                return
        self._begin_replica()

    def _begin_replica(self) -> None:
        threading.Thread(target=self._build, name=f"artaug-{self.name}", daemon=True).start()

    def _build(self) -> None:
        """Start a process and let it build the part, up to three times."""
        faults: list[BaseException] = []
        while len(faults) < _MAX_STARTS:
            actor: Any = None
            try:
                with self._changed:
                    if self._closed:
                        return
                    actor = self._new_actor()
                    self._building.add(actor)
                description = ray.get(actor.describe.remote()).value()
                self._join(actor, description)
            except BaseException as error:  # noqa: BLE001 - raised by whoever calls the pool next
                if self._closed:
                    return
                _end(actor)
                faults.append(error)
                _LOG.warning("a worker of %s did not start: %s", self.name, _summary(error))
            else:
                return
            finally:
                with self._changed:
                    self._building.discard(actor)
                    self._changed.notify_all()
        with self._changed:
            self._fail(
                ClusterError(
                    f"{self.name}: its worker could not be built, {len(faults)} times; the last time "
                    f"{type(faults[-1]).__name__}: {faults[-1]}"
                ),
                faults[-1],
            )

    def _new_actor(self) -> Any:  # noqa: ANN401
        return (
            ray.remote(Replica)
            .options(num_gpus=self.resources.gpus, num_cpus=self.resources.cpus, max_restarts=0, max_task_retries=0)
            .remote(self.factory, self.facts, threads=self.resources.threads)
        )

    def _join(self, actor: Any, description: BuiltPart) -> None:  # noqa: ANN401
        with self._changed:
            self.loads += 1
            if self._closed:
                _end(actor)
                return
            if not hasattr(self, "description"):
                self.description = description
            elif (difference := _difference(self.description, description)) is not None:
                _end(actor)
                self._fail(
                    ClusterError(
                        f"{self.name}: its workers have built different parts. {difference}. Make the function the same "
                        "everywhere: the same files, revision and settings on every node."
                    )
                )
                return
            self._alive.add(actor)
            self._free.append(actor)
            self._changed.notify_all()

    def _fail(self, fault: ClusterError, cause: BaseException | None = None) -> None:
        fault.__cause__ = cause
        self._fault = fault
        self._changed.notify_all()

    def _check_room(self, waited_s: float) -> None:
        """Say what a pool without replicas waits for; end the run if the cluster has no room for one any more."""
        _LOG.warning(
            "%s has no worker for %.0f s: it waits until one is built, or until a node has room for it; free are %s",
            *(self.name, waited_s, ray.available_resources()),  # type: ignore[no-untyped-call]
        )
        if not self.resources.fit_a_node() and waited_s > 2 * _WAIT_S:
            self._fail(
                ClusterError(
                    f"{self.name}: no worker is left, and no node of the cluster has {self.resources} for another one."
                )
            )


def _guest(settings: tuple[Any, ...], description: BuiltPart, replicas: Sequence[Any]) -> ReplicaPool:
    """A pool of another process, as a worker uses it."""
    pool = ReplicaPool(*settings)
    pool.description = description
    pool.adopt(replicas)
    return pool


def cluster_resources() -> dict[str, float]:
    """What all nodes of the cluster have: "GPU", "CPU" and others."""
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return total


def _difference(first: BuiltPart, other: BuiltPart) -> str | None:
    """How two replicas differ, in what decides their results; on which device they are does not."""
    names = sorted({*first.identity, *other.identity})
    for name in (name for name in names if not name.endswith(".device")):
        here, there = first.identity.get(name, "nothing"), other.identity.get(name, "nothing")
        if here != there:
            return f"{name or 'It'} is {here} on one and {there} on another"
    return None


def _end(actor: Any) -> None:  # noqa: ANN401
    """End the process of an actor, if there is one; it may have ended before, with its Ray too."""
    if actor is not None and ray.is_initialized():
        ray.kill(actor)


def _summary(error: BaseException | None) -> str:
    """One line: of what failed on a worker the last one, since its traceback comes first."""
    lines = str(error).strip().split("\n")
    return lines[-1 if isinstance(error, RayTaskError) else 0].strip()
