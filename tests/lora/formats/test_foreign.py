"""Files with the keys of other trainers: they are read as their trainer means them, strength included."""

import json

import pytest
import torch
from safetensors.torch import save_file

from artaug.diffusion import verify_export
from artaug.errors import LoRAError
from artaug.lora.formats import FLUX1, FLUX2, QWEN_IMAGE, SD15, SDXL, Z_IMAGE
from artaug.lora.lora import LoRA, LowRank

WIDTH, RANK = 3072, 4
BLOCK, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"


def factors(outputs, inputs, *, seed=0, rank=RANK, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
    return down.to(dtype), up.to(dtype)


def down_up(key, pair, alpha=None):
    tensors = {f"{key}.lora_down.weight": pair[0], f"{key}.lora_up.weight": pair[1]}
    return tensors if alpha is None else {**tensors, f"{key}.alpha": alpha}


def a_b(key, pair, middle=""):
    return {f"{key}.lora_A.{middle}weight": pair[0], f"{key}.lora_B.{middle}weight": pair[1]}


def update(pair, strength=1.0, rows=slice(None)):
    down, up = pair
    return LowRank(down.double(), up.double()[rows] * strength)


def sd_scripts_flux1():
    """sd-scripts, `networks.lora_flux`: one `down` for a fused layer, a dense `up`, alpha 1 by default."""
    fused, linear1, plain = factors(3 * WIDTH, WIDTH), factors(7 * WIDTH, WIDTH, seed=1), factors(WIDTH, 5 * WIDTH)
    fused, linear1, plain = ([factor.bfloat16() for factor in pair] for pair in (fused, linear1, plain))
    alpha = torch.tensor(1.0, dtype=torch.bfloat16)
    tensors = {
        **down_up("lora_unet_double_blocks_0_txt_attn_qkv", fused, alpha),
        **down_up("lora_unet_single_blocks_0_linear1", linear1, alpha),
        **down_up("lora_unet_single_blocks_0_linear2", plain, alpha),
    }
    header = {"ss_network_module": "networks.lora_flux", "ss_network_dim": "4", "ss_network_alpha": "1.0"}
    rows = [slice(number * WIDTH, (number + 1) * WIDTH) for number in range(3)]
    expected = {
        **{f"{BLOCK}.attn.add_{part}_proj": update(fused, 0.25, row) for part, row in zip("qkv", rows, strict=True)},
        **{f"{SINGLE}.attn.to_{part}": update(linear1, 0.25, row) for part, row in zip("qkv", rows, strict=True)},
        f"{SINGLE}.proj_mlp": update(linear1, 0.25, slice(3 * WIDTH, None)),
        f"{SINGLE}.proj_out": update(plain, 0.25),
    }
    return tensors, header, expected, FLUX1


def sd_scripts_sdxl():
    """sd-scripts trains SDXL on the original U-Net, which numbers all blocks."""
    pair = factors(8, 8)
    key = "lora_unet_output_blocks_4_1_transformer_blocks_1_attn2_to_k"
    tensors = {
        **down_up(key, pair, torch.tensor(8.0)),
        **down_up("lora_unet_middle_block_1_proj_in", pair, torch.tensor(8.0)),
        **down_up("lora_unet_input_blocks_4_0_emb_layers_1", pair, torch.tensor(8.0)),
    }
    expected = {
        "up_blocks.1.attentions.1.transformer_blocks.1.attn2.to_k": update(pair, 2.0),
        "mid_block.attentions.0.proj_in": update(pair, 2.0),
        "down_blocks.1.resnets.0.time_emb_proj": update(pair, 2.0),
    }
    return tensors, {"ss_network_module": "networks.lora"}, expected, SDXL


def sd_scripts_sd15():
    """sd-scripts trains Stable Diffusion 1.5 on diffusers' U-Net, with its names."""
    pair = factors(8, 8)
    tensors = {
        **down_up("lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj", pair, torch.tensor(1.0)),
        **down_up("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0", pair, torch.tensor(1.0)),
    }
    expected = {
        "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj": update(pair, 0.25),
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": update(pair, 0.25),
    }
    return tensors, {"ss_network_module": "networks.lora"}, expected, SD15


def diffusers_sd15():
    """diffusers' own training script for Stable Diffusion: dots in `lora.down`, no alpha."""
    pair, name = factors(8, 8), "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
    tensors = {f"unet.{name}.lora.down.weight": pair[0], f"unet.{name}.lora.up.weight": pair[1]}
    return tensors, {"format": "pt"}, {name: update(pair)}, SD15


def ai_toolkit_flux1():
    """ai-toolkit: PEFT names in half precision, alpha folded, and a header without alpha."""
    pair = factors(8, 8, dtype=torch.float16)
    header = {"format": "pt", "name": "mine", "software": json.dumps({"name": "ai-toolkit"}), "version": "1.0"}
    return a_b(f"transformer.{SINGLE}.attn.to_k", pair), header, {f"{SINGLE}.attn.to_k": update(pair)}, FLUX1


def ai_toolkit_flux2():
    """ai-toolkit, FLUX.2: the original names, `qkv` fused and dense, alpha folded."""
    fused, linear1 = factors(24, 8, dtype=torch.bfloat16), factors(72, 8, seed=1, dtype=torch.bfloat16)
    tensors = {
        **a_b("diffusion_model.double_blocks.0.img_attn.qkv", fused),
        **a_b("diffusion_model.single_blocks.0.linear1", linear1),
    }
    expected = {
        **{f"{BLOCK}.attn.to_{part}": update(fused, 1, slice(8 * n, 8 * n + 8)) for n, part in enumerate("qkv")},
        f"{SINGLE}.attn.to_qkv_mlp_proj": update(linear1),
    }
    return tensors, {"format": "pt"}, expected, FLUX2


def ai_toolkit_z_image():
    """ai-toolkit, Z-Image: the names that diffusers has, too."""
    pair = factors(8, 8, dtype=torch.bfloat16)
    name = "layers.7.attention.to_out.0"
    return a_b(f"diffusion_model.{name}", pair), {"format": "pt"}, {name: update(pair)}, Z_IMAGE


def simple_tuner_flux1():
    """SimpleTuner through diffusers: raw factors, and alpha only in the header."""
    pair = factors(8, 8)
    adapter = {"transformer.r": RANK, "transformer.lora_alpha": 16, "transformer.target_modules": ["to_v"]}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter)}
    return a_b(f"transformer.{BLOCK}.attn.to_v", pair), header, {f"{BLOCK}.attn.to_v": update(pair, 4.0)}, FLUX1


