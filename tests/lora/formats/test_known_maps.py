"""The key maps against the published models, layer by layer, and against diffusers' own readers."""

import re

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

from artaug.diffusion import verify_export
from artaug.diffusion.families.registry import FAMILIES
from artaug.errors import LoRAError
from artaug.lora.formats import FLUX1, SD3, Format
from artaug.lora.formats.key_maps import KeyRow
from artaug.lora.formats.programs import DIFFUSERS
from artaug.lora.formats.save import to_state_dict
from artaug.lora.lora import LoRA, LowRank
from support.real_configs import MODELS, weight_shapes

BLOCK = re.compile(r"^(.*?(?:transformer_blocks|layers))\.(\d+)\.")
COUNTS = {"FLUX.1-dev": 504, "FLUX.2-dev": 203, "SDXL": 794, "SD1.5": 282, "Qwen-Image": 846, "Z-Image": 276}
SMALLEST = ["FLUX.1-dev", "FLUX.2-klein-4B", "SD3.5-medium", "SDXL", "SD1.5", "SD2.1", "Qwen-Image", "Z-Image"]
WRITTEN = [(model, kind) for model in SMALLEST for kind in MODELS[model][0].key_formats]
READ_BY_DIFFUSERS = [(model, kind) for model, kind in WRITTEN if not DIFFUSERS.dropped(MODELS[model][0], kind)]


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


@pytest.mark.parametrize(("model", "kind"), READ_BY_DIFFUSERS, ids=str)
def test_diffusers_reads_the_same_updates_of_the_layers_of_a_published_model(tmp_path, model, kind):
    key_map, *_ = MODELS[model]
    lora = lora_of(model, kind=kind, every_block=False)
    path = lora.save(tmp_path / "lora.safetensors", format=kind, key_map=key_map)
    found = verify_export(path, lora, key_map=key_map)
    assert len(found.readers) == 3
    assert found.readers[2].endswith("Pipeline")
    assert found.errors.keys() == lora.layers.keys()
    assert found.worst[1] < 1e-6


@pytest.mark.parametrize(("model", "kind"), sorted(set(WRITTEN) - set(READ_BY_DIFFUSERS)), ids=str)
def test_what_diffusers_does_not_read_has_another_witness(tmp_path, model, kind):
    key_map, *_ = MODELS[model]
    lora = lora_of(model, kind=kind, every_block=False)
    found = verify_export(lora.save(tmp_path / "lora.safetensors", format=kind, key_map=key_map), lora, key_map=key_map)
    assert len(found.readers) == 2
    assert found.whole
    with pytest.raises(LoRAError):
        verify_export(found.path, lora, family=next(one for one in FAMILIES if one.key_map == key_map))


def test_original_names_of_sd3_hold_what_the_original_checkpoint_holds():
    """Diffusers' converter of checkpoints, on numbers that tell which row went where."""
    layers = {
        name: LowRank(torch.zeros(1, *rest), torch.arange(outputs, dtype=torch.float32).reshape(-1, 1) + 1e5 * number)
        for number, (name, (outputs, *rest)) in enumerate(sample_blocks(weight_shapes("SD3.5-medium")).items())
    }
    last = max(int(block[2]) for name in layers if (block := BLOCK.search(name)))
    renamed = {name: name.replace(f".{last}.", ".2.") for name in layers}  # the converter counts the blocks
    written, _ = to_state_dict({renamed[name]: layer for name, layer in layers.items()}, Format.COMFYUI, key_map=SD3)
    checkpoint = {"pos_embed": torch.zeros(1)}
    for key, factor in written.items():
        if key.endswith(".lora_B.weight"):
            # a fused layer's rows have one number each
            rows = factor.flatten(1).sum(1)
            stem = key.removeprefix("diffusion_model.").removesuffix(".lora_B.weight")
            width = 1536 if stem == "context_embedder" else 1
            checkpoint |= {f"{stem}.weight": rows.reshape(-1, 1).expand(-1, width), f"{stem}.bias": rows}
    for key in [key for key in checkpoint if key.endswith(".qkv.weight")]:
        checkpoint |= {key.replace("qkv", norm): torch.zeros(1) for norm in ("ln_q", "ln_k")}
    converted = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    for name, layer in layers.items():
        torch.testing.assert_close(converted[f"{renamed[name]}.bias"], layer.up[:, 0])


def test_a_layer_that_another_program_renames_keeps_the_rows_of_the_original():
    """DiffSynth-Studio's converter of FLUX.1's checkpoint renames and moves no row; so its layers are the original's."""
    for alias in FLUX1.aliases:
        original = FLUX1.match(alias.diffusers[0].replace("{}", "0"))
        assert (alias.diffusers, alias.split_sizes, alias.swapped) == (
            original.row.diffusers,
            original.row.split_sizes,
            original.row.swapped,
        )


def test_diffusers_reads_a_file_of_every_layer_of_flux(tmp_path):
    lora = lora_of("FLUX.1-dev", kind=Format.KOHYA)
    path = lora.save(tmp_path / "lora.safetensors", format=Format.KOHYA)
    assert len(verify_export(path, lora).errors) == 494


@pytest.mark.parametrize("kind", [Format.KOHYA, Format.COMFYUI])
def test_the_layers_that_a_file_of_flux_cannot_carry_are_outside_its_blocks(kind):
    left_out = weight_shapes("FLUX.1-dev").keys() - lora_of("FLUX.1-dev", kind=kind).layers.keys()
    assert len(left_out) == 10
    assert all("blocks" not in name for name in left_out)
