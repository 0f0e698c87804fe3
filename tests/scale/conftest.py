"""One small Ray of this machine for all tests of a process, and workers that several tests share."""

import os
import sys

import pytest
import ray

from artaug.scale import RayCluster
from support.cluster_playground import build_playground


@pytest.fixture(scope="session")
def local_ray():
    """Ray on this machine, with more cores than there are: nothing is measured here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for workers, which import tests/support
    ray.shutdown()  # nothing if no test before has left it connected
    try:
        ray.init("local", num_cpus=16, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
        yield
    finally:  # also where it began and could not end
        ray.shutdown()


@pytest.fixture
def cluster(local_ray):  # noqa: ARG001 - what it runs on
    with RayCluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def two_playgrounds(local_ray):  # noqa: ARG001 - what they run on
    """The playground on two workers."""
    with RayCluster() as cluster:
        yield cluster.synthesizer(build_playground, replicas=2)