def simple_tuner_comfyui_flux1():
    """SimpleTuner with ``--lora_format comfyui``: diffusers' names behind ComfyUI's prefix, which nobody else reads."""
    pair, key = factors(8, 8), f"diffusion_model.{SINGLE}.attn.to_v"
    tensors = {**a_b(key, pair), f"{key}.alpha": torch.tensor(16.0)}
    return tensors, {"format": "pt"}, {f"{SINGLE}.attn.to_v": update(pair, 4.0)}, None


def one_trainer_flux1():
    """OneTrainer: diffusers' names with underscores, an alpha for each layer."""
    pair = factors(8, 8, dtype=torch.bfloat16)
    tensors = {
        **down_up("lora_transformer_transformer_blocks_0_attn_add_q_proj", pair, torch.tensor(1.0)),
        **down_up("lora_transformer_single_transformer_blocks_0_proj_mlp", pair, torch.tensor(4.0)),
    }
    expected = {f"{BLOCK}.attn.add_q_proj": update(pair, 0.25), f"{SINGLE}.proj_mlp": update(pair)}
    return tensors, {"format": "pt"}, expected, None


def simple_tuner_lycoris_z_image():
    """SimpleTuner through LyCORIS: diffusers' names with underscores, an alpha for each layer."""
    pair, name = factors(8, 8), "layers.0.attention.to_q"
    tensors = down_up(f"lycoris_{name.replace('.', '_')}", pair, torch.tensor(2.0))
    return tensors, {}, {name: update(pair, 0.5)}, None


def simple_tuner_lycoris_sdxl():
    pair, name = factors(8, 8), "down_blocks.2.attentions.0.transformer_blocks.9.attn1.to_out.0"
    tensors = down_up(f"lycoris_{name.replace('.', '_')}", pair, torch.tensor(2.0))
    return tensors, {}, {name: update(pair, 0.5)}, SDXL


