"""Files in every format: round trips, alpha, precision, and what is refused."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from artaug.errors import LoRAError, StorageError
from artaug.lora.formats import FLUX1, FLUX2, QWEN_IMAGE, SD3, SD15, SDXL, Z_IMAGE, Format, save
from artaug.lora.lora import LoRA, LowRank

DOUBLE, SINGLE = "transformer_blocks.3.attn", "single_transformer_blocks.7"
UNET = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (4, 4),
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": (16, 4),
    "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0": (4, 4),
    "up_blocks.2.resnets.1.time_emb_proj": (8, 4),
    "time_embedding.linear_2": (4, 4),
    "conv_in": (4, 3, 3, 3),
    "down_blocks.0.downsamplers.0.conv": (4, 4, 3, 3),
    "mid_block.resnets.1.conv1": (4, 4, 3, 3),
    "up_blocks.1.resnets.0.conv_shortcut": (4, 8, 1, 1),
    "up_blocks.2.attentions.0.proj_in": (4, 4, 1, 1),
}
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
    FLUX2: {
        f"{DOUBLE}.to_k": (4, 4),
        "transformer_blocks.3.ff_context.linear_in": (24, 4),
        f"{SINGLE}.attn.to_qkv_mlp_proj": (36, 4),
        f"{SINGLE}.attn.to_out": (4, 16),
    },
    SD3: {f"{DOUBLE}2.to_q": (4, 4), "transformer_blocks.3.norm1.linear": (24, 4)},
    SDXL: {**UNET, "add_embedding.linear_1": (4, 8)},
    SD15: UNET,
    QWEN_IMAGE: {f"{DOUBLE}.add_q_proj": (4, 4), "transformer_blocks.3.img_mlp.net.2": (4, 16)},
    Z_IMAGE: {
        "layers.11.attention.to_q": (4, 4),
        "layers.11.attention.to_out.0": (4, 4),
        "context_refiner.1.feed_forward.w2": (4, 12),
    },
}
PAIRS = [
    pytest.param(key_map, first, second, id=f"{key_map.name}-{first}-{second}")
    for key_map in SHAPES
    for first, second in itertools.product(key_map.key_formats, key_map.key_formats)
]
KEY = "lora_unet_double_blocks_0_img_attn_proj"
LAYER = "transformer_blocks.0.attn.to_out.0"


def low_rank(rank, shape, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, *shape[1:], generator=generator), torch.randn(shape[0], rank, generator=generator)
    return LowRank(down.to(dtype), up.to(dtype))


def kohya(layer, *, key=KEY, alpha=None):
    tensors = {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": layer.up}
    return tensors if alpha is None else {**tensors, f"{key}.alpha": torch.tensor(alpha)}


def read(folder, tensors, header=None):
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, folder / "a.safetensors", header)
    return LoRA.load(folder / "a.safetensors")


# Round trips


@st.composite
def loras(draw, key_map):
    """A LoRA on a random choice of a family's layers, with different ranks, precisions and strengths."""
    names = draw(st.lists(st.sampled_from(sorted(SHAPES[key_map])), min_size=1, unique=True))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    strengths = st.sampled_from([1.0, 0.5, 1 / 3, -2.0])
    layers = {}
    for number, name in enumerate(names):
        layer = low_rank(draw(st.integers(1, 5)), SHAPES[key_map][name], seed=number, dtype=draw(dtypes))
        layers[name] = LowRank(layer.down, (layer.up * draw(strengths)).to(draw(dtypes)))
    return LoRA(layers)


@pytest.mark.parametrize(("key_map", "first_format", "second_format"), PAIRS)
@given(data=st.data())
@settings(max_examples=6)
def test_every_pair_of_formats_carries_the_same_updates(tmp_path_factory, key_map, first_format, second_format, data):
    lora, folder = data.draw(loras(key_map)), tmp_path_factory.mktemp("formats")
    first = LoRA.load(lora.save(folder / "first.safetensors", format=first_format, key_map=key_map), key_map=key_map)
    again = LoRA.load(first.save(folder / "second.safetensors", format=second_format, key_map=key_map), key_map=key_map)
    assert again.layers.keys() == lora.layers.keys()
    for name, layer in lora.layers.items():
        torch.testing.assert_close(again.layers[name].delta(), layer.delta(), rtol=1e-6, atol=1e-6)


