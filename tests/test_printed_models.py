"""Fences of the docs that load large models are run as they are printed, with tiny real models behind their names."""

import base64
import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image

import artaug as aa
from artaug.pairwise import judge_images
from artaug.testing import FixedCritic, FixedFilter
from support.faulty_server import completion, faulty_server, says
from support.printed import FLUX, REPLY, VLM, flux_in_bfloat16, place, printed_in, read_from, run
from support.served_llava import answers_with
from support.tiny_controlnet import tiny_controlnet
from support.tiny_ip_adapter import save_ip_adapter
from support.tiny_llava import suggestion_json, tiny_llava
from support.tiny_scorers import saved
from support.tiny_unet import tiny_sd15

pytestmark = pytest.mark.filterwarnings(
    "ignore:The `local_dir_use_symlinks` argument"
)  # which diffusers passes to the Hub

PLAN = aa.Plan("a quiet kitchen", (aa.Region(aa.Box(0, 0, 0.5, 1), "a sunlit window"),))
PICTURE, OTHER = (Image.effect_noise((64, 64), sigma).convert("RGB") for sigma in (40, 90))
CHOICE = ('{"reason":"', "dark", '","better":"', "A", '"}')  # its tokens
ADDRESS = '"http://127.0.0.1:8000/v1"'


