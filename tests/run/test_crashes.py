"""A run that is killed at random moments ends as if it had never stopped, and does nothing twice but what was under way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS, ROUNDS, PROMPTS, CHUNK = 20, 2, 6, 2
PICTURES = ROUNDS * PROMPTS * 2
"""Before and after, if the critic finds something everywhere."""

SCRIPT = """
import hashlib, json, os, random, signal, sys, time
from pathlib import Path

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic
from artaug.diffusion import DiffusersSynthesizer
from artaug.scorers import Chroma

KILLS, ROUNDS, PROMPTS, CHUNK = {constants}
base = Path(sys.argv[1])
synthesizer = playground.synthesizer(guide=aa.RegionalAttention())
log = os.open(base / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
original = DiffusersSynthesizer.synthesize_batch


def drawn(self, plans, *, seeds):
    pictures = original(self, plans, seeds=seeds)
    for plan, seed in zip(plans, seeds):
        os.write(log, f"draw {{seed}} {{bool(plan.regions)}}\\n".encode())
    return pictures


DiffusersSynthesizer.synthesize_batch = drawn


class Critic(aa.Critic):
    def critique(self, image, prompt):
        os.write(log, f"ask {{hashlib.sha256(image.tobytes() + prompt.encode()).hexdigest()[:16]}}\\n".encode())
        return PhotometricCritic().critique(image, prompt)


def run(store):
    return aa.enhance(
        playground.prompts(PROMPTS, seed=0),
        synthesizer=synthesizer,
        critic=Critic(),
        planner=aa.GreedyPlanner(max_regions=2),
        keep=aa.Gain(Chroma(), at_least=-1),
        trainer=aa.DifferentialLoRATrainer(rank=2, steps=4, batch_size=2, learning_rate=1e-3),
        checkpoints=aa.Checkpoints(folder="unused", every=1),
        rounds=ROUNDS,
        batch_size=CHUNK,
        store=store,
        progress=False,
    )


def summary(result):
    def end(attempt):
        if isinstance(attempt, aa.Skipped):
            return [attempt.prompt, attempt.seed, attempt.reason]
        pair = attempt.pair
        pictures = [hashlib.sha256(image.tobytes()).hexdigest() for image in (pair.before, pair.after)]
        return [pair.prompt, pair.seed, attempt.verdict.reason, *pictures]

    rounds = [[end(attempt) for attempt in finished.attempts] for finished in result.rounds]
    return [rounds, [list(finished.training.losses) for finished in result.rounds], result.lora.digest]


def child(store):
    # A process of its own, forked before anything was computed: imports are not repeated.
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            (base / f"{{store.name}}.json").write_text(json.dumps(summary(run(store))))
            code = 0
        finally:
            os._exit(code)
    return pid


start = time.monotonic()
_, status = os.waitpid(child(base / "whole"), 0)
assert status == 0
life = time.monotonic() - start
rng, kills, number = random.Random(0), 0, 0
while kills < KILLS:
    pid = child(base / f"killed-{{number}}")
    deadline = time.monotonic() + rng.uniform(0, life / 6)
    while time.monotonic() < deadline:
        time.sleep(0.002)
        if os.waitpid(pid, os.WNOHANG)[0]:
            number += 1
            break
    else:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
        os.write(log, f"kill {{number}}\\n".encode())
_, status = os.waitpid(child(base / f"killed-{{number}}"), 0)
assert status == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, so that twenty processes import torch once")
def test_a_run_that_is_killed_at_twenty_random_moments_ends_as_if_it_never_was(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(constants=(KILLS, ROUNDS, PROMPTS, CHUNK)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, env=environment, timeout=600)
    whole = json.loads((tmp_path / "whole.json").read_text())
    lines = (tmp_path / "log").read_text().splitlines()
    finished = sorted(tmp_path.glob("killed-*.json"))
    assert finished
    for path in finished:
        assert json.loads(path.read_text()) == whole
    kills = sum(line.startswith("kill") for line in lines)
    draws, asked = (sum(line.startswith(word) for line in lines) for word in ("draw", "ask"))
    runs = 1 + len(finished)
    assert kills == KILLS
    assert runs * PICTURES <= draws <= runs * PICTURES + kills * CHUNK
    assert runs * ROUNDS * PROMPTS <= asked <= runs * ROUNDS * PROMPTS + kills
    assert not list(tmp_path.rglob("work/*"))  # nothing of a chunk is left
    assert Path(tmp_path / "whole" / "round-2" / "lora.safetensors").exists()
