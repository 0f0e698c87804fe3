"""Several processes on one training: the losses and the LoRA of a single process, replicated or sharded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from artaug.errors import InvalidValueError, ModelError
from artaug.training import DifferentialLoRATrainer, shard
from artaug.training.distributed import SINGLE_PROCESS, World

SCRIPT = """
import json, sys
sys.path[:0] = {path!r}
import torch
from artaug.diffusion import DiffusersSynthesizer
from artaug.training import Checkpoints, DirectPreference, shard
from support.tiny_flux import TINY_SIZE, tiny_flux
from tests.training.test_distributed import flux_pairs, training_of

torch.set_num_threads(1)
out = sys.argv[1]
replicated = training_of(cache=f"{{out}}/cache", checkpoints=Checkpoints(folder=f"{{out}}/checkpoints", every=2))
pipeline = tiny_flux()
shard(pipeline.transformer)
sharded = training_of(pipeline)
training_of(pipeline, flux_pairs(unchanged=True), echo=2, batch_size=2, objective=DirectPreference())
rank = torch.distributed.get_rank()
replicated.lora.save(f"{{out}}/replicated-{{rank}}.safetensors")
sharded.lora.save(f"{{out}}/sharded-{{rank}}.safetensors")
with open(f"{{out}}/losses-{{rank}}.json", "w") as file:
    json.dump([replicated.losses, sharded.losses], file)
torch.distributed.destroy_process_group()
"""


RESUMING = """
import json, os, signal, sys
sys.path[:0] = {path!r}
import torch
from artaug.training import Checkpoints, shard
from support.tiny_flux import tiny_flux
from tests.training.test_distributed import training_of

torch.set_num_threads(1)
out, dying = sys.argv[1:]

def training(kind, pipeline):
    def die(event):  # of the first process, which alone reports its steps and writes the checkpoints
        if kind == dying and event.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints = Checkpoints(folder=f"{{out}}/{{kind}}", every=2)
    result = training_of(pipeline, checkpoints=checkpoints, on_step=die, ema=0.9)
    rank = torch.distributed.get_rank()
    result.lora.save(f"{{out}}/{{kind}}-{{rank}}.safetensors")
    with open(f"{{out}}/{{kind}}-{{rank}}.json", "w") as file:
        json.dump(result.losses, file)

training("replicated", tiny_flux())
pipeline = tiny_flux()
shard(pipeline.transformer)
training("sharded", pipeline)
torch.distributed.destroy_process_group()
"""


def launch(script, *arguments):
    """Run a script in two processes, as accelerate does."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        script,
        *arguments,
    ]
    return subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )


def flux_pairs(*, unchanged=False):
    """Two pairs; with ``unchanged``, before and after of the second are the same."""
    from PIL import Image  # noqa: PLC0415 - the script imports this file, too

    from artaug.pairs import ImagePair  # noqa: PLC0415
    from artaug.plan import Plan  # noqa: PLC0415
    from support.tiny_flux import TINY_SIZE  # noqa: PLC0415

    before = Image.linear_gradient("L").resize((TINY_SIZE, TINY_SIZE)).convert("RGB")
    after = before.point(lambda value: 255 - value // 2)
    return [
        ImagePair(prompt=prompt, seed=0, before=first, after=second, plan=Plan(prompt))
        for prompt, first, second in (
            ("a red cone", before, after),
            ("a blue cube", after, after if unchanged else before),
        )
    ]


def training_of(pipeline=None, pairs=None, *, cache=None, checkpoints=None, on_step=None, **options):
    from artaug.diffusion import DiffusersSynthesizer  # noqa: PLC0415
    from support.tiny_flux import TINY_SIZE, tiny_flux  # noqa: PLC0415

    synthesizer = DiffusersSynthesizer(pipeline=pipeline or tiny_flux(), width=TINY_SIZE, height=TINY_SIZE, steps=2)
    trainer = DifferentialLoRATrainer(**{"rank": 4, "steps": 5, "batch_size": 4, "learning_rate": 1e-2, **options})
    pairs = pairs or flux_pairs()
    return trainer.train(
        pairs, synthesizer, seed=0, progress=False, cache=cache, checkpoints=checkpoints, on_step=on_step
    )


def test_two_processes_learn_what_one_does_replicated_and_sharded(tmp_path):
    script = tmp_path / "script.py"
    root = Path(__file__).parents[2]
    script.write_text(SCRIPT.format(path=[str(root), str(root / "tests"), *sys.path]))
    finished = launch(script, tmp_path)
    assert finished.returncode == 0, finished.stderr
    from artaug.lora.lora import LoRA  # noqa: PLC0415

    single = training_of()
    for rank in range(2):
        replicated, sharded = json.loads((tmp_path / f"losses-{rank}.json").read_text())
        assert replicated == pytest.approx(single.losses, rel=1e-5)
        assert sharded == pytest.approx(single.losses, rel=1e-5)
        for kind in ("replicated", "sharded"):
            lora = LoRA.load(tmp_path / f"{kind}-{rank}.safetensors")
            for name, layer in single.lora.layers.items():
                difference = (lora.layers[name].delta() - layer.delta()).norm() / layer.delta().norm()
                assert difference < 1e-3, f"{kind}, process {rank}: {name} is off by {difference:.1e} of its update"
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_two_processes_resume_bit_for_bit_after_one_was_killed(tmp_path):
    script = tmp_path / "script.py"
    root = Path(__file__).parents[2]
    script.write_text(RESUMING.format(path=[str(root), str(root / "tests"), *sys.path]), encoding="utf-8")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for out in (whole, resumed):
        out.mkdir()
    for kind in ("replicated", "sharded"):
        assert launch(script, resumed, kind).returncode != 0
        assert [file.name for file in (resumed / kind).iterdir()] == ["step-00000002.safetensors"]
        assert not list(resumed.glob(f"{kind}-*"))
    for out in (whole, resumed):
        finished = launch(script, out, "neither")
        assert finished.returncode == 0, finished.stderr
    results = sorted(file.name for file in whole.iterdir() if file.is_file())
    assert len(results) == 8
    for name in results:
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name


def test_there_is_one_process_unless_others_were_started():
    assert World.current() == SINGLE_PROCESS
    assert SINGLE_PROCESS.is_main
    assert list(SINGLE_PROCESS.split(range(5))) == list(range(5))


def test_every_item_belongs_to_one_process():
    parts = [list(World(rank, 3).split(range(8))) for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_a_single_process_sums_nothing():
    tensor = torch.ones(3)
    SINGLE_PROCESS.all_reduce([tensor])
    assert tensor.tolist() == [1, 1, 1]


def test_a_batch_that_cannot_be_shared_equally_is_refused(monkeypatch, tiny_model, two_pairs):
    monkeypatch.setattr(World, "current", classmethod(lambda _: World(0, 3)))
    with pytest.raises(InvalidValueError, match="batch_size=4 cannot be shared equally by 3 processes"):
        DifferentialLoRATrainer(batch_size=4).train(two_pairs, tiny_model, seed=0)


def test_one_process_has_nothing_to_shard_over(tiny_model):
    with pytest.raises(ModelError, match=r"one process, so nothing to shard over.*accelerate launch"):
        shard(tiny_model.module)
