"""The rules of other programs: the table of the documentation is theirs, and the files that users get are read whole."""

from pathlib import Path

import pytest
import torch

from artaug.diffusion.families.registry import FAMILIES
from artaug.lora.formats import FLUX1, KEY_MAPS, SD3, SD15, SDXL, Z_IMAGE, Format
from artaug.lora.formats.programs import COMFYUI, DIFFUSERS, PROGRAMS, SD_SCRIPTS, reader_table
from artaug.lora.formats.save import to_state_dict
from artaug.lora.lora import LowRank

DOCS = Path(__file__).parents[3] / "docs" / "lora-files.md"
ALL_KEY_MAPS = list(dict.fromkeys(family.key_map for family in FAMILIES))


def test_the_table_of_the_documentation_is_what_the_rules_say():
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in DOCS.read_text().splitlines()]
    start = next(number for number, row in enumerate(rows) if row[:2] == ("family", "format"))
    header, _, *body = rows[start : start + 1 + len(list(reader_table(KEY_MAPS)))]
    assert [header, *body] == list(reader_table(KEY_MAPS))


@pytest.mark.parametrize("key_map", ALL_KEY_MAPS, ids=lambda key_map: key_map.name)
def test_every_format_that_is_written_has_a_program_that_reads_it_whole(key_map):
    for format_ in key_map.key_formats:
        assert any(not program.dropped(key_map, format_) for program in PROGRAMS), format_


@pytest.mark.parametrize("key_map", ALL_KEY_MAPS, ids=lambda key_map: key_map.name)
def test_diffusers_and_comfyui_read_every_layer_of_a_default_files_blocks(key_map):
    for program in (DIFFUSERS, COMFYUI):
        dropped = program.dropped(key_map, key_map.default_format)
        assert not [
            name
            for name in dropped
            if "block" in name or "{}" in name.removeprefix("distilled_guidance_layer.layers.{}")
        ]


def test_comfyui_drops_the_attention_of_a_unets_peft_file_and_nothing_else():
    """Comfy-Org/ComfyUI: `unet.….attn1.processor.to_q` is what it looks for."""
    for key_map in (SDXL, SD15):
        dropped = COMFYUI.dropped(key_map, Format.PEFT)
        assert dropped
        assert all(".attn" in name for name in dropped)
        assert {name for row in key_map.rows for name in row.diffusers if ".attn" in name} == set(dropped)
        assert not COMFYUI.dropped(key_map, key_map.default_format)


def test_a_file_of_z_image_in_kohyas_format_has_the_names_that_comfyui_looks_up():
    layers = {
        f"layers.0.attention.{name}": LowRank(torch.ones(1, 4), torch.ones(4, 1))
        for name in ("to_q", "to_v", "to_out.0")
    }
    tensors, _ = to_state_dict(layers, Format.KOHYA, key_map=Z_IMAGE)
    stems = {key.split(".")[0] for key in tensors}
    assert stems == {"lora_unet_layers_0_attention_qkv", "lora_unet_layers_0_attention_out"}


def test_a_default_file_has_the_format_of_the_family_and_needs_no_key_map():
    layer = LowRank(torch.ones(1, 4), torch.ones(4, 1))
    unet = {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": layer}
    both, _ = to_state_dict(unet, None)
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.alpha" in both
    assert to_state_dict(unet, None, key_map=SD15)[0].keys() == both.keys()
    assert (
        "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.alpha" in to_state_dict(unet, None, key_map=SDXL)[0]
    )
    for names, key_map in ((["transformer_blocks.0.attn.to_q"], None), (["proj_out"], FLUX1), (["own.layer"], None)):
        tensors, _ = to_state_dict(dict.fromkeys(names, layer), None, key_map=key_map)
        assert set(tensors) == {f"transformer.{name}.lora_{factor}.weight" for name in names for factor in "AB"}


def test_the_rules_know_that_names_of_diffusers_are_not_sd_scripts_names_of_sdxl():
    match = SDXL.match("mid_block.attentions.0.proj_in")
    for stem, found in (("middle_block_1", True), ("mid_block_attentions_0", False)):
        keys = {f"lora_unet_{stem}_proj_in.lora_down.weight"}
        assert bool(SD_SCRIPTS.find({"mid_block.attentions.0.proj_in": match}, keys, SDXL)) is found
        assert COMFYUI.find({"mid_block.attentions.0.proj_in": match}, keys, SDXL)


@pytest.mark.parametrize(("outputs", "swapped"), [(8, True), (24, False)])
def test_only_the_last_block_of_sd3_exchanges_shift_and_scale_of_the_text(outputs, swapped):
    up = torch.arange(outputs, dtype=torch.float32).reshape(-1, 1)
    layers = {"transformer_blocks.5.norm1_context.linear": LowRank(torch.ones(1, 4), up)}
    tensors, _ = to_state_dict(layers, Format.KOHYA, key_map=SD3)
    written = tensors["lora_unet_joint_blocks_5_context_block_adaLN_modulation_1.lora_up.weight"]
    assert torch.equal(written, up.roll(outputs // 2, 0) if swapped else up)
