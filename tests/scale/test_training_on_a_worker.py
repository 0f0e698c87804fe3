"""A training on a worker writes where the caller says, whatever folder the worker stands in."""

import pytest

import artaug as aa
from artaug.training import Checkpoints
from support.cluster_playground import build_playground

pytestmark = pytest.mark.loopback


def test_relative_folders_of_checkpoints_and_pictures_are_those_of_the_caller(two_playgrounds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    synthesizer, plans = build_playground(), [aa.Plan("a red ball"), aa.Plan("a blue cone")]
    before, after = (
        aa.ImageFolder("pictures").add_all(synthesizer.synthesize_batch(plans, seeds=seeds))
        for seeds in ([0, 1], [2, 3])
    )
    pairs = [
        aa.ImagePair(prompt=plan.prompt, before=one, after=two, plan=plan)
        for plan, one, two in zip(plans, before, after, strict=True)
    ]
    trainer = aa.DifferentialLoRATrainer(rank=2, steps=2, batch_size=2)
    here = trainer.train(pairs, synthesizer, seed=0)
    there = trainer.train(
        pairs, two_playgrounds, seed=0, checkpoints=Checkpoints(folder="states", every=1), cache="latents"
    )
    assert there.lora.digest == here.lora.digest
    assert list((tmp_path / "states").iterdir())
    assert list((tmp_path / "latents").iterdir())
