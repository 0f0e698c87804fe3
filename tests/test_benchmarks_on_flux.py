"""The protocol on FLUX.1-dev, by its dry run: everything is drawn once, everything wrong is refused at the door."""

import json
from dataclasses import replace

import httpx2
import numpy as np
import pytest
import torch
from benchmarks import _on_flux_dry_run as dry
from benchmarks import _on_flux_models as models
from benchmarks import _on_flux_plan as planning
from benchmarks import _on_flux_protocol as protocols
from benchmarks import on_flux
from benchmarks._ablation_arms import Arm, passes_a_step
from benchmarks._flux import PLAYGROUND
from benchmarks._flux_pipeline import Parts
from benchmarks._on_flux_judge import KeptJudge
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError
from PIL import Image

import artaug as aa
from artaug.synthesis import picture_seeds

SCORERS = ["PickScore", "HPSv2 (hps)", "ImageReward", "LAION aesthetic"]
TINY = replace(PLAYGROUND, double_blocks=1, single_blocks=1, heads=1, text_channels=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny checkpoints."""
    place = tmp_path_factory.mktemp("tiny")
    dry.dry_run(place)
    return place


@pytest.fixture(scope="module")
def smallest(folder):
    """The dry run with the fewest prompts and steps, and where its models are."""
    protocol, sources = dry.dry_run(folder)
    training = protocol.training
    trainer = replace(training.trainer, steps=2, batch_size=2)
    training = replace(training, prompts=training.prompts[:2], rounds=1, trainer=trainer, sample=1)
    return replace(protocol, prompts=protocol.prompts[:3], steps=1, training=training), sources


@pytest.fixture
def nothing_there(monkeypatch):
    """A machine without a GPU, whose Hub gives nothing that is gated."""

    def refuse(_api, source, **_):
        if "FLUX" in source:
            response = httpx2.Response(401, request=httpx2.Request("GET", f"https://huggingface.co/{source}"))
            raise GatedRepoError(f"Cannot access gated repo {source}", response=response)

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(HfApi, "auth_check", refuse)
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *_: None)


def load(protocol, sources, answers):
    return models.load(
        sources,
        size_px=protocol.size_px,
        steps=protocol.steps,
        guide=protocol.guide,
        training=protocol.training is not None,
        tokens=protocol.tokens,
        answers=answers,
    )


def counted(pipeline):
    """The rows of every call of the denoiser from now on."""
    calls = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    return calls


def test_a_dry_run_leaves_a_record_a_page_and_the_loras_and_goes_on_where_it_was(smallest, tmp_path, monkeypatch):
    monkeypatch.setattr(on_flux, "dry_run", lambda _: smallest)
    assert on_flux.main(["--dry-run", "--out", str(tmp_path)]) == 0

    record = json.loads((tmp_path / "on_flux.json").read_text())
    assert record["summary"]["dry_run"] is True
    assert {"MPS", "FID"} <= record["summary"]["not_measured"].keys()
    assert record["summary"]["training"]["rounds"][0]["pairs"] == 2
    rows = {(row["what"], row.get("scorer"), row["candidate"]) for row in record["rows"]}
    expected = {("score", scorer, name) for scorer in [*SCORERS, "diversity"] for name in ("from a file", "round 1")}
    assert expected <= rows
    assert {("drift", None, "from a file"), ("drift", None, "round 1")} <= rows
    judged = [row for row in record["rows"] if row["what"] == "judge"]
    assert [row["candidate"] for row in judged] == ["from a file", "round 1"]
    assert all(0 <= row["ci_low"] <= row["win_rate"] <= row["ci_high"] <= 1 for row in judged)
    page = (tmp_path / "report.html").read_text()
    assert "DRY RUN on tiny models" in page
    assert "drift of round 1" in page
    assert aa.LoRA.load(tmp_path / "loras" / "round-1.safetensors").rank == 4

    written = {path.stat().st_mtime_ns for path in tmp_path.rglob("*") if {"pictures", "answers"} & {*path.parts}}
    assert on_flux.main(["--dry-run", "--out", str(tmp_path)]) == 0
    again = {path.stat().st_mtime_ns for path in tmp_path.rglob("*") if {"pictures", "answers"} & {*path.parts}}
    assert again == written
    assert json.loads((tmp_path / "on_flux.json").read_text())["rows"] == record["rows"]


def test_a_comparison_draws_each_picture_once_and_its_drift_is_that_of_the_pictures(smallest, tmp_path):
    protocol = replace(smallest[0], training=None, batch_size=2)
    loaded = load(protocol, replace(smallest[1], judge=None), tmp_path / "answers")
    down, up = (
        torch.ones(1, 16),
        torch.linspace(-1, 1, 128)[:, None],
    )  # the same in all channels would be normalized away
    loras = {
        "nothing": aa.LoRA({"x_embedder": aa.LowRank(down, 0 * up)}),
        "much": aa.LoRA({"x_embedder": aa.LowRank(down, up)}),
    }
    passes = counted(loaded.base.pipeline)
    evaluation = protocols.evaluate(protocol, loaded, loras, tmp_path)

    (drawing,) = [
        row
        for row in planning.plan_rows(protocol, candidates=2, scorers=5, judged=False, known=planning.rates())
        if row["stage"] == "compare: draw"
    ]
    assert sum(passes) == drawing["passes"] == drawing["count"] == 3 * 3 * 2
    nothing, much = evaluation.drift
    assert nothing["drift"] == pytest.approx(0, abs=1e-6)
    seeds = picture_seeds(protocol.seed, 6)
    plain, changed = loaded.base, loaded.base.with_lora(loras["much"])
    distances = []
    for index, seed in enumerate(seeds):  # one by one, and not as it is measured
        plan = aa.Plan(protocol.prompts[index % 3])
        first, second = (arm.synthesize(plan, seed=seed) for arm in (plain, changed))
        distances.append(1 - loaded.similarity.compare(first, second))
    assert much["drift"] == pytest.approx(np.mean(distances), rel=1e-2)
    assert much["ci_low"] <= much["drift"] <= much["ci_high"]
    assert much["drift"] > 1e-6


@pytest.mark.usefixtures("nothing_there")
def test_all_that_is_missing_is_said_at_once(capsys):
    assert on_flux.main([]) == 2
    said = capsys.readouterr().err
    for expected in (
        "no GPU",
        "no multimodal judge",
        "nothing to compare",
        "gated",
        "https://huggingface.co/black-forest-labs/FLUX.1-dev",
    ):
        assert expected in said
    assert said.count("\n") == 5


@pytest.mark.usefixtures("nothing_there")
def test_a_training_needs_its_critic_its_filter_and_prompts(tmp_path, capsys):
    assert on_flux.main(["--train"]) == 2
    assert "--train-prompts FILE" in capsys.readouterr().err
    everyday = aa.PromptSet.everyday()
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([*everyday[:2], *(f"a hill, number {number}" for number in range(70))]))
    assert on_flux.main(["--train", "--train-prompts", str(file)]) == 2
    said = capsys.readouterr().err
    for expected in ("needs a critic", "aesthetic score, as the paper does", "2 prompts that are learned from"):
        assert expected in said


@pytest.mark.usefixtures("nothing_there")
def test_files_that_cannot_be_read_are_refused_before_anything_is_loaded(tmp_path, capsys):
    pickled, missing = tmp_path / "HPS_v2.1_compressed.pt", tmp_path / "ir.safetensors"
    files = ["--hps", str(pickled), "--image-reward", str(missing), "--lora", f"round 1={missing}"]
    assert on_flux.main(["--without-judge", *files]) == 2
    said = capsys.readouterr().err
    for expected in ("is no safetensors file. It is published as a pickle", "there is no such file", "--lora round 1="):
        assert expected in said
    assert on_flux.main(["--judge", "a", "--judge-url", "ftp://here", "--one-at-a-time"]) == 2
    said = capsys.readouterr().err
    assert "--judge-url: " in said
    assert "no GPU" in said
    assert on_flux.main(["--lora", "round-1.safetensors"]) == 2
    assert "expected NAME=FILE" in capsys.readouterr().err


def test_a_lora_of_another_model_is_refused_before_the_training(smallest, tmp_path):
    protocol, sources = smallest
    wide = aa.LoRA({"x_embedder": aa.LowRank(torch.ones(1, 64), torch.ones(128, 1))}).save(
        tmp_path / "wide.safetensors"
    )
    with pytest.raises(aa.LoRAMismatchError, match="model of another size"):
        load(protocol, replace(sources, loras={"wide": str(wide)}), tmp_path)


def test_a_plan_counts_the_paper_s_rounds_and_says_what_is_stated_and_what_measured(monkeypatch, capsys):
    monkeypatch.setattr(planning, "FLUX_DEV", TINY)
    small = Parts(t5_layers=1, clip_layers=1, vae_channels=(32, 32, 32, 32))
    sizes = planning.flux_sizes(protocols.Protocol(prompt_set="", prompts=("a", "b"), size_px=64), TINY, small)
    monkeypatch.setattr(planning, "flux_sizes", lambda _: sizes)
    assert on_flux.main(["--plan", "--train", "--price", "3"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("ESTIMATE, not a measurement: 3 rounds of 5,000 prompts, then 3 candidate(s)")
    for expected in (
        "15,000 pictures",
        "420,000",
        "576 answers",
        "measured on an H200",
        "stated, not measured",
        "GPU hours",
    ):
        assert expected in said


def test_a_training_is_planned_with_the_passes_of_the_objective_that_it_has():
    training = protocols.Training(prompts=("a",), held_out=("b",), rounds=2)
    trainer = training.trainer
    assert trainer.echo is None
    arm = Arm(trainer.objective, trainer.learning_rate, echo=trainer.objective.recommended_echo)
    protocol = protocols.Protocol(prompt_set="", prompts=("a", "b"), training=training)
    rows = planning.plan_rows(protocol, candidates=1, scorers=1, judged=False, known=planning.rates())
    (learning,) = [row for row in rows if row["stage"] == "rounds: train"]
    assert learning["passes"] == passes_a_step(arm) * 2 * trainer.steps * trainer.batch_size


def test_hours_follow_from_counts_and_rates():
    protocol = protocols.Protocol(prompt_set="", prompts=("a", "b", "c"), images_per_prompt=2, steps=10)
    known = {
        name: planning.Rate(seconds, name)
        for name, seconds in zip(planning.rates(), (1, 2, 3, 5, 7, 11, 13), strict=True)
    }
    drawn, scored, judged = planning.plan_rows(protocol, candidates=2, scorers=4, judged=True, known=known)
    assert drawn["seconds"] == 3 * 3 * 2 * (10 * 1 + 5)
    assert scored["seconds"] == 18 * (4 + 1) * 13
    assert (judged["count"], judged["seconds"]) == (2 * 2 * 3 * 2, 24 * 11)


class Lighter(aa.PairwiseJudge):
    """Prefers the lighter picture, and abstains from equal ones; it notes what it was asked."""

    def __init__(self):
        self.asked = []

    def __repr__(self):
        return "Lighter()"

    def prefer(self, first, second, prompt):
        self.asked.append(prompt)
        lights = [image.convert("L").getpixel((0, 0)) for image in (first, second)]
        return aa.Abstention("both are as light") if lights[0] == lights[1] else float(lights[0] > lights[1])


def test_a_judge_s_answers_are_kept_by_order_and_abstentions_are_not(tmp_path):
    dark, light = (Image.new("RGB", (8, 8), color) for color in ("#202020", "#e0e0e0"))
    first, second, prompts = [dark, light, dark], [light, dark, dark], ["a hill", "a hill", "a pond"]
    judge = Lighter()
    answers = KeptJudge(judge, tmp_path).prefer_batch(first, second, prompts)
    assert answers[:2] == [0.0, 1.0]
    assert answers[2] == aa.Abstention("both are as light")
    assert judge.asked == prompts

    again = Lighter()
    assert KeptJudge(again, tmp_path).prefer_batch(first, second, prompts) == answers
    assert again.asked == ["a pond"]
    assert KeptJudge(again, tmp_path).prefer_batch([dark], [light], ["a pond"]) == [0.0]
    assert again.asked == ["a pond", "a pond"]