@given(alpha=st.floats(0.01, 100) | st.floats(-100, -0.01), rank=st.integers(1, 5))
@settings(max_examples=20)
def test_alpha_over_rank_is_folded_in(tmp_path_factory, alpha, rank):
    layer = low_rank(rank, (4, 4))
    found = read(tmp_path_factory.mktemp("alpha"), kohya(layer, alpha=alpha)).layers[LAYER]
    torch.testing.assert_close(found.delta(), layer.delta() * (alpha / rank), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [2.0, 1.0, -2.0, 4.0, 0.5])
def test_a_strength_that_is_a_power_of_two_keeps_the_precision(tmp_path, alpha):
    layer = low_rank(2, (4, 4), dtype=torch.bfloat16)
    found = read(tmp_path, kohya(layer, alpha=alpha)).layers[LAYER]
    assert found.up.dtype == torch.bfloat16
    assert torch.equal(found.up, layer.up * (alpha / 2))


@pytest.mark.parametrize("alpha", [3.0, 1.999, 1e-30])
def test_any_other_strength_is_multiplied_in_float32(tmp_path, alpha):
    layer = low_rank(2, (4, 4), dtype=torch.bfloat16)
    found = read(tmp_path, kohya(layer, alpha=alpha)).layers[LAYER]
    assert (found.down.dtype, found.up.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.up, layer.up.float() * (torch.tensor(alpha) / 2), rtol=1e-6, atol=0)


def test_an_alpha_beside_the_layer_wins_over_the_header_and_a_pattern_over_lora_alpha(tmp_path):
    layer, stem = low_rank(2, (4, 4)), f"transformer.{LAYER}"
    tensors = {f"{stem}.lora_A.weight": layer.down, f"{stem}.lora_B.weight": layer.up}
    adapter = {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"to_out.0": 4}}
    header = {"lora_adapter_metadata": json.dumps(adapter)}
    torch.testing.assert_close(read(tmp_path, tensors, header).layers[LAYER].delta(), 2 * layer.delta())
    tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    torch.testing.assert_close(read(tmp_path, tensors, header).layers[LAYER].delta(), 0.5 * layer.delta())


def test_a_fused_layer_keeps_the_rank_of_each_part(tmp_path):
    parts = {f"{DOUBLE}.to_q": low_rank(1, (4, 4)), f"{DOUBLE}.to_v": low_rank(3, (4, 4), seed=1)}
    path = LoRA(parts).save(tmp_path / "a.safetensors", format=Format.KOHYA, key_map=FLUX1)
    loaded = LoRA.load(path, key_map=FLUX1)
    assert {name: layer.rank for name, layer in loaded.layers.items()} == {f"{DOUBLE}.to_q": 1, f"{DOUBLE}.to_v": 3}


def test_a_fused_layer_of_zeros_has_all_its_parts(tmp_path):
    zero = LowRank(torch.ones(2, 4), torch.zeros(12, 2))
    loaded = read(tmp_path, kohya(zero, key="lora_unet_double_blocks_0_img_attn_qkv"))
    assert {name: layer.shape for name, layer in loaded.layers.items()} == {
        f"transformer_blocks.0.attn.to_{part}": (4, 4) for part in "qkv"
    }


@pytest.mark.parametrize(("outputs", "refused"), [(12, False), (13, True), (14, True)])
def test_a_fused_layer_whose_rows_cannot_be_split_is_refused(tmp_path, outputs, refused):
    tensors = kohya(low_rank(2, (outputs, 4)), key="lora_unet_double_blocks_0_img_attn_qkv")
    if refused:
        with pytest.raises(LoRAError, match=rf"{outputs} outputs, which are no multiple of 3"):
            read(tmp_path, tensors)
    else:
        assert len(read(tmp_path, tensors).layers) == 3


@pytest.mark.parametrize("key_map", [SDXL, SD15])
def test_a_kohya_file_of_a_unet_has_one_rank(tmp_path, key_map):
    lora = LoRA({name: low_rank(rank, SHAPES[key_map][name]) for rank, name in enumerate(SHAPES[key_map], start=1)})
    tensors = load_file(lora.save(tmp_path / "a.safetensors", format=Format.KOHYA, key_map=key_map))
    assert {tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")} == {float(lora.rank)}
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_down" in key} == {lora.rank}


# Precision


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [(torch.float32, 0, 1e-9), (torch.float16, 1e-5, 4e-4), (torch.bfloat16, 1e-4, 4e-3)]
)
@pytest.mark.parametrize("kind", FLUX1.key_formats)
def test_a_file_has_the_given_precision_and_the_documented_error(tmp_path, kind, dtype, least, most):
    lora = LoRA({f"{DOUBLE}.to_q": low_rank(4, (64, 64)), f"{DOUBLE}.to_k": low_rank(2, (64, 64), seed=1)})
    path = lora.save(tmp_path / "a.safetensors", format=kind, key_map=FLUX1, dtype=dtype)
    factors = {tensor.dtype for key, tensor in load_file(path).items() if not key.endswith(".alpha")}
    assert factors == {dtype}
    for name, layer in LoRA.load(path).layers.items():
        expected = lora.layers[name].delta()
        assert least <= (layer.delta() - expected).norm() / expected.norm() <= most


