"""The tables hold at real geometry: the published models, layer by layer, and diffusers' own readers."""

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


def lora_of(model, *, kind=None, whole=True):
    """A LoRA of rank 1 on every layer, at its true shape, that a format can carry; each update another.

    Not ``whole``, it leaves out all blocks of a kind but the first, the second and the last.
    """
    key_map, *_ = MODELS[model]
    unsupported = key_map.key_formats[kind].unsupported if kind else frozenset()
    shapes = weight_shapes(model) if whole else sampled(weight_shapes(model))
    layers = {}
    for number, (name, (outputs, *rest)) in enumerate(shapes.items()):
        if key_map.match(name).row.original not in unsupported:
            down = torch.full((1, *rest), 1 + number % 7 / 8)
            layers[name] = LowRank(down, torch.linspace(-1, 1 + number / 1000, outputs).reshape(-1, 1))
    return LoRA(layers)


def sampled(shapes):
    found = {name: BLOCK.search(name) for name in shapes}
    last = {}
    for block in found.values():
        if block:
            last[block[1]] = max(last.get(block[1], 0), int(block[2]))
    return {name: one for name, one in shapes.items() if not (b := found[name]) or int(b[2]) in {0, 1, last[b[1]]}}


@pytest.mark.parametrize("model", MODELS)
def test_every_layer_of_a_published_model_is_named_both_ways(model):
    key_map, *_ = MODELS[model]
    places = {name: key_map.match(name) for name in weight_shapes(model)}
    assert [name for name, place in places.items() if place is None] == []
    assert len(places) == COUNTS.get(model, len(places))
    for flat in (False, True):
        for name, place in places.items():
            key_stems = place.original.replace(".", "_") if flat else place.original
            read, original = key_map.resolve(key_stems, flat=flat)
            assert name in read.diffusers
            assert read == place
            assert original


@pytest.mark.parametrize("model", MODELS)
def test_parts_that_the_original_fuses_are_all_there_and_share_its_inputs(model):
    key_map, *_ = MODELS[model]
    shapes = weight_shapes(model)
    for name in shapes:
        place = key_map.match(name)
        assert place.diffusers.count(name) == 1
        assert {shapes[part][1:] for part in place.diffusers} == {shapes[name][1:]}
        assert (
            len({shapes[part][0] / share for part, share in zip(place.diffusers, place.row.split_sizes, strict=True)})
            == 1
        )
        if place.row.aspect is not None:
            assert sum(shapes[part][0] for part in place.diffusers) / shapes[name][1] == float(place.row.aspect)


@pytest.mark.parametrize("model", MODELS)
def test_no_two_layers_share_a_place_and_no_two_places_a_name(model):
    key_map, *_ = MODELS[model]
    places = {key_map.match(name) for name in weight_shapes(model)}
    assert sum(len(place.diffusers) for place in places) == len(weight_shapes(model))
    assert len({place.original.replace(".", "_") for place in places}) == len(places)


@pytest.mark.parametrize("row", [KeyRow("a.{}.b", ("c.{}.d",)), KeyRow("a.{}", ("c.{}",))], ids=str)
def test_a_table_with_a_hole_would_be_noticed(row):
    key_map = type(SD3)(name="holey", rows=(row,), key_formats={})
    assert key_map.match("transformer_blocks.0.attn.to_q") is None


@pytest.mark.parametrize(("model", "kind"), WRITTEN, ids=str)
def test_diffusers_reads_the_layers_of_a_published_model_as_they_were_meant(tmp_path, model, kind):
    key_map, *_ = MODELS[model]
    lora = lora_of(model, kind=kind, whole=False)
    path = lora.save(tmp_path / "lora.safetensors", format=kind, key_map=key_map)
    found = verify_export(path, lora, key_map=key_map)
    assert len(found.readers) == 3
    assert found.readers[2].endswith("Pipeline")
    assert found.errors.keys() == lora.layers.keys()
    assert found.worst[1] < 1e-6


def test_diffusers_reads_all_of_flux_at_once(tmp_path):
    lora = lora_of("FLUX.1-dev", kind=Format.KOHYA)
    path = lora.save(tmp_path / "lora.safetensors", format=Format.KOHYA)
    assert len(verify_export(path, lora).errors) == 494


@pytest.mark.parametrize("kind", [Format.KOHYA, Format.COMFYUI])
def test_what_a_file_of_flux_cannot_carry_is_outside_its_blocks(kind):
    left_out = weight_shapes("FLUX.1-dev").keys() - lora_of("FLUX.1-dev", kind=kind).layers.keys()
    assert len(left_out) == 10
    assert all("blocks" not in name for name in left_out)
