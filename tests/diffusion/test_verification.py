"""One call proves a LoRA file, and lets nothing wrong pass."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file, save_file

from artaug.diffusion import verification, verify_export
from artaug.errors import LoRAError, LoRAMismatchError, ModelError
from artaug.lora.formats import FLUX1, SD15, SDXL, Format, KeyFormat, KeyMap, KeyRow
from artaug.lora.formats.load import ParsedLoRA
from artaug.lora.lora import LoRA, LowRank
from support.tiny_flux import tiny_flux

TO_Q, FF = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.0.proj"
NAMES = {"A": "down", "B": "up"}


def low_rank(rank, inputs, outputs, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator))


@pytest.fixture(scope="module")
def pipeline():
    return tiny_flux()


LORA = LoRA({TO_Q: low_rank(2, 32, 32), FF: low_rank(3, 32, 128, seed=1)})


def saved(folder, *, lora=LORA, file_format=Format.PEFT, dtype=None):
    return lora.save(folder / "lora.safetensors", format=file_format, key_map=FLUX1, dtype=dtype)


def changed(path, change):
    save_file({key: change(key, tensor) for key, tensor in load_file(path).items()}, path)
    return path


@pytest.mark.parametrize("file_format", FLUX1.key_formats)
@pytest.mark.parametrize("with_pipeline", [False, True])
def test_a_file_is_proved_by_three_readers(tmp_path, pipeline, file_format, with_pipeline):
    found = verify_export(
        saved(tmp_path, file_format=file_format), LORA, pipeline=pipeline if with_pipeline else None, key_map=FLUX1
    )
    assert found.readers == ("LoRA.load", "the format's definition", "FluxPipeline")
    assert found.format is file_format
    assert found.errors.keys() == LORA.layers.keys()
    assert found.worst[1] < 1e-6


def test_a_file_alone_is_proved_to_mean_one_thing(tmp_path):
    assert verify_export(saved(tmp_path)).errors.keys() == LORA.layers.keys()


def test_proving_leaves_a_pipeline_alone(tmp_path, pipeline):
    before = [(name, type(layer)) for name, layer in pipeline.transformer.named_modules()]
    verify_export(saved(tmp_path), LORA, pipeline=pipeline)
    assert [(name, type(layer)) for name, layer in pipeline.transformer.named_modules()] == before
    assert not hasattr(pipeline.transformer, "peft_config")


@pytest.mark.parametrize("file_format", FLUX1.key_formats)
def test_another_strength_is_found(tmp_path, file_format):
    path = changed(
        saved(tmp_path, file_format=file_format),
        lambda key, tensor: tensor * 2 if ".up" in key or "_up" in key or "_B" in key else tensor,
    )
    with pytest.raises(LoRAError, match="another update"):
        verify_export(path, LORA, key_map=FLUX1)


def test_another_lora_is_found(tmp_path):
    with pytest.raises(LoRAError, match="no layer of the LoRA"):
        verify_export(saved(tmp_path), LoRA({TO_Q: LORA.layers[TO_Q]}))
    with pytest.raises(LoRAError, match=r"LoRA\.load finds 2 of 3 layers"):
        verify_export(saved(tmp_path), LoRA({**LORA.layers, "proj_out": low_rank(1, 4, 4)}))


@pytest.mark.parametrize(("dtype", "passes"), [(torch.float16, True), (torch.bfloat16, False)])
def test_rounding_passes_or_not_as_the_tolerance_says(tmp_path, dtype, passes):
    path = saved(tmp_path, dtype=dtype)
    if passes:
        assert 1e-5 < verify_export(path, LORA).worst[1] < 1e-3
    else:
        with pytest.raises(LoRAError, match=r"1e-03 is allowed\. Rounding to bfloat16 alone"):
            verify_export(path, LORA)
    assert verify_export(path, LORA, tolerance=5e-3).worst[1] < 5e-3


@pytest.mark.parametrize("key_map", [None, FLUX1])
def test_an_error_of_our_own_reader_is_found(tmp_path, monkeypatch, key_map):
    halved = ParsedLoRA(Format.PEFT, LORA.scaled(0.5).layers)
    monkeypatch.setattr(verification, "load_lora", lambda *_, **__: halved)
    with pytest.raises(LoRAError, match="the format's definition finds another update"):
        verify_export(saved(tmp_path), key_map=key_map)


def test_what_only_diffusers_misses_is_found(tmp_path, pipeline):
    """Files of FLUX.1 with diffusers' names behind ComfyUI's prefix: every key is sound, and diffusers drops them all."""
    name, layer = "single_transformer_blocks.0.attn.to_q", LORA.layers[TO_Q]
    tensors = {f"diffusion_model.{name}.lora_A.weight": layer.down, f"diffusion_model.{name}.lora_B.weight": layer.up}
    save_file(tensors, tmp_path / "lora.safetensors")
    expected = LoRA({name: layer})
    with pytest.raises(LoRAError, match=r"only artaug reads it whole\. diffusers drops all 1 layers"):
        verify_export(tmp_path / "lora.safetensors", expected)
    with pytest.raises(LoRAError, match="FluxPipeline"):
        verify_export(tmp_path / "lora.safetensors", expected, pipeline=pipeline)


def test_what_diffusers_refuses_is_an_error_that_says_so(tmp_path, pipeline):
    """Diffusers assumes the width of the published FLUX.1: it cannot take the fused layer of a smaller one."""
    lora = LoRA({"single_transformer_blocks.0.attn.to_q": low_rank(2, 32, 32)})
    with pytest.raises(LoRAError, match="FluxPipeline refuses it"):
        verify_export(saved(tmp_path, lora=lora, file_format=Format.KOHYA), lora, pipeline=pipeline)


@pytest.mark.parametrize("layers", [{"elsewhere": low_rank(2, 32, 32)}, {TO_Q: low_rank(2, 16, 16)}])
def test_layers_that_are_not_the_pipelines_are_refused(tmp_path, pipeline, layers):
    path = LoRA(layers).save(tmp_path / "lora.safetensors")
    with pytest.raises(LoRAMismatchError):
        verify_export(path, pipeline=pipeline)


def test_a_pipeline_that_loads_no_loras_is_refused(tmp_path):
    with pytest.raises(ModelError, match="DDPMPipeline loads no LoRAs"):
        verify_export(saved(tmp_path), pipeline=DDPMPipeline(unet=None, scheduler=DDPMScheduler()))


def test_names_that_no_key_map_has_prove_nothing(tmp_path):
    lora = LoRA({"blocks.0.proj": low_rank(2, 4, 4)})
    path = lora.save(tmp_path / "lora.safetensors")
    assert LoRA.load(path).layers.keys() == lora.layers.keys()
    with pytest.raises(LoRAError, match=r"no key map \(FLUX.*'blocks\.0\.proj', so nothing is proved"):
        verify_export(path, lora)


def test_a_file_of_ones_own_key_map_needs_a_pipeline_that_reads_it(tmp_path):
    own = KeyMap(
        name="own", rows=KeyRow.unchanged("blocks.{}.proj"), key_formats={Format.PEFT: KeyFormat.peft("transformer")}
    )
    path = LoRA({"blocks.0.proj": low_rank(2, 4, 4)}).save(tmp_path / "lora.safetensors", key_map=own)
    with pytest.raises(LoRAError, match="only artaug reads it whole"):
        verify_export(path, key_map=own)


def test_programs_that_read_less_are_named_with_what_they_drop(tmp_path):
    names = [f"mid_block.attentions.0.{name}" for name in ("proj_in", "transformer_blocks.0.attn1.to_q")]
    lora = LoRA({name: low_rank(2, 8, 8) for name in names})
    whole = verify_export(lora.save(tmp_path / "default.safetensors", key_map=SDXL), lora, key_map=SDXL)
    assert whole.whole == ("diffusers", "ComfyUI", "sd-scripts")
    assert not whole.partial
    path = lora.save(tmp_path / "peft.safetensors", format=Format.PEFT, key_map=SDXL)
    peft = verify_export(path, lora, key_map=SDXL)
    assert peft.whole == ("diffusers",)
    assert peft.partial["ComfyUI"] == f"drops 1 of 2 layers, {names[1]!r} first"
    assert f"whole in diffusers; ComfyUI drops 1 of 2 layers, {names[1]!r} first" in repr(peft)


def test_a_strength_in_the_header_that_a_program_does_not_see_is_said(tmp_path):
    layer = LORA.layers[TO_Q]
    tensors = {f"transformer.{TO_Q}.lora_A.weight": layer.down, f"transformer.{TO_Q}.lora_B.weight": layer.up}
    adapter = {"transformer.r": 2, "transformer.lora_alpha": 8, "transformer.target_modules": ["to_q"]}
    header = {"lora_adapter_metadata": json.dumps(adapter)}
    save_file(tensors, tmp_path / "lora.safetensors", header)
    found = verify_export(tmp_path / "lora.safetensors", LoRA({TO_Q: layer}).scaled(4), key_map=FLUX1)
    assert found.whole == ("diffusers",)
    assert found.partial["ComfyUI"] == f"reads another update of {TO_Q!r}"


@pytest.mark.parametrize(
    ("names", "broken"),
    [
        (("attn.to_q",), True),
        (("attn.to_q", "attn.to_k", "attn.to_v"), False),
        (("attn.add_v_proj",), True),
        (("ff.net.2",), False),
    ],
)
def test_diffsynth_fuses_the_parts_of_flux_itself_and_wants_them_all(tmp_path, names, broken):
    lora = LoRA({f"transformer_blocks.0.{name}": low_rank(2, 8, 8) for name in names})
    found = verify_export(lora.save(tmp_path / "lora.safetensors", key_map=FLUX1), lora, key_map=FLUX1)
    assert ("DiffSynth-Studio" in found.partial) is broken
    path = lora.save(tmp_path / "kohya.safetensors", format=Format.KOHYA, key_map=FLUX1)
    assert "DiffSynth-Studio" in verify_export(path, lora, key_map=FLUX1).whole


def test_a_wrong_strength_in_a_unet_is_found(tmp_path):
    lora = LoRA(
        {
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": low_rank(1, 8, 8),
            "up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_k": low_rank(4, 6, 8, seed=1),
            "add_embedding.linear_2": low_rank(2, 8, 8, seed=2),
        }
    )
    for file_format in SDXL.key_formats:
        path = lora.save(tmp_path / "lora.safetensors", format=file_format, key_map=SDXL)
        assert verify_export(path, lora, key_map=SDXL).readers[2] == "StableDiffusionXLPipeline"


def test_alphas_that_differ_which_diffusers_loses_in_a_unets_kohya_file_are_found(tmp_path):
    """Why artaug writes such files with one rank."""
    pair = low_rank(4, 8, 8)
    tensors, expected = {}, {}
    for number, alpha in enumerate((1.0, 2.0, 4.0)):
        key = f"lora_unet_mid_block_attentions_0_transformer_blocks_{number}_attn1_to_q"
        tensors |= {f"{key}.lora_down.weight": pair.down.clone(), f"{key}.lora_up.weight": pair.up.clone()}
        tensors |= {f"{key}.alpha": torch.tensor(alpha)}
        name = f"mid_block.attentions.0.transformer_blocks.{number}.attn1.to_q"
        expected[name] = LowRank(pair.down, pair.up * alpha / 4)
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(LoRAError, match="StableDiffusionPipeline finds another update"):
        verify_export(tmp_path / "lora.safetensors", LoRA(expected), key_map=SD15)


def test_a_negative_alpha_which_diffusers_never_finishes_to_read_is_an_error(tmp_path):
    key = "lora_unet_double_blocks_0_img_attn_proj"
    factors = {f"{key}.lora_down.weight": torch.randn(4, 32), f"{key}.lora_up.weight": torch.randn(32, 4)}
    save_file({**factors, f"{key}.alpha": torch.tensor(-2.0)}, tmp_path / "a.safetensors")
    with pytest.raises(LoRAError, match=r"alpha' is negative.*Write the file anew"):
        verify_export(tmp_path / "a.safetensors")
    again = LoRA.load(tmp_path / "a.safetensors").save(tmp_path / "b.safetensors", format=Format.KOHYA, key_map=FLUX1)
    assert verify_export(again).worst[1] < 1e-6


def with_header(folder, **settings):
    adapter = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q"], **settings}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in adapter.items()})}
    layer = LORA.layers[TO_Q]
    tensors = {f"transformer.{TO_Q}.lora_A.weight": layer.down, f"transformer.{TO_Q}.lora_B.weight": layer.up}
    save_file(tensors, folder / "lora.safetensors", header)
    return folder / "lora.safetensors"


ENDLESS = r"(.|\w|[a-z])*!"


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"layers_to_transform": [0], "layers_pattern": [ENDLESS]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_regular_expressions_that_choose_layers_and_never_end_are_not_matched(tmp_path, settings):
    assert verify_export(with_header(tmp_path, **settings)).whole == ("diffusers", "ComfyUI")


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_of_strength_that_peft_would_match_forever_is_refused(tmp_path, name):
    path = with_header(tmp_path, **{name: {".*" * 20 + "X": 2}})
    with pytest.raises(LoRAError, match="may match forever"):
        verify_export(path)
    assert verify_export(with_header(tmp_path, **{name: {r".*\.[0-9]+\.attn\.(to_q|to_k)": 2}})).worst[1] < 1e-6


@pytest.mark.parametrize("key_format", FLUX1.key_formats)
def test_a_part_of_a_fused_layer_may_be_zero(tmp_path, key_format):
    zero = LowRank(torch.randn(2, 3072), torch.zeros(3072, 2))
    names = [f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    lora = LoRA({names[0]: low_rank(2, 3072, 3072), names[1]: zero, names[2]: zero})
    path = lora.save(tmp_path / "lora.safetensors", format=key_format, key_map=FLUX1)
    assert verify_export(path, lora, key_map=FLUX1).errors.keys() == lora.layers.keys()


def test_programs_do_not_see_a_config_beside_the_file(tmp_path):
    """FLUX.2's loader takes such keys, and the strength from the file's header only."""
    layer = low_rank(2, 8, 8)
    tensors = {f"base_model.model.{TO_Q}.lora_{name}.weight": getattr(layer, factor) for name, factor in NAMES.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    for alpha, proved in ((2, True), (4, False)):
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        if proved:
            assert verify_export(tmp_path, LoRA({TO_Q: layer})).readers[2] == "Flux2Pipeline"
        else:
            with pytest.raises(LoRAError, match="only artaug reads it whole"):
                verify_export(tmp_path, LoRA({TO_Q: layer}).scaled(2))


def test_a_lokr_is_not_proved_and_said_so(tmp_path):
    key = "lycoris_transformer_blocks_0_attn_to_q"
    save_file({f"{key}.lokr_w1": torch.ones(2, 2), f"{key}.lokr_w2": torch.ones(4, 4)}, tmp_path / "lokr.safetensors")
    with pytest.raises(LoRAError, match=r"is a LoKr.*LoRA\.load\(path\)\.save"):
        verify_export(tmp_path / "lokr.safetensors")
    again = LoRA.load(tmp_path / "lokr.safetensors").save(tmp_path / "lora.safetensors")
    assert verify_export(again).whole