@pytest.mark.parametrize("size", [1e-14, 1e9])
def test_a_precision_that_cannot_hold_a_layer_is_refused_before_anything_is_written(tmp_path, size):
    layer = low_rank(2, (4, 4))
    lora = LoRA({LAYER: LowRank(layer.down, layer.up * size)})
    with pytest.raises(LoRAError, match=r"would lose .* of its update in torch\.float16"):
        lora.save(tmp_path / "a.safetensors", dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    assert LoRA.load(lora.save(tmp_path / "a.safetensors", dtype=torch.bfloat16)).layers.keys() == {LAYER}


@pytest.mark.parametrize(("error", "refused"), [(0.01, False), (0.0101, True)])
def test_a_cast_may_cost_up_to_one_percent(monkeypatch, error, refused):
    monkeypatch.setattr(save, "relative_error", lambda *_: error)
    layers = {LAYER: low_rank(2, (4, 4))}
    if refused:
        with pytest.raises(LoRAError, match="would lose 1% of its update"):
            save.to_state_dict(layers, Format.PEFT, dtype=torch.float16)
    else:
        assert save.to_state_dict(layers, Format.PEFT, dtype=torch.float16)


def test_a_precision_that_readers_do_not_know_is_refused(tmp_path):
    with pytest.raises(LoRAError, match=r"cannot be of torch\.float8_e4m3fn"):
        LoRA({LAYER: low_rank(2, (4, 4))}).save(tmp_path / "a.safetensors", dtype=torch.float8_e4m3fn)


# What is refused


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector.weight", "DoRA"),
        ("lokr_w1", "LoKr"),
        ("hada_w1_a", "LoHa"),
        ("oft_blocks", "OFT"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(tmp_path, key, what):
    with pytest.raises(LoRAError, match=what):
        read(tmp_path, {**kohya(low_rank(2, (4, 4))), f"{KEY}.{key}": torch.ones(2, 2)})


@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
    kernel=st.sampled_from([(1, 1), (3, 3), (1, 3)]),
    alpha=st.sampled_from([None, 0.5, 3.0]),
)
@settings(max_examples=30)
def test_a_middle_factor_of_a_convolution_is_multiplied_into_down(tmp_path_factory, sizes, kernel, alpha):
    inputs, outputs, rank = sizes
    down, middle, up = (
        torch.randn(rank, inputs, 1, 1),
        torch.randn(rank, rank, *kernel),
        torch.randn(outputs, rank, 1, 1),
    )
    key = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": middle, f"{key}.lora_up.weight": up}
    tensors |= {} if alpha is None else {f"{key}.alpha": torch.tensor(alpha)}
    (layer,) = read(tmp_path_factory.mktemp("middle"), tensors).layers.values()
    pixels = torch.randn(2, inputs, 7, 7)
    conv2d = torch.nn.functional.conv2d
    expected = conv2d(conv2d(conv2d(pixels, down), middle), up) * (1 if alpha is None else alpha / rank)
    torch.testing.assert_close(conv2d(pixels, layer.delta()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("down", "middle", "up"),
    [
        ((2, 4, 3, 3), None, (4, 2)),
        ((2, 4, 3, 3), None, (4, 2, 3, 3)),
        ((2, 4, 3, 3), (2, 2, 3, 3), (4, 2, 1, 1)),
        ((2, 4, 1, 1), (3, 3, 3, 3), (4, 2, 1, 1)),
    ],
)
def test_convolutions_whose_shapes_do_not_match_are_refused(tmp_path, down, middle, up):
    key = "lora_unet_down_blocks_0_resnets_0_conv1"
    shapes = {"lora_down": down, "lora_mid": middle, "lora_up": up}
    tensors = {f"{key}.{name}.weight": torch.ones(shape) for name, shape in shapes.items() if shape}
    with pytest.raises(LoRAError, match="low-rank factors"):
        read(tmp_path, tensors)


def test_a_text_encoders_layers_are_refused_by_their_name(tmp_path):
    key = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    with pytest.raises(LoRAError, match="text encoder"):
        read(tmp_path, {**kohya(low_rank(2, (4, 4))), **kohya(low_rank(2, (4, 4)), key=key)})


@pytest.mark.parametrize("alpha", [0.0, float("nan"), float("inf")])
def test_an_alpha_that_leaves_no_strength_is_refused(tmp_path, alpha):
    with pytest.raises(LoRAError, match=rf"alpha of .* is {alpha}.*no strength"):
        read(tmp_path, kohya(low_rank(2, (4, 4)), alpha=alpha))


def test_an_alpha_of_several_numbers_is_refused(tmp_path):
    with pytest.raises(LoRAError, match="no strength"):
        read(tmp_path, {**kohya(low_rank(2, (4, 4))), f"{KEY}.alpha": torch.ones(2)})


@pytest.mark.parametrize("alpha", [0, "8", None])
def test_an_alpha_in_the_header_that_leaves_no_strength_is_refused(tmp_path, alpha):
    tensors = {"transformer.proj.lora_A.weight": torch.ones(2, 4), "transformer.proj.lora_B.weight": torch.ones(4, 2)}
    with pytest.raises(LoRAError, match="no strength"):
        read(tmp_path, tensors, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": alpha})})


@pytest.mark.parametrize("down", [torch.zeros(0, 4), torch.full((2, 4), torch.nan), torch.full((2, 4), torch.inf)])
def test_factors_without_rank_or_numbers_are_refused(tmp_path, down):
    up = torch.zeros(4, down.shape[0])
    with pytest.raises(LoRAError, match=r"a\.safetensors is not a LoRA artaug can read: low-rank factors"):
        read(tmp_path, {f"{KEY}.lora_down.weight": down, f"{KEY}.lora_up.weight": up})


def test_a_layer_with_two_endings_is_refused(tmp_path):
    layer = low_rank(2, (4, 4))
    with pytest.raises(LoRAError, match="twice, under two names"):
        read(tmp_path, {**kohya(layer), f"{KEY}.lora_A.weight": layer.down})


def test_a_layer_with_two_names_is_refused(tmp_path):
    layer = low_rank(2, (4, 4))
    other = "lora_unet_transformer_blocks_0_attn_to_out_0"
    with pytest.raises(LoRAError, match="twice"):
        read(tmp_path, {**kohya(layer), **kohya(layer, key=other)})


@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
def test_a_file_cut_short_is_refused(tmp_path, part):
    path = LoRA({LAYER: low_rank(2, (4, 4))}).save(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(LoRAError, match=r"a\.safetensors is not a LoRA file"):
        LoRA.load(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_unopened(tmp_path, zipped):
    torch.save(kohya(low_rank(2, (4, 4))), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(LoRAError, match="is a pickle, which can run any code"):
        LoRA.load(tmp_path / "a.pt")


def test_keys_of_an_unknown_model_are_refused(tmp_path):
    with pytest.raises(LoRAError, match="model artaug does not know"):
        read(tmp_path, kohya(low_rank(1, (4, 4)), key="lora_unet_alien"))


def test_layers_that_several_families_have_need_a_key_map(tmp_path):
    lora = LoRA({f"{DOUBLE}.to_q": low_rank(1, (4, 4))})
    with pytest.raises(LoRAError, match=r"could be those of FLUX.*Choose one"):
        lora.save(tmp_path / "a.safetensors", format=Format.KOHYA)
    assert not list(tmp_path.iterdir())


def test_a_format_that_no_other_reader_verified_is_refused(tmp_path):
    lora = LoRA({name: low_rank(1, shape) for name, shape in SHAPES[SDXL].items()})
    with pytest.raises(LoRAError, match="does not write comfyui files"):
        lora.save(tmp_path / "a.safetensors", format=Format.COMFYUI, key_map=SDXL)
    assert not list(tmp_path.iterdir())


def test_a_layer_that_a_format_cannot_carry_is_refused_by_name(tmp_path):
    lora = LoRA({"norm_out.linear": low_rank(1, (8, 4))})
    with pytest.raises(LoRAError, match=r"cannot carry the update of 'norm_out\.linear'"):
        lora.save(tmp_path / "a.safetensors", format=Format.KOHYA, key_map=FLUX1)


def test_a_file_that_cannot_be_written_is_an_error_with_advice(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"the LoRA file .* could not be written: .* Make room"):
        LoRA({LAYER: low_rank(1, (4, 4))}).save(tmp_path / "file" / "a.safetensors")
