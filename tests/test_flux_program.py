"""The programs for FLUX.1-dev are run as they are printed: behind each of their names on the Hub is a tiny real model.

What a test exchanges beside that it names, and exchanges in the text that is printed.
"""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import artaug as aa
from support.printed import FLUX, REPLY, VLM, flux_in_bfloat16, place, printed_in, read_from, run
from support.tiny_llava import tiny_llava
from support.tiny_scorers import saved, tiny_clip

pytestmark = pytest.mark.filterwarnings(
    "ignore:The `local_dir_use_symlinks` argument"
)  # which diffusers passes to the Hub

TEST = "tests/test_flux_program.py"
PROGRAM, IN_DIFFUSERS = printed_in("README.md", TEST)
CLIPS = ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai/clip-vit-large-patch14")
FEW_STEPS = {"steps=400": "steps=2"}
KEEP_ALL = {"at_least=0.2": "at_least=-100", "at_least=-0.5": "at_least=-100"}  # tiny scorers know nothing
PROMPTS = ["a quiet kitchen at night", "a lighthouse at dusk"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A cache of the Hub in which the program's names are tiny models, in bfloat16 and in several files where the real ones are."""
    cache = tmp_path_factory.mktemp("hub")
    flux_in_bfloat16().save_pretrained(place(cache, FLUX), max_shard_size="20KB")
    model, processor = tiny_llava(fixed_reply=REPLY)
    saved(place(cache, VLM), model.to(torch.bfloat16), processor)
    for name in CLIPS:
        saved(place(cache, name), *tiny_clip())
    return cache


@pytest.fixture(autouse=True)
def _in_an_empty_folder(hub, tmp_path, monkeypatch):
    read_from(hub, monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")


def test_the_program_ends_with_a_lora_that_diffusers_loads(caplog):
    with caplog.at_level("INFO", logger="artaug"):
        names = run(PROGRAM, {**FEW_STEPS, **KEEP_ALL})
    result, synthesizer = names["result"], names["synthesizer"]
    assert [finished.training.pairs for finished in result.rounds] == [2, 2]
    attempts = [attempt for finished in result.rounds for attempt in finished.attempts]
    assert {attempt.pair.plan.regions[0].prompt for attempt in attempts} == {"a sunlit window"}
    assert aa.Run.open("runs/flux").result.lora.digest == result.lora.digest
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("loaded")]
    assert [re.match(r"loaded (\S+): (\w+) on", line).groups() for line in said] == [
        (FLUX, "bfloat16"),
        (VLM, "bfloat16"),
        ("yuvalkirstain/PickScore_v1", "float32"),
        ("openai/clip-vit-large-patch14", "float32"),
    ]

    pipeline = run(IN_DIFFUSERS, {'"cuda"': '"cpu"'})["pipeline"]
    assert pipeline.get_active_adapters() == ["default_0"]
    options = {"height": 1024, "width": 1024, "num_inference_steps": 1, "output_type": "latent"}
    with_lora = pipeline(PROMPTS[0], **options, generator=torch.Generator().manual_seed(0)).images
    pipeline.disable_lora()
    assert not torch.equal(
        with_lora, pipeline(PROMPTS[0], **options, generator=torch.Generator().manual_seed(0)).images
    )
    assert {part.dtype for part in (synthesizer.pipeline.transformer, pipeline.transformer)} == {torch.bfloat16}


SMALL = {
    "width=1024,": "width=256,",
    "height=1024,": "height=256,",
    "steps=28,": "steps=2,",
    "prompts[:200], prompts[200:-64], prompts[-64:]": "prompts[:2], prompts[2:4], prompts[4:]",
    "fraction=0.1": "fraction=0.5",
    "at_least=-0.5": "at_least=-100",
    '"keep": calibration.keep,': '"keep": calibration.keep | aa.Gain(clip, at_least=-100),',
    "steps=400": "steps=2",
    "every=100": "every=2",
    'rounds": 2': 'rounds": 1',
    "sample=64": "sample=2",
    "aa.PromptSet.everyday()": repr([f"{number} cups" for number in range(6)]),  # tiny CLIPs read 32 letters
}


def test_the_page_from_start_to_end_is_one_program():
    Path("prompts.txt").write_text(
        "\n".join([*PROMPTS, "a fox in snow", "an old harbour", "a cup", "a road"]), encoding="utf-8"
    )
    save_file({"weight": torch.ones(1, 8), "bias": torch.zeros(1)}, "aesthetic.safetensors")
    names = run("\n".join(printed_in("docs/flux.md", TEST)), SMALL)
    assert len(names["pairs"]) == 2
    assert names["calibration"].kept == 1
    assert "train" in str(names["plan"])
    (finished,) = names["result"].rounds
    assert finished.training.best_validation is not None
    assert names["comparison"].row("PickScore", "enhanced").n == 6
    assert "a sunlit window" in Path("runs/flux/report.html").read_text(encoding="utf-8")
    assert aa.LoRA.load("artaug.safetensors").digest == names["result"].lora.digest


def test_a_run_that_keeps_nothing_says_what_became_of_the_prompts():
    with pytest.raises(
        aa.NothingToLearnError, match=r"round 1 kept none of 2 prompts: 2 dropped, 0 skipped.*PickScore"
    ):
        run(PROGRAM, {"at_least=0.2": "at_least=100"})
    assert not Path("artaug.safetensors").exists()
    assert len(list(aa.Run.open("runs/flux").attempts())) == len(PROMPTS)