def fences_of(page):
    return printed_in(page, "tests/test_printed_models.py")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub, and an empty folder to run in."""
    folder = tmp_path / "hub"
    read_from(folder, monkeypatch)
    monkeypatch.chdir(tmp_path)
    return folder


def test_flux_is_loaded_whole_and_offloaded(cache):
    flux_in_bfloat16().save_pretrained(place(cache, FLUX))
    whole, in_parts = fences_of("docs/models.md")
    loaded = run(whole, {}, aa=aa)
    offloaded = run(in_parts, {"enable_model_cpu_offload()": 'enable_model_cpu_offload(device="cpu")'}, **loaded)
    assert offloaded["pipeline"].transformer.dtype is torch.bfloat16
    in_one, in_turn = (dataclasses.replace(names["synthesizer"], steps=2) for names in (loaded, offloaded))
    assert drawn(in_turn, PLAN) == drawn(in_one, PLAN)
    assert drawn(in_turn, PLAN) != drawn(in_turn, aa.Plan(PLAN.prompt))


def test_flux_is_stored_in_fp8_and_offloaded_beside_a_critic_elsewhere(cache):
    flux_in_bfloat16().save_pretrained(place(cache, FLUX))
    (fence,) = fences_of("docs/flux.md")
    names = run(fence, {"enable_model_cpu_offload()": 'enable_model_cpu_offload(device="cpu")'})
    assert torch.float8_e4m3fn in {weight.dtype for weight in names["pipeline"].transformer.parameters()}
    quick = dataclasses.replace(names["synthesizer"], width=256, height=256, steps=2)
    assert drawn(quick, PLAN) != drawn(quick, aa.Plan(PLAN.prompt))
    assert names["critic"].model == VLM


def test_a_model_draws_and_another_one_edits(cache):
    flux = flux_in_bfloat16()
    flux.save_pretrained(place(cache, FLUX))
    FluxKontextPipeline(**flux.components).save_pretrained(place(cache, "black-forest-labs/FLUX.1-Kontext-dev"))
    (fence,) = fences_of("docs/canvas.md")
    names = run(fence, {}, aa=aa)
    base, editor = (
        dataclasses.replace(part, steps=2) for part in (names["synthesizer"].base, names["synthesizer"].editor)
    )
    (attempt,) = aa.improve(
        [PLAN.prompt],
        synthesizer=dataclasses.replace(names["synthesizer"], base=base, editor=editor),
        critic=FixedCritic(aa.Critique((aa.Suggestion(aa.Box(0, 0, 1, 1), "open the curtains"),))),
        planner=names["planner"],
        keep=FixedFilter(keep=True),
        seed=0,
    )
    before, plan, seed = attempt.pair.before, attempt.pair.plan, attempt.pair.seed
    assert (plan.prompt, plan.canvas.image) == ("open the curtains", before)
    assert before == base.synthesize(aa.Plan(PLAN.prompt), seed=seed)
    assert attempt.pair.after == editor.synthesize(plan, seed=seed)


def test_a_controlnet_and_an_ip_adapter_are_read_by_plans(cache):
    plain = tiny_sd15()
    plain.save_pretrained(place(cache, "stable-diffusion-v1-5/stable-diffusion-v1-5"))
    tiny_controlnet(plain.unet).save_pretrained(place(cache, "lllyasviel/sd-controlnet-canny"))
    save_ip_adapter(place(cache, "h94/IP-Adapter") / "models", "ip-adapter_sd15.safetensors", plain.unet)
    control, reference = fences_of("docs/beside.md")

    edges = Image.new("RGB", (64, 64))
    edges.paste((255, 255, 255), (8, 8, 40, 40))
    controlled = run(control, {"width=512, height=512": "width=64, height=64"}, edges=edges)
    plan, quick = controlled["plan"], dataclasses.replace(controlled["synthesizer"], steps=2)
    picture = drawn(quick, plan)
    assert drawn(quick, dataclasses.replace(plan, canvas=None)) != picture

    adapted = run(reference, {}, anna=PICTURE, ben=OTHER, **controlled)
    swapped = dataclasses.replace(adapted["plan"], canvas=aa.Canvas(references=[OTHER, PICTURE]))
    assert drawn(quick, swapped) != drawn(quick, adapted["plan"])
    assert drawn(quick, plan) == picture


def test_a_critic_in_this_process_is_probed_and_suggests(cache, capsys):
    model, processor = tiny_llava(fixed_reply=REPLY)
    saved(place(cache, VLM), model.to(torch.bfloat16), processor)
    in_process, _ = fences_of("docs/critics.md")
    names = run(in_process, {})
    assert "No convention fits" in capsys.readouterr().out  # it replies the same of every rectangle
    critique = names["vlm"].critique(PICTURE, PLAN.prompt)
    assert [suggestion.prompt for suggestion in critique.suggestions] == ["a sunlit window"]


@pytest.mark.loopback
def test_a_critic_on_a_server_is_probed_and_its_critiques_are_kept(cache, capsys):
    _, on_a_server = fences_of("docs/critics.md")
    with faulty_server(*[finds_rectangles] * 6, says(suggestion_json())) as server:
        names = run(on_a_server, {ADDRESS: repr(server.url)})
        assert "own convention fits" in capsys.readouterr().out
        critiques = [names["cached"].critique(PICTURE, PLAN.prompt) for _ in range(2)]
        assert len(server.requests) == 7
    assert critiques[0] == critiques[1]
    assert critiques[0].suggestions[0].box == aa.Box(0, 0, 0.5, 1)
    assert any((cache.parent / "runs" / "critiques").iterdir())


def finds_rectangles(exchange):
    """A reply of a model that sees: the box of what is not grey, in thousandths."""
    parts = exchange.request["messages"][-1]["content"]
    (url,) = (part["image_url"]["url"] for part in parts if part["type"] == "image_url")
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))
    rows, columns = np.nonzero((abs(picture.astype(int) - 150) > 20).any(axis=2))
    height, width = picture.shape[:2]
    edges = columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height
    reply = {"prompt": "it", "bbox_2d": [round(1000 * edge) for edge in edges]}
    exchange.send(completion(json.dumps(reply)))


@pytest.mark.loopback
def test_judges_in_this_process_and_on_a_server_ask_in_both_orders(cache):
    saved(place(cache, VLM), *tiny_llava())
    (fence,) = fences_of("docs/judges.md")
    with faulty_server(answers_with(*tiny_llava(fixed_reply=CHOICE))) as server:
        names = run(fence, {ADDRESS: repr(server.url)})
        local, served = (
            judge_images(names[name], [PICTURE], [OTHER], [PLAN.prompt])[0] for name in ("local", "served")
        )
    assert 0 < local.forward < 1
    assert (served.winner, served.position) == ("tie", 1)  # it says A of either order


def drawn(synthesizer, plan):
    return synthesizer.synthesize(plan, seed=0).tobytes()