def diffsynth_flux1():
    """DiffSynth-Studio, FLUX.1: the names of its own model, fused, alpha equal to the rank and not written."""
    pair, fused, linear1 = factors(8, 8), factors(24, 8, seed=1), factors(56, 8, seed=2)
    tensors = {
        **a_b("blocks.0.attn.b_to_qkv", fused, "default."),
        **a_b("blocks.0.ff_a.2", pair, "default."),
        **a_b("single_blocks.0.to_qkv_mlp", linear1, "default."),
        **a_b("final_norm_out.linear", pair, "default."),
    }
    rows = [slice(8 * number, 8 * number + 8) for number in range(3)]
    expected = {
        **{f"{BLOCK}.attn.add_{part}_proj": update(fused, 1, row) for part, row in zip("qkv", rows, strict=True)},
        **{f"{SINGLE}.attn.to_{part}": update(linear1, 1, row) for part, row in zip("qkv", rows, strict=True)},
        f"{SINGLE}.proj_mlp": update(linear1, 1, slice(24, None)),
        f"{BLOCK}.ff.net.2": update(pair),
        # rows of the original checkpoint, (shift, scale), which DiffSynth-Studio renames only
        "norm_out.linear": update(pair, 1, [4, 5, 6, 7, 0, 1, 2, 3]),
    }
    return tensors, {}, expected, None


def diffsynth_qwen_image():
    """DiffSynth-Studio, Qwen-Image: diffusers' names without a prefix."""
    pair, name = factors(8, 8), "transformer_blocks.10.img_mlp.net.2"
    return a_b(name, pair, "default."), {}, {name: update(pair)}, QWEN_IMAGE


TRAINERS = [
    sd_scripts_flux1,
    sd_scripts_sdxl,
    sd_scripts_sd15,
    diffusers_sd15,
    ai_toolkit_flux1,
    ai_toolkit_flux2,
    ai_toolkit_z_image,
    simple_tuner_flux1,
    simple_tuner_comfyui_flux1,
    one_trainer_flux1,
    simple_tuner_lycoris_z_image,
    simple_tuner_lycoris_sdxl,
    diffsynth_flux1,
    diffsynth_qwen_image,
]


NO_WITNESS = [simple_tuner_comfyui_flux1, diffsynth_flux1]


def written(folder, trainer):
    tensors, header, expected, key_map = trainer()
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "lora.safetensors", header)
    return folder / "lora.safetensors", LoRA(expected), key_map


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.__name__)
def test_a_file_is_read_as_its_trainer_means_it(tmp_path, trainer):
    path, expected, _ = written(tmp_path, trainer)
    found = LoRA.load(path)
    assert found.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        torch.testing.assert_close(found.layers[name].delta()[:, :64], layer.delta()[:, :64], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.__name__)
def test_the_other_readers_agree(tmp_path, trainer):
    path, expected, key_map = written(tmp_path, trainer)
    if trainer in NO_WITNESS:
        with pytest.raises(LoRAError, match="only artaug reads it whole"):
            verify_export(path, expected)
        return
    found = verify_export(path, expected, key_map=key_map)
    assert found.whole
    assert len(found.readers) == (3 if "diffusers" in found.whole else 2)
    assert found.worst[1] < 1e-6


@pytest.mark.parametrize("trainer", [sd_scripts_flux1, ai_toolkit_flux2], ids=lambda trainer: trainer.__name__)
def test_a_loaded_lora_is_saved_again_without_loss(tmp_path, trainer):
    path, expected, key_map = written(tmp_path, trainer)
    lora = LoRA.load(path)
    for kind in key_map.key_formats:
        again = lora.save(tmp_path / f"{kind}.safetensors", format=kind, key_map=key_map)
        assert verify_export(again, expected, key_map=key_map).worst[1] < 1e-6


# Names in names

NAME = "transformer_blocks.0.attn.to_q"
DOWN_BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"


