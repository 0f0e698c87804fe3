"""`RayCluster`: the door to a cluster, which makes the parts of a run that compute there."""

import logging
import signal
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, final

import ray

from artaug._internal.annotations import checked
from artaug._internal.arguments import argument_error, check_count
from artaug.critique import Critic
from artaug.errors import ClusterError, InvalidValueError
from artaug.scale.payloads import dumps
from artaug.scale.pool import ReplicaPool, Resources, cluster_resources
from artaug.scale.remote_parts import RemoteCritic, RemoteScorer, RemoteSynthesizer
from artaug.scale.work import critic_facts, scorer_facts, synthesizer_facts
from artaug.scoring import Scorer
from artaug.synthesis import Synthesizer

_LOG = logging.getLogger(__name__)
_CONNECT_S = 5.0


@checked
@final
class RayCluster:
    """A Ray cluster, or this machine as one: makes synthesizers, critics and scorers that compute on its workers.

    Each part is built on its worker, by a function: weights are loaded there and never sent, and keys come from the
    environment there. What this makes stands wherever a part of this process may, in `improve`, `enhance` and `compare`. The folder of
    a store must have the same path on all nodes, on a file system that they share.

    Args:
        address: of a cluster that runs: ``"auto"`` on one of its nodes, or ``"host:6379"``. None starts Ray on this machine, or
            uses the one that this process is connected to already.

    Raises:
        ClusterError: if no cluster answers there.

    >>> from artaug import playground
    >>> from artaug.scale import RayCluster
    >>> with RayCluster() as cluster:  # doctest: +SKIP
    ...     synthesizer = cluster.synthesizer(playground.synthesizer, replicas=2)
    """

    def __init__(self, address: str | None = None) -> None:
        self._pools: list[ReplicaPool] = []
        self._owns_ray = not ray.is_initialized()
        if address is not None:
            _check_reachable(address)
        if not self._owns_ray:
            here = ray.get_runtime_context().gcs_address
            if address not in {None, "auto", here}:
                raise ClusterError(
                    f"RayCluster({address!r}): this process is connected to the cluster at {here} already. Call ray.shutdown() "
                    "first, or leave the address out."
                )
            return
        sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
                address=address or "local",  # None would be any cluster that happens to run here
                include_dashboard=False if address is None else None,
                log_to_driver=False,
                logging_level=logging.ERROR,  # its warnings at the start are about Ray of this machine, and expected
                namespace="artaug",
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            ray.shutdown()  # what is half connected would answer for the next one
            raise ClusterError(
                f"RayCluster({address!r}): {type(error).__name__}: {error}. Start a cluster with `ray start --head`, or leave "
                "the address out to use this machine."
            ) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, sigterm)  # which Ray replaces

    def synthesizer(
        self,
        build: Callable[[], Synthesizer],
        *,
        replicas: int = 1,
        gpus: float = 0,
        cpus: float = 1,
        threads: int = 1,
        timeout_s: float | None = None,
    ) -> RemoteSynthesizer:
        """A synthesizer with one copy of the model on each of its workers.

        Args:
            build: makes it, on the worker: a function without arguments, such as ``functools.partial(
                DiffusersSynthesizer.from_pretrained, "black-forest-labs/FLUX.1-dev", guide=aa.RegionalAttention())``.
            replicas: workers, at least 1; with several GPUs, one for each.
            gpus: GPUs that a worker takes, 0 or more. Of parts of one, several workers share a card, which keeps nobody
                from another one's memory: what does not fit fails on that card, whoever asked for it.
            cpus: processor cores that a worker takes.
            threads: of torch on the CPU in a worker, at least 1.
            timeout_s: seconds, more than 0, that a call may take, and a training between two reports, before its worker counts
                as dead: it is ended, and the call goes to another one. Several times what the slowest call takes. None waits
                for ever for a worker that hangs.

        Raises:
            InvalidValueError: for an argument out of its range, and for a function that cannot be sent or has a model or a
                key in it.
            ClusterError: if the cluster has not as much, or the function fails three times.
        """
        resources = self._resources("synthesizer", replicas=replicas, gpus=gpus, cpus=cpus, threads=threads)
        return RemoteSynthesizer(self._pool("synthesizer", build, synthesizer_facts, replicas, resources, timeout_s))

    def critic(
        self,
        build: Callable[[], Critic],
        *,
        replicas: int = 1,
        gpus: float = 0,
        cpus: float = 1,
        threads: int = 1,
        timeout_s: float | None = None,
    ) -> RemoteCritic:
        """A critic with one copy of its model on each of its workers; the arguments are those of `synthesizer`.

        A critic that calls a server needs no worker: pass it to the run as it is.
        """
        resources = self._resources("critic", replicas=replicas, gpus=gpus, cpus=cpus, threads=threads)
        return RemoteCritic(self._pool("critic", build, critic_facts, replicas, resources, timeout_s))

    def scorer(
        self,
        build: Callable[[], Scorer],
        *,
        replicas: int = 1,
        gpus: float = 0,
        cpus: float = 1,
        threads: int = 1,
        timeout_s: float | None = None,
    ) -> RemoteScorer:
        """A scorer with one copy of its model on each of its workers; the arguments are those of `synthesizer`."""
        resources = self._resources("scorer", replicas=replicas, gpus=gpus, cpus=cpus, threads=threads)
        return RemoteScorer(self._pool("scorer", build, scorer_facts, replicas, resources, timeout_s))

    def close(self) -> None:
        """End all workers, and Ray if this started it. Parts that were made here cannot be used after that."""
        for pool in self._pools:
            pool.close()
        self._pools.clear()
        if self._owns_ray:
            ray.shutdown()
            self._owns_ray = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        """How many parts it has made."""
        return f"<RayCluster with {len(self._pools)} parts>"

    def _pool(
        self,
        name: str,
        build: Callable[[], Any],
        facts: Callable[[object], dict[str, Any]],
        replicas: int,
        resources: Resources,
        timeout_s: float | None,
    ) -> ReplicaPool:
        if not callable(build):
            advice = "Such as functools.partial(DiffusersSynthesizer.from_pretrained, name, guide=...)."
            raise argument_error(
                f"RayCluster.{name}",
                "build",
                build,
                expected=f"a function that makes a {name} on a worker",
                advice=advice,
            )
        if timeout_s is not None and (isinstance(timeout_s, bool) or not 0 < timeout_s < float("inf")):
            raise argument_error(f"RayCluster.{name}", "timeout_s", timeout_s, expected="seconds, more than 0, or None")
        what = f"RayCluster.{name}: the function"
        pool = ReplicaPool(name, dumps(build, what=what), dumps(facts, what=what), replicas, resources, timeout_s)
        try:
            pool.start()
        except BaseException:
            pool.close()
            raise
        self._pools.append(pool)
        return pool

    def _resources(self, name: str, *, replicas: int, gpus: float, cpus: float, threads: int) -> Resources:
        owner = f"RayCluster.{name}"
        check_count(owner, "replicas", replicas, least=1)
        check_count(owner, "threads", threads, least=1)
        for what, number in (("gpus", gpus), ("cpus", cpus)):
            if isinstance(number, bool) or not 0 <= number < float("inf"):
                raise argument_error(owner, what, number, expected="a number of at least 0")
            if what == "gpus" and number > 1 and number != int(number):
                raise InvalidValueError(f"{owner}(gpus={number}): more than one GPU is a whole number of them.")
        taken = {"GPU": gpus * replicas, "CPU": cpus * replicas}
        for pool in self._pools:
            taken["GPU"] += pool.resources.gpus * pool.replicas
            taken["CPU"] += pool.resources.cpus * pool.replicas
        total = cluster_resources()
        for kind, count in taken.items():
            if count > total.get(kind, 0):
                raise ClusterError(
                    f"{owner}: with this one, the parts of this cluster take {count:g} {kind}, and it has "
                    f"{total.get(kind, 0):g}. Ask for fewer replicas or smaller shares, or add nodes."
                )
        if not gpus and total.get("GPU"):
            _LOG.warning("%s(gpus=0): its model will be on the CPU, and the cluster has %g GPU", owner, total["GPU"])
        resources = Resources(gpus=gpus, cpus=cpus, threads=threads)
        if not resources.fit_a_node():
            raise ClusterError(
                f"{owner}: a worker needs {resources} on one node, and no node of the cluster has as much. Ask for less, or add "
                "such a node."
            )
        return resources


def _check_reachable(address: str) -> None:
    """Refuse an address at which nobody listens: Ray itself would try for a long time."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():  # "auto", "local"
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ClusterError(
            f"RayCluster({address!r}): nobody answers there: {error}. Start a cluster with `ray start --head` and pass the "
            "address that it prints, or leave it out to use this machine."
        ) from error
