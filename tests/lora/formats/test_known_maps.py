"""The key maps against the published models, layer by layer, and against diffusers' own readers."""

import re

import pytest
import torch

from artaug.diffusion import verify_export
from artaug.lora.formats import SD3, Format
from artaug.lora.formats.key_maps import KeyRow
from artaug.lora.lora import LoRA, LowRank
from support.real_configs import MODELS, weight_shapes

BLOCK = re.compile(r"^(.*?(?:transformer_blocks|layers))\.(\d+)\.")
COUNTS = {"FLUX.1-dev": 504, "FLUX.2-dev": 203, "SDXL": 794, "SD1.5": 282, "Qwen-Image": 846, "Z-Image": 276}
SMALLEST = ["FLUX.1-dev", "FLUX.2-klein-4B", "SD3.5-medium", "SDXL", "SD1.5", "SD2.1", "Qwen-Image", "Z-Image"]
WRITTEN = [(model, kind) for model in SMALLEST for kind in MODELS[model][0].key_formats]


def lora_of(model, *, kind=None, every_block=True):
    """A LoRA of rank 1 on every layer, at its true shape, that a format can carry; each update another.

    Without ``every_block`` only the first, the second and the last block of each kind.
    """
    key_map, *_ = MODELS[model]
    unsupported = key_map.key_formats[kind].unsupported if kind else frozenset()
    shapes = weight_shapes(model) if every_block else sample_blocks(weight_shapes(model))
    layers = {}
    for number, (name, (outputs, *rest)) in enumerate(shapes.items()):
        if key_map.match(name).row.original not in unsupported:
            down = torch.full((1, *rest), 1 + number % 7 / 8)
            layers[name] = LowRank(down, torch.linspace(-1, 1 + number / 1000, outputs).reshape(-1, 1))
    return LoRA(layers)


def sample_blocks(shapes):
    found = {name: BLOCK.search(name) for name in shapes}
    last = {}
    for block in found.values():
        if block:
            last[block[1]] = max(last.get(block[1], 0), int(block[2]))
    return {name: one for name, one in shapes.items() if not (b := found[name]) or int(b[2]) in {0, 1, last[b[1]]}}


@pytest.mark.parametrize("model", MODELS)
def test_every_layer_of_a_published_model_has_both_names(model):
    key_map, *_ = MODELS[model]
    matches = {name: key_map.match(name) for name in weight_shapes(model)}
    assert [name for name, match in matches.items() if match is None] == []
    assert len(matches) == COUNTS.get(model, len(matches))
    for flat in (False, True):
        for name, match in matches.items():
            key = match.original.replace(".", "_") if flat else match.original
            found, original = key_map.resolve(key, flat=flat)
            assert name in found.diffusers
            assert found == match
            assert original


@pytest.mark.parametrize("model", MODELS)
def test_the_parts_of_a_fused_layer_exist_and_share_its_inputs(model):
    key_map, *_ = MODELS[model]
    shapes = weight_shapes(model)
    for name in shapes:
        match = key_map.match(name)
        assert match.diffusers.count(name) == 1
        assert {shapes[part][1:] for part in match.diffusers} == {shapes[name][1:]}
        assert (
            len({shapes[part][0] / share for part, share in zip(match.diffusers, match.row.split_sizes, strict=True)})
            == 1
        )
        if match.row.aspect is not None:
            assert sum(shapes[part][0] for part in match.diffusers) / shapes[name][1] == float(match.row.aspect)


@pytest.mark.parametrize("model", MODELS)
def test_no_two_layers_share_a_row_and_no_two_rows_a_name(model):
    key_map, *_ = MODELS[model]
    matches = {key_map.match(name) for name in weight_shapes(model)}
    assert sum(len(match.diffusers) for match in matches) == len(weight_shapes(model))
    assert len({match.original.replace(".", "_") for match in matches}) == len(matches)


@pytest.mark.parametrize("row", [KeyRow("a.{}.b", ("c.{}.d",)), KeyRow("a.{}", ("c.{}",))], ids=str)
def test_a_missing_row_would_be_found(row):
    key_map = type(SD3)(name="holey", rows=(row,), key_formats={})
    assert key_map.match("transformer_blocks.0.attn.to_q") is None


@pytest.mark.parametrize(("model", "kind"), WRITTEN, ids=str)
def test_diffusers_reads_the_same_updates_of_the_layers_of_a_published_model(tmp_path, model, kind):
    key_map, *_ = MODELS[model]
    lora = lora_of(model, kind=kind, every_block=False)
    path = lora.save(tmp_path / "lora.safetensors", format=kind, key_map=key_map)
    found = verify_export(path, lora, key_map=key_map)
    assert len(found.readers) == 3
    assert found.readers[2].endswith("Pipeline")
    assert found.errors.keys() == lora.layers.keys()
    assert found.worst[1] < 1e-6


def test_diffusers_reads_a_file_of_every_layer_of_flux(tmp_path):
    lora = lora_of("FLUX.1-dev", kind=Format.KOHYA)
    path = lora.save(tmp_path / "lora.safetensors", format=Format.KOHYA)
    assert len(verify_export(path, lora).errors) == 494


@pytest.mark.parametrize("kind", [Format.KOHYA, Format.COMFYUI])
def test_the_layers_that_a_file_of_flux_cannot_carry_are_outside_its_blocks(kind):
    left_out = weight_shapes("FLUX.1-dev").keys() - lora_of("FLUX.1-dev", kind=kind).layers.keys()
    assert len(left_out) == 10
    assert all("blocks" not in name for name in left_out)