@pytest.mark.parametrize(
    ("stem", "layers"),
    [
        (f"transformer._orig_mod.{NAME}", {NAME}),
        ("transformer.transformer_blocks.0._orig_mod.attn.to_q", {NAME}),
        (f"transformer._fsdp_wrapped_module.{NAME}", {NAME}),
        ("transformer.transformer_blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.attn.to_q", {NAME}),
        (f"{'transformer.transformer_blocks.0.attn.to_q'}._checkpoint_wrapped_module", {NAME}),
        (f"transformer.module.{NAME}", {NAME}),
        (f"module.transformer.{NAME}", {NAME}),
        (f"_orig_mod.{NAME}", {NAME}),
        (f"transformer.base_model.model.{NAME}", {NAME}),
        (f"base_model.model.transformer.{NAME}", {NAME}),
        (f"base_model.model.base_model.model.{NAME}", {NAME}),
        (f"diffusion_model._orig_mod.{NAME}", {NAME}),
        (f"model.diffusion_model.{NAME}", {NAME}),
        ("base_model.model.double_blocks.0.img_attn.qkv", {NAME, NAME.replace("_q", "_k"), NAME.replace("_q", "_v")}),
        ("base_model.model._orig_mod.double_blocks.0.img_attn.proj", {NAME.replace("to_q", "to_out.0")}),
        ("transformer.joint_blocks.0.x_block.attn2.proj", {"transformer_blocks.0.attn2.to_out.0"}),
        ("unet.input_blocks.4.1.transformer_blocks.0.attn1.to_k", {DOWN_BLOCK}),
        (f"unet.base_model.model.{DOWN_BLOCK}", {DOWN_BLOCK}),
        (f"lora_unet__orig_mod_{DOWN_BLOCK.replace('.', '_')}", {DOWN_BLOCK}),
        (f"lora_unet_{DOWN_BLOCK.replace('.', '_').replace('attentions_0', 'attentions_0__orig_mod')}", {DOWN_BLOCK}),
        ("lora_unet_diffusion_model_double_blocks_0_img_attn_proj", {NAME.replace("to_q", "to_out.0")}),
    ],
)
def test_prefixes_and_wrappers_of_other_programs_are_taken_off(tmp_path, stem, layers):
    tensors = {**a_b(stem, factors(12, 8)), f"{stem}.alpha": torch.tensor(4.0)}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert LoRA.load(tmp_path / "lora.safetensors").layers.keys() == layers


@pytest.mark.parametrize(
    "stems",
    [
        ["transformer._orig_mod.blocks.0.proj"],
        ["transformer.module.blocks.0.proj"],
        ["transformer.transformer.blocks.0.proj"],
        ["base_model.model.unet.blocks.0.proj"],
        [f"transformer.{NAME}", f"transformer._orig_mod.{NAME}_elsewhere"],
        ["base_model.model.double_blocks.0.img_attn.qkv", "base_model.model.double_blocks.0.img_attn.other"],
        ["unet.input_blocks.4.1.proj_in", "unet.elsewhere"],
    ],
)
def test_names_that_no_model_has_are_refused(tmp_path, stems):
    tensors = {key: tensor for stem in stems for key, tensor in a_b(stem, factors(12, 8)).items()}
    tensors |= {f"{stem}.alpha": torch.tensor(4.0) for stem in stems}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(LoRAError, match="of a model artaug does not know"):
        LoRA.load(tmp_path / "lora.safetensors")


def test_a_wrapped_layer_beside_the_same_unwrapped_is_refused(tmp_path):
    tensors = {**a_b(f"transformer.{NAME}", factors(8, 8)), **a_b(f"transformer._orig_mod.{NAME}", factors(8, 8))}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(LoRAError, match="twice"):
        LoRA.load(tmp_path / "lora.safetensors")


def test_a_key_map_that_is_given_names_the_layers_of_a_peft_file(tmp_path):
    save_file(a_b("transformer.blocks.0.proj", factors(8, 8)), tmp_path / "lora.safetensors")
    assert LoRA.load(tmp_path / "lora.safetensors").layers.keys() == {"blocks.0.proj"}
    with pytest.raises(LoRAError, match="does not know"):
        LoRA.load(tmp_path / "lora.safetensors", key_map=FLUX1)
