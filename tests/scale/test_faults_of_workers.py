"""Workers die, and do not start: no prompt is lost or drawn twice for nothing, and a run that cannot go on says why."""

import os
import signal
import subprocess
import sys
import time

import pytest

import artaug as aa
from artaug.testing import FixedCritic, FixedFilter, SwatchSynthesizer
from support.cluster_parts import (
    ADVICE,
    BuildsMortal,
    BuildsOthers,
    DiesWhenBuilt,
    MortalCritic,
    MortalScorer,
    RaisesWhenBuilt,
    count,
)

pytestmark = pytest.mark.loopback


def attempts(prompts, synthesizer, *, critic=None, keep=None, store=None, on_event=None):
    return list(
        aa.improve(
            prompts,
            synthesizer=synthesizer,
            critic=critic or FixedCritic(ADVICE),
            planner=aa.GreedyPlanner(),
            keep=FixedFilter(keep=True) if keep is None else keep,
            seed=0,
            batch_size=4,
            store=store,
            on_event=on_event,
        )
    )


def test_a_worker_that_dies_once_costs_its_call_and_no_prompt(cluster, tmp_path):
    prompts = ["a", "b", "once and never again", *"cdefg"]
    synthesizer = cluster.synthesizer(BuildsMortal(str(tmp_path)), replicas=2)
    assert attempts(prompts, synthesizer, store=tmp_path / "run") == attempts(prompts, SwatchSynthesizer())
    assert count(tmp_path, "death") == 1
    synthesizer.pool.wait_for_all()
    assert synthesizer.loads == count(tmp_path, "load") == 3


@pytest.mark.parametrize("with_store", [True, False])
def test_a_prompt_that_kills_is_skipped_at_the_third_death_with_the_reason_and_its_neighbours_are_not(
    with_store, cluster, tmp_path
):
    prompts = ["a", "b", "deadly", *"cdefg"]
    synthesizer = cluster.synthesizer(BuildsMortal(str(tmp_path)), replicas=2)
    store = tmp_path / "run" if with_store else None
    result = attempts(prompts, synthesizer, store=store)
    skipped = result[2]
    assert isinstance(skipped, aa.Skipped)
    assert (skipped.prompt, skipped.stage) == ("deadly", "draw")
    assert "died each time, the last time with this picture alone" in skipped.reason
    whole = attempts(prompts, SwatchSynthesizer())
    assert result[:2] + result[3:] == whole[:2] + whole[3:]
    assert count(tmp_path, "death") == 3
    if with_store:  # the call after it reads the same, and draws nothing
        calls = count(tmp_path, "call")
        assert attempts(prompts, synthesizer, store=store) == result
        assert count(tmp_path, "call") == calls


def test_a_prompt_at_which_workers_hang_is_skipped_like_one_that_kills_them(cluster, tmp_path):
    synthesizer = cluster.synthesizer(BuildsMortal(str(tmp_path)), replicas=2, timeout_s=3)
    result = attempts(["a", "stuck", "c"], synthesizer, store=tmp_path / "run")
    assert [type(attempt) for attempt in result] == [aa.Kept, aa.Skipped, aa.Kept]
    assert "has not answered within 3 s, its timeout_s" in result[1].reason
    assert count(tmp_path, "stuck") == 3


def test_a_training_may_take_longer_than_the_timeout_and_may_not_be_silent_for_so_long(cluster):
    synthesizer = cluster.synthesizer(SwatchSynthesizer, timeout_s=3)
    reports = []
    assert synthesizer.use(long_work, on_report=reports.append) == "done"
    assert reports == [0, 1, 2, 3]
    with pytest.raises(aa.WorkerDiedError, match="has not answered within 3 s"):
        synthesizer.use(silent_work, on_report=reports.append)


def long_work(synthesizer, report):  # noqa: ARG001 - as workers call it
    for step in range(4):
        time.sleep(1)
        report(step)
    return "done"


def silent_work(synthesizer, report):  # noqa: ARG001 - as workers call it
    time.sleep(3600)


def test_bars_come_to_their_end_where_a_redraw_kills_now_and_when_the_run_is_called_again(cluster, tmp_path):
    synthesizer = cluster.synthesizer(BuildsMortal(str(tmp_path)), replicas=2)
    for _ in range(2):
        events = []
        result = attempts(["a", "brittle", "c"], synthesizer, store=tmp_path / "run", on_event=events.append)
        assert [type(attempt) for attempt in result] == [aa.Kept, aa.Skipped, aa.Kept]
        progress = [event for event in events if isinstance(event, aa.ProgressEvent)]
        for stage in ("draw", "critique", "redraw", "judge"):
            own = [event for event in progress if event.stage == stage]
            assert sum(event.count for event in own) == own[-1].total == 3


def test_a_picture_that_kills_its_critic_gets_an_abstention(cluster):
    prompts = ["a", "poison", "c"]
    critic = cluster.critic(MortalCritic)
    result = attempts(prompts, SwatchSynthesizer(), critic=critic)
    assert [type(attempt) for attempt in result] == [aa.Kept, aa.Skipped, aa.Kept]
    assert "the critic abstained: the process that worked on it died each time" in result[1].reason


def test_a_pair_that_kills_its_scorer_is_dropped_with_the_reason_and_its_neighbours_are_judged(cluster):
    prompts = ["a", "poison", "c"]
    scorer = cluster.scorer(MortalScorer)
    result = attempts(prompts, SwatchSynthesizer(), keep=aa.Gain(scorer, at_least=0.0))
    assert [type(attempt) for attempt in result] == [aa.Kept, aa.Dropped, aa.Kept]
    assert "could not be judged, alone and with others" in result[1].verdict.reason


