"""Files in every format mean what the LoRA meant, to artaug and to diffusers."""

import itertools

import pytest
import torch
from diffusers import FluxPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from artaug.errors import LoRAError
from artaug.formats import FLUX1, QWEN_IMAGE, SDXL, Format
from artaug.lora import LoRA, LowRank

DOUBLE, SINGLE = "transformer_blocks.3.attn", "single_transformer_blocks.7"
SHAPES = {
    FLUX1: {
        f"{DOUBLE}.to_q": (4, 4),
        f"{DOUBLE}.to_v": (4, 4),
        f"{DOUBLE}.add_k_proj": (4, 4),
        f"{DOUBLE}.to_out.0": (4, 4),
        "transformer_blocks.3.ff.net.0.proj": (16, 4),
        f"{SINGLE}.attn.to_k": (4, 4),
        f"{SINGLE}.proj_mlp": (16, 4),
        f"{SINGLE}.proj_out": (4, 20),
    },
    SDXL: {
        "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": (4, 4),
        "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj": (16, 4),
        "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0": (4, 4),
    },
    QWEN_IMAGE: {f"{DOUBLE}.add_q_proj": (4, 4), "transformer_blocks.3.img_mlp.net.2": (4, 16)},
}
PAIRS = [
    (naming, one, other) for naming in SHAPES for one, other in itertools.product(naming.spellings, naming.spellings)
]


def low_rank(rank, shape, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)
    return LowRank(down.to(dtype), up.to(dtype))


@pytest.mark.parametrize(("naming", "one", "other"), PAIRS, ids=str)
@given(data=st.data())
@settings(max_examples=10)
def test_every_pair_of_formats_carries_the_same_updates(tmp_path_factory, naming, one, other, data):
    names = data.draw(st.lists(st.sampled_from(sorted(SHAPES[naming])), min_size=1, unique=True))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    lora = LoRA(
        {
            name: low_rank(data.draw(st.integers(1, 5)), SHAPES[naming][name], seed=number, dtype=data.draw(dtypes))
            for number, name in enumerate(names)
        }
    )
    folder = tmp_path_factory.mktemp("formats")
    first = LoRA.load(lora.save(folder / "one.safetensors", format=one, naming=naming), naming=naming)
    read = LoRA.load(first.save(folder / "other.safetensors", format=other, naming=naming), naming=naming)
    assert read.layers.keys() == lora.layers.keys()
    for name, layer in lora.layers.items():
        torch.testing.assert_close(read.layers[name].delta(), layer.delta(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [Format.KOHYA, Format.COMFYUI])
def test_diffusers_reads_flux_at_real_geometry_as_we_meant_it(tmp_path, kind):
    width = 3072
    lora = LoRA(
        {
            f"{DOUBLE}.to_q": low_rank(2, (width, width)),
            f"{DOUBLE}.add_v_proj": low_rank(1, (width, width), seed=1),
            f"{SINGLE}.attn.to_k": low_rank(1, (width, width), seed=2),
            f"{SINGLE}.proj_mlp": low_rank(3, (4 * width, width), seed=3),
        }
    )
    read = FluxPipeline.lora_state_dict(str(lora.save(tmp_path / "lora.safetensors", format=kind)))
    for name, layer in lora.layers.items():
        key = f"transformer.{name}"
        update = read[f"{key}.lora_B.weight"] @ read[f"{key}.lora_A.weight"][:, :8]
        torch.testing.assert_close(update, layer.up @ layer.down[:, :8])


@pytest.mark.parametrize(
    ("key", "what"),
    [("dora_scale", "DoRA"), ("lokr_w1", "LoKr"), ("hada_w1_a", "LoHa"), ("lora_mid.weight", "convolutions")],
)
def test_what_is_no_plain_lora_is_refused_by_its_name(tmp_path, key, what):
    save_file({f"lora_unet_double_blocks_0_img_attn_proj.{key}": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(LoRAError, match=what):
        LoRA.load(tmp_path / "a.safetensors")


def test_alpha_is_folded_layer_by_layer(tmp_path):
    layer, key = low_rank(3, (4, 4)), "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {
        f"{key}.lora_down.weight": layer.down,
        f"{key}.lora_up.weight": layer.up,
        f"{key}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    read = LoRA.load(tmp_path / "a.safetensors").layers["transformer_blocks.0.attn.to_out.0"]
    torch.testing.assert_close(read.delta(), layer.delta() / 3)


def test_layers_of_several_families_need_the_family(tmp_path):
    lora = LoRA({f"{DOUBLE}.to_q": low_rank(1, (4, 4))})
    with pytest.raises(LoRAError, match="could be those of FLUX"):
        lora.save(tmp_path / "a.safetensors", format=Format.KOHYA)


def test_a_format_nobody_confirmed_is_refused_by_name(tmp_path):
    lora = LoRA({name: low_rank(1, shape) for name, shape in SHAPES[SDXL].items()})
    with pytest.raises(LoRAError, match="does not write comfyui files"):
        lora.save(tmp_path / "a.safetensors", format=Format.COMFYUI, naming=SDXL)


def test_keys_of_a_model_nobody_knows_are_refused(tmp_path):
    layer = low_rank(1, (4, 4))
    tensors = {"lora_unet_alien.lora_down.weight": layer.down, "lora_unet_alien.lora_up.weight": layer.up}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(LoRAError, match="model artaug does not know"):
        LoRA.load(tmp_path / "a.safetensors")
