"""Pools of replicas at their ends: nobody waits for ever, nothing is left running, and a fault is told every time."""

import logging
import os
import threading
import time
from dataclasses import dataclass

import pytest
import ray

import artaug as aa
from artaug.scale import RayCluster, pool
from artaug.scale.payloads import dumps
from artaug.scale.work import synthesizer_facts
from artaug.testing import SwatchSynthesizer
from support.cluster_parts import BuildsOthers, count, note

pytestmark = pytest.mark.loopback
ONE_CORE = pool.Resources(gpus=0, cpus=1, threads=1)


@dataclass(frozen=True)
class BuildsSlowly:
    """Tells in which process it has begun, and takes a minute."""

    folder: str

    def __call__(self):
        note(self.folder, f"begun by {os.getpid()} ")
        time.sleep(60)
        return SwatchSynthesizer()


def new_pool(build, resources=ONE_CORE):
    facts = dumps(synthesizer_facts, what="facts")
    return pool.ReplicaPool("synthesizer", dumps(build, what="the function"), facts, 1, resources)


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.usefixtures("local_ray")
def test_a_pool_that_is_closed_ends_a_worker_that_is_still_being_built_and_whoever_waits_for_it(tmp_path):
    slow, raised = new_pool(BuildsSlowly(str(tmp_path))), []

    def start():
        try:
            slow.start()
        except aa.ClusterError as error:
            raised.append(str(error))

    waiting = threading.Thread(target=start)
    waiting.start()
    wait_for(lambda: count(tmp_path, "begun"))
    (begun,) = tmp_path.iterdir()
    slow.close()
    waiting.join(10)
    assert "was closed" in raised[0]
    wait_for(lambda: not is_running(int(begun.name.split()[2].split("-")[0])), 10)
    assert not [thread for thread in threading.enumerate() if thread.name == "artaug-synthesizer"]


def test_a_share_that_ray_does_not_know_is_an_error_and_no_endless_wait(cluster):
    with pytest.raises(aa.ClusterError, match=r"could not be built, 3 times; .* precision"):
        cluster.synthesizer(SwatchSynthesizer, cpus=1e-5)


def test_a_fault_is_told_also_where_another_worker_is_free_and_each_time_as_a_new_error(cluster, tmp_path):
    synthesizer = cluster.synthesizer(BuildsOthers(str(tmp_path)), replicas=2)
    with pytest.raises(aa.ClusterError, match="different parts") as first:
        synthesizer.pool.wait_for_all()
    with pytest.raises(aa.ClusterError, match="different parts") as second:
        synthesizer.synthesize(aa.Plan("a"), seed=0)
    assert first.value is not second.value


def test_who_waits_for_a_busy_cluster_is_told_so(cluster, monkeypatch, caplog):
    monkeypatch.setattr(pool, "_WAIT_S", 0.2)
    taken = cluster.synthesizer(SwatchSynthesizer, cpus=14)
    waiting = new_pool(SwatchSynthesizer, pool.Resources(gpus=0, cpus=8, threads=1))
    with caplog.at_level(logging.WARNING, "artaug"):
        starting = threading.Thread(target=waiting.start)
        starting.start()
        wait_for(lambda: "it waits until one is built, or until a node has room" in caplog.text)
    taken.pool.close()
    starting.join(30)
    assert waiting.loads == 1
    waiting.close()


@pytest.mark.usefixtures("local_ray")
def test_a_worker_that_fits_no_node_is_refused_also_where_all_nodes_together_have_as_much(monkeypatch):
    node = {"Alive": True, "Resources": {"CPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [node, node, {"Alive": False, "Resources": {"CPU": 64.0}}])
    with RayCluster() as cluster, pytest.raises(aa.ClusterError, match="needs 12 CPU on one node, and no node"):
        cluster.synthesizer(SwatchSynthesizer, cpus=12)