def test_workers_that_die_at_everything_end_the_run_and_skip_no_prompt(cluster, tmp_path):
    synthesizer = cluster.synthesizer(BuildsMortal(str(tmp_path)))
    with pytest.raises(aa.ClusterError, match="workers died one after the other"):
        attempts([f"deadly {number}" for number in range(8)], synthesizer, store=tmp_path / "run")


def test_what_a_synthesizer_raises_on_a_worker_is_raised_here_once_and_names_it(cluster, tmp_path):
    synthesizer = cluster.synthesizer(BuildsMortal(str(tmp_path)))
    with pytest.raises(aa.PartError, match="ArithmeticError: no such colour") as caught:
        attempts(["a", "faulty"], synthesizer)
    assert count(tmp_path, "call") == 1
    notes = "".join(caught.value.__cause__.__notes__)
    assert "On a worker" in notes
    assert "cluster_parts.py" in notes


def test_where_memory_runs_out_on_a_worker_calls_are_halved_as_in_one_process(cluster, tmp_path):
    prompts = ["a", "b", "large", "d", "e"]
    synthesizer = cluster.synthesizer(BuildsMortal(str(tmp_path)))
    assert attempts(prompts, synthesizer, store=tmp_path / "run") == attempts(prompts, SwatchSynthesizer())
    assert count(tmp_path, "death") == 0
    assert count(tmp_path, "call4-") == 1  # and none of that size after it
    assert count(tmp_path, "call2-") + count(tmp_path, "call1-") == 2 + 1 + 2 + 1


def test_a_worker_that_dies_or_raises_while_it_is_built_ends_the_run_at_the_third_time(cluster, tmp_path):
    for build, cause in ((DiesWhenBuilt, "died"), (RaisesWhenBuilt, "there is no such checkpoint")):
        folder = tmp_path / build.__name__
        folder.mkdir()
        start_s = time.monotonic()
        with pytest.raises(aa.ClusterError, match=rf"could not be built, 3 times(.|\n)*{cause}"):
            cluster.synthesizer(build(str(folder)))
        assert time.monotonic() - start_s < 60
        assert count(folder, "birth") == 3


def test_workers_that_build_different_models_are_refused(cluster, tmp_path):
    with pytest.raises(aa.ClusterError, match=r"different parts\. \.width is 80 on one and 96 on another"):
        cluster.synthesizer(BuildsOthers(str(tmp_path)), replicas=2).pool.wait_for_all()


NODE_GOES = """
import sys, threading, time
import ray
from ray.cluster_utils import Cluster
import artaug as aa
from artaug.scale import RayCluster
from artaug.testing import FixedCritic, FixedFilter, SwatchSynthesizer
from support.cluster_parts import ADVICE, BuildsMortal, count

folder = sys.argv[1]
nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
first, second = (nodes.add_node(num_cpus=1) for _ in range(2))
ray.init(address=nodes.address, log_to_driver=False)
prompts = [f"prompt {number}" for number in range(24)]
parts = dict(critic=FixedCritic(ADVICE), planner=aa.GreedyPlanner(), keep=FixedFilter(keep=True), seed=0, batch_size=2)
with RayCluster() as cluster:
    synthesizer = cluster.synthesizer(BuildsMortal(folder), replicas=2)
    synthesizer.pool.wait_for_all()
    result = []
    for attempt in aa.improve(prompts, synthesizer=synthesizer, store=f"{folder}/run", **parts):
        result.append(attempt)
        if len(result) == 4:
            nodes.remove_node(second)
assert result == list(aa.improve(prompts, synthesizer=SwatchSynthesizer(), **parts))
print("same")
"""

DRIVER_DIES = """
import os, signal, sys
import ray
import artaug as aa
from artaug.scale import RayCluster
from artaug.testing import FixedCritic, FixedFilter, SwatchSynthesizer
from support.cluster_parts import ADVICE, BuildsMortal

folder, dies = sys.argv[1], sys.argv[2] == "dies"
ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
prompts = [f"prompt {number}" for number in range(24)]
parts = dict(critic=FixedCritic(ADVICE), planner=aa.GreedyPlanner(), keep=FixedFilter(keep=True), seed=0, batch_size=2)
with RayCluster() as cluster:
    synthesizer = cluster.synthesizer(BuildsMortal(folder), replicas=2)
    result = []
    for attempt in aa.improve(prompts, synthesizer=synthesizer, store=f"{folder}/run", **parts):
        result.append(attempt)
        if dies and len(result) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
assert result == list(aa.improve(prompts, synthesizer=SwatchSynthesizer(), **parts))
print("same")
"""


def run_script(script, *arguments):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_node_that_goes_away_costs_its_calls_and_the_run_ends_the_same(tmp_path):
    ended = run_script(NODE_GOES, tmp_path)
    assert ended.stdout.strip().endswith("same"), ended.stderr[-3000:]


def test_a_driver_that_is_killed_leaves_a_run_that_the_same_call_ends(tmp_path):
    assert run_script(DRIVER_DIES, tmp_path, "dies").returncode == -signal.SIGKILL
    before = count(tmp_path, "call")
    ended = run_script(DRIVER_DIES, tmp_path, "lives")
    assert ended.stdout.strip().endswith("same"), ended.stderr[-3000:]
    # 24 prompts, two at a time, before and after: what was finished is not drawn again.
    assert count(tmp_path, "call") - before <= 24 - 2 * 3
