"""What cannot work on a cluster is refused at once, and in words."""

import socket
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug.scale import RayCluster
from artaug.scale.payloads import dumps, loads
from artaug.scorers import Chroma
from artaug.testing import FixedCritic, FixedFilter, SwatchSynthesizer

pytestmark = pytest.mark.loopback


def test_without_ray_the_extra_is_named():
    script = (
        "import sys, importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'ray' else real(name, *rest)\n"
        "import artaug\nimport artaug.scale"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, text=True)
    assert 'artaug.scale needs the ray package. Run: pip install "artaug[scale]"' in ended.stderr


def test_a_cluster_that_cannot_be_reached_is_named():
    with socket.socket() as nobody:  # bound, and not listening: also where something answers on every other port
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(
            aa.ClusterError, match=rf"RayCluster\('{address}'\): nobody answers there.*ray start --head"
        ):
            RayCluster(address)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"replicas": 0}, "replicas=0"),
        ({"threads": 0}, "threads=0"),
        ({"gpus": -1}, "gpus=-1"),
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"gpus": 1.5}, "whole number"),
        ({"gpus": float("nan")}, "gpus=nan"),
        ({"gpus": 1}, "take 1 GPU, and it has 0"),
        ({"replicas": 1000}, "take 1000 CPU, and it has"),
    ],
)
def test_what_the_cluster_has_not_is_refused_before_anything_is_built(arguments, words, cluster):
    with pytest.raises((aa.InvalidValueError, aa.ClusterError), match=words):
        cluster.synthesizer(SwatchSynthesizer, **arguments)


def test_a_part_in_place_of_a_function_that_makes_it_is_refused(cluster):
    with pytest.raises(
        aa.InvalidValueError, match=r"a function without arguments that makes an object of artaug\.Synthesizer"
    ):
        cluster.synthesizer(SwatchSynthesizer())


def test_a_function_that_makes_something_else_is_refused(cluster):
    with pytest.raises(aa.ClusterError, match=r"returned SwatchSynthesizer(.|\n)*Expected an artaug.Critic"):
        cluster.critic(SwatchSynthesizer)


def test_a_function_that_holds_a_model_a_lock_or_a_key_is_refused(monkeypatch, cluster):
    model, lock, word = torch.nn.Linear(2, 2), threading.Lock(), "unguessable-" + "q7w"
    monkeypatch.setenv("SERVICE_API_KEY", word)
    for held, words in (
        (model, "it holds a model, a Linear"),
        (lock, "cannot pickle"),
        (word, "the value of the environment variable SERVICE_API_KEY"),
        ("sk-" + "0123456789abcdef", "what looks like a key, 'sk-01...'"),
    ):
        with pytest.raises(aa.InvalidValueError, match=words):
            cluster.synthesizer(partial(build_with, held))


def build_with(held):  # noqa: ARG001 - what is held is what the test is about
    return SwatchSynthesizer()


@given(st.binary(max_size=200), st.text("abcdefgh", min_size=8, max_size=40).map("{}9".format))
def test_no_payload_has_the_value_of_a_secret_variable(data, secret):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", secret)
        if secret.encode() in data:
            with pytest.raises(aa.InvalidValueError, match="HF_TOKEN"):
                dumps(data, what="a message")
        else:
            assert secret.encode() not in dumps(data, what="a message").data
        with pytest.raises(aa.InvalidValueError, match="HF_TOKEN"):
            dumps([data, {"nested": secret}], what="a message")


@pytest.mark.parametrize(
    "prompt", ["Basic watercolors", "Bearer of-lanterns", "a disabled robot", "a task-oriented r8"]
)
def test_words_of_a_prompt_are_no_secrets_whatever_variables_are_set_to(prompt, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert loads(dumps(aa.Plan(prompt), what="a call")) == aa.Plan(prompt)


def test_every_payload_of_a_run_is_looked_through(monkeypatch, cluster):
    synthesizer, scorer = cluster.synthesizer(SwatchSynthesizer), cluster.scorer(Chroma)
    secret = "unguessable-" + "x9z"
    monkeypatch.setenv("SERVICE_TOKEN", secret)
    with pytest.raises(aa.InvalidValueError, match="SERVICE_TOKEN"):
        synthesizer.synthesize(aa.Plan(f"a tin of {secret}"), seed=0)
    with pytest.raises(aa.InvalidValueError, match="SERVICE_TOKEN"):
        scorer.score(SwatchSynthesizer().synthesize(aa.Plan("a"), seed=0), f"a tin of {secret}")


@pytest.mark.usefixtures("local_ray")
def test_parts_of_a_cluster_that_is_closed_say_so():
    with RayCluster() as cluster:
        synthesizer = cluster.synthesizer(SwatchSynthesizer)
    with pytest.raises(aa.ClusterError, match="was closed"):
        synthesizer.synthesize(aa.Plan("a"), seed=0)


def test_workers_that_build_another_model_than_the_stores_are_refused_by_what_differs(cluster, tmp_path):
    def attempts(build):
        return aa.improve(
            ["a", "b"],
            synthesizer=cluster.synthesizer(build),
            critic=FixedCritic(aa.Critique()),
            planner=aa.GreedyPlanner(),
            keep=FixedFilter(keep=True),
            seed=0,
            store=tmp_path / "run",
        )

    assert len(list(attempts(SwatchSynthesizer))) == 2
    with pytest.raises(aa.StorageError, match=r"synthesizer\.width: 64 then, 96 now"):
        attempts(partial(SwatchSynthesizer, width=96))


def test_a_model_that_leaves_the_gpus_of_a_cluster_alone_is_said(cluster, monkeypatch, caplog):
    monkeypatch.setattr("artaug.scale.cluster.cluster_resources", lambda: {"CPU": 16.0, "GPU": 8.0})
    cluster.synthesizer(SwatchSynthesizer)
    assert "RayCluster.synthesizer(gpus=0): its model will be on the CPU, and the cluster has 8 GPU" in caplog.text
