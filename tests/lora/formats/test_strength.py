"""The strength and the precision of files: as PEFT, LyCORIS and kohya mean them, or a LoRAError; and bounded in time."""

import json
import sys
from contextlib import suppress
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from artaug.errors import LoRAError
from artaug.lora.formats import SD15
from artaug.lora.formats import patterns as pattern_module
from artaug.lora.formats.adapter_config import ADAPTER_METADATA, read_config
from artaug.lora.formats.lokr import lokr_layer
from artaug.lora.formats.low_rank import relative_error
from artaug.lora.formats.patterns import match_patterns
from artaug.lora.fusing import ConcatFuser
from artaug.lora.lora import LoRA, LowRank

KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
TO_Q = "transformer.transformer_blocks.0.attn.to_q"


class Blocks(nn.Module):
    """Two blocks with names as of a denoiser."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"to_q": nn.Linear(8, 12), "to_k": nn.Linear(8, 8), "conv": nn.Conv2d(8, 12, 3)})
            for _ in range(2)
        )
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def peft_folder(folder, config):
    """A folder as PEFT saves it, and the updates that PEFT itself makes of it."""
    torch.manual_seed(1)
    get_peft_model(Blocks(), config).save_pretrained(folder)
    before = weights(Blocks())
    after = weights(PeftModel.from_pretrained(Blocks(), folder).merge_and_unload())
    return {
        name.removesuffix(".weight"): after[name] - before[name]
        for name in before
        if name.endswith(".weight") and not torch.equal(after[name], before[name])
    }


ALL = ["to_q", "to_k", "conv"]
CONFIGS = {
    "alpha": LoraConfig(r=4, lora_alpha=16, target_modules=ALL, init_lora_weights=False),
    "gaussian": LoraConfig(r=4, lora_alpha=2, target_modules=ALL, init_lora_weights="gaussian", lora_dropout=0.1),
    "rslora": LoraConfig(r=4, lora_alpha=16, use_rslora=True, target_modules=ALL, init_lora_weights=False),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=16,
        rank_pattern={"^blocks.0.to_q": 2, r"blocks\.[1-9]+\.(to_q|to_k)": 3},
        alpha_pattern={"1.to_q": 1, ".*to_q": 5, "conv$": 0.5},
        target_modules=ALL,
        init_lora_weights=False,
    ),
    "rslora with patterns": LoraConfig(
        r=4, use_rslora=True, rank_pattern={"to_k": 2}, alpha_pattern={"to_k": 3}, target_modules=ALL,
        init_lora_weights=False,
    ),
    "one layer": LoraConfig(
        r=2, lora_alpha=6, target_modules=ALL, layers_to_transform=[1], layers_pattern="blocks", init_lora_weights=False
    ),
    "negative": LoraConfig(r=4, lora_alpha=-8, target_modules=ALL, init_lora_weights=False),
    "lokr": LoKrConfig(r=2, alpha=6, target_modules=["to_q", "to_k"], init_weights=False),
    "lokr of both": LoKrConfig(
        r=1, alpha=3, target_modules=["to_q", "to_k"], decompose_both=True, alpha_pattern={"to_k": 2}, init_weights=False
    ),
    "lokr of whole matrices": LoKrConfig(r=8, alpha=2, target_modules=ALL, init_weights=False),
    "lokr of a core": LoKrConfig(r=1, alpha=3, target_modules=ALL, use_effective_conv2d=True, init_weights=False),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_peft_updates_what_peft_itself_updates(tmp_path, name):
    expected = peft_folder(tmp_path, CONFIGS[name])
    if name == "gaussian":  # PEFT begins with B = 0; a file of zeros is an update of nothing
        assert expected == {}
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        lora = LoRA.load(path)
        assert lora.layers.keys() == expected.keys() or not expected
        for layer, update in expected.items():
            torch.testing.assert_close(lora.layers[layer].delta(), update, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": ["LORA"]}, "LORA"),
        ({"peft_type": "LOKR"}, "LOKR"),
        ({"modules_to_save": ["proj_out"]}, "proj_out"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"target_parameters": ["weight"]}, "target_parameters"),
        ({"r": 5}, "rank 4, and the adapter's config says 5"),
        ({"r": True}, "rank r is True"),
        ({"r": None, "rank_pattern": {"to_q": 4.5}}, "4.5"),
        ({"lora_alpha": 10**400}, "no strength"),
        ({"lora_alpha": 0}, "no strength"),
        ({"lora_alpha": True}, "no strength"),
        ({"lora_alpha": float("nan")}, "no strength"),
        ({"lora_alpha": 1e300}, "no strength|range"),
        ({"lora_alpha": 1e-300}, "no strength"),
        ({"use_rslora": "false"}, "use_rslora"),
        ({"alpha_pattern": []}, "alpha_pattern"),
        ({"alpha_pattern": {"to_q": "8"}}, "no strength"),
        ({"alpha_pattern": {"to_q(": 8}}, "regular expression"),
    ],
)
def test_a_config_that_means_more_than_a_plain_lora_is_refused_by_name(tmp_path, change, message):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {f"base_model.model.to_q.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoRAError, match=message):
        LoRA.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"r": 4', "\xff"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text, encoding="latin-1")
    save_file({"base_model.model.to_q.lora_A.weight": torch.ones(4, 4)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoRAError, match="strength"):
        LoRA.load(tmp_path)


def test_every_default_of_the_installed_peft_is_a_plain_lora(tmp_path):
    config = json.dumps(LoraConfig(r=4).to_dict(), default=list)
    assert read_config({ADAPTER_METADATA: config}, tmp_path).alpha == 8
    config = json.dumps(LoKrConfig(r=4).to_dict(), default=list)
    assert read_config({ADAPTER_METADATA: config}, tmp_path).peft_type == "LOKR"


def test_an_adapter_of_peft_without_its_config_needs_an_alpha(tmp_path):
    layer = LowRank(torch.randn(4, 8), torch.randn(8, 4))
    path = tmp_path / "adapter_model.safetensors"
    save_file(
        {"base_model.model.to_q.lora_A.weight": layer.down, "base_model.model.to_q.lora_B.weight": layer.up}, path
    )
    with pytest.raises(LoRAError, match=r"without its adapter_config\.json.*alpha=16"):
        LoRA.load(path)
    torch.testing.assert_close(LoRA.load(path, alpha=16).layers["to_q"].delta(), 4 * layer.delta())
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}', encoding="utf-8")
    with pytest.raises(LoRAError, match="states its strength"):
        LoRA.load(path, alpha=16)
    save_file({f"{TO_Q}.lora_A.weight": layer.down, f"{TO_Q}.lora_B.weight": layer.up}, path)
    with pytest.raises(LoRAError, match="PEFT does not read"):
        LoRA.load(path)


def kohya(folder, tensors, key=KEY):
    save_file({f"{key}.{name}": tensor.clone() for name, tensor in tensors.items()}, folder / "a.safetensors")
    return folder / "a.safetensors"


def only_layer(path, **options):
    (layer,) = LoRA.load(path, key_map=SD15, **options).layers.values()
    return layer


@pytest.mark.parametrize(("rank", "size"), [(128, 1e-2), (128, 1e-4), (64, 1e-3), (128, 1e-5)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_alpha_of_1_is_exact_also_below_the_normal_numbers_of_float16(tmp_path, rank, size, dtype):
    down, up = (torch.randn(rank, 32) / 5).to(dtype), (torch.randn(32, rank) * size).to(dtype)
    path = kohya(tmp_path, {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0, dtype=dtype)})
    expected = LowRank(down.double(), up.double() / rank)
    assert relative_error(only_layer(path), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scaling_fusing_and_applying_half_precision_sums_in_float32(dtype):
    layers = [LowRank(torch.randn(4, 8).to(dtype), (torch.randn(8, 4) * 1e-3).to(dtype)) for _ in range(3)]
    fused = ConcatFuser().fuse([LoRA({"proj": layer}).scaled(1 / 300) for layer in layers]).layers["proj"]
    expected = sum(layer.up.double() @ layer.down.double() for layer in layers) / 300
    assert ((fused.delta().double() - expected).norm() / expected.norm()) < 1e-6


def test_a_small_update_is_applied_in_float16_as_precisely_as_a_large_one():
    model = nn.Module()
    model.proj = nn.Linear(8, 8, bias=False).half()
    model.proj.weight.data.zero_()
    layer = LowRank(torch.randn(4, 8), torch.randn(8, 4) * 1e-6)
    inputs = torch.randn(16, 8).half() * 1000
    with torch.no_grad(), LoRA({"proj": layer}).applied_to(model, scale=0.3):
        found = model.proj(inputs).double()
    expected = inputs.double() @ layer.delta().double().T * 0.3
    assert (found - expected).norm() / expected.norm() < 2e-3


@pytest.mark.parametrize("alpha", [2.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_float8_file_is_read_exactly_and_can_be_used(tmp_path, dtype, alpha):
    down, up = torch.randn(4, 8).to(dtype), torch.randn(8, 4).to(dtype)
    path = kohya(tmp_path, {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)})
    layer = only_layer(path)
    torch.testing.assert_close(layer.delta(), up.float() @ down.float() * alpha / 4)
    assert ConcatFuser().fuse([LoRA({"x": layer}).scaled(0.5)] * 2).rank == 8


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_factors_that_are_no_floating_point_numbers_are_refused(tmp_path, dtype):
    ones = torch.ones(4, 4).to(dtype)
    with pytest.raises(LoRAError, match=f"{dtype}"):
        LoRA.load(kohya(tmp_path, {"lora_down.weight": ones, "lora_up.weight": ones}))
    with pytest.raises(LoRAError, match=f"{dtype}"):
        LowRank(ones, ones)


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor([2.0]),
        torch.tensor(2),
        torch.tensor(2.0).bfloat16(),
        torch.tensor([[2.0]]),
        torch.tensor(2).double(),
    ],
)
def test_an_alpha_of_any_shape_and_type_of_one_number_is_read(tmp_path, alpha):
    layer = LowRank(torch.randn(4, 8), torch.randn(8, 4))
    path = kohya(tmp_path, {"lora_down.weight": layer.down, "lora_up.weight": layer.up, "alpha": alpha})
    torch.testing.assert_close(only_layer(path).delta(), layer.delta() / 2)


# LoKr, by the formula that LyCORIS publishes: kron(w1, w2) alpha / rank, where w1 = w1_a w1_b, w2 = w2_a w2_b


def lokr_tensors(*, first, second):
    shapes = {
        "w1": {"w1": (3, 2)}, "w1_a": {"w1_a": (3, 2), "w1_b": (2, 2)},
        "w2": {"w2": (4, 5)}, "w2_a": {"w2_a": (4, 2), "w2_b": (2, 5)},
        "tall": {"w2": (7, 2)}, "conv": {"w2": (4, 5, 3, 3)}, "small kernel": {"w2": (40, 2, 3, 1)},
        "t2": {"w2_a": (2, 4), "w2_b": (2, 5), "t2": (2, 2, 3, 3)},
    }  # fmt: skip
    return {role: torch.randn(shape) for role, shape in {**shapes[first], **shapes[second]}.items()}


@pytest.mark.parametrize("first", ["w1", "w1_a"])
@pytest.mark.parametrize("second", ["w2", "w2_a", "tall", "conv", "small kernel", "t2"])
def test_a_lokr_is_read_as_the_kronecker_product_that_it_is(tmp_path, first, second):
    parts = lokr_tensors(first=first, second=second)
    path = kohya(tmp_path, {**{f"lokr_{role}": part for role, part in parts.items()}, "alpha": torch.tensor(6.0)})
    w1 = parts["w1"] if first == "w1" else parts["w1_a"] @ parts["w1_b"]
    if second == "t2":
        w2 = torch.einsum("ijkl,jr,ip->prkl", parts["t2"], parts["w2_b"], parts["w2_a"]).contiguous()
    else:
        w2 = parts["w2"] if "w2" in parts else parts["w2_a"] @ parts["w2_b"]
    whole = "w1" in parts and "w2" in parts
    expected = torch.kron(w1.reshape(*w1.shape, *(1 for _ in w2.shape[2:])), w2) * (1.0 if whole else 3.0)
    torch.testing.assert_close(only_layer(path).delta(), expected, rtol=1e-4, atol=1e-4)


def test_a_small_lokr_file_that_is_a_giant_lora_is_refused():
    with pytest.raises(LoRAError, match="would need factors of"):
        lokr_layer({"w1": torch.ones(500, 500), "w2": torch.ones(500, 500)})


@pytest.mark.parametrize("roles", [("w1",), ("w1", "w2_a"), ("w1", "w2", "w2_a"), ("w1", "w2", "t2"), ("w1_a", "w2")])
def test_a_lokr_with_missing_or_surplus_factors_is_refused(tmp_path, roles):
    with pytest.raises(LoRAError, match="LoKr"):
        LoRA.load(kohya(tmp_path, {f"lokr_{role}": torch.ones(2, 2) for role in roles}))


# What stands beside the denoiser's factors


@pytest.mark.parametrize(
    "other",
    [
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te_x",
        "lora_text_model_encoder_x",
        "lycoris_text_encoder_2_x",
        "text_encoder_2.layers.0",
        "base_model.model.text_encoder.layers.0",
        "base_model.model.text_model.encoder.layers.0",
        "text_encoder._orig_mod.layers.0",
        "_orig_mod.text_encoder.layers.0",
        "text_encoders.clip_l.transformer.layers.0",
        "qwen25_7b.transformer.layers.0",
        "cond_stage_model.transformer.layers.0",
        "conditioner.embedders.1.layers.0",
    ],
)
def test_layers_of_text_encoders_are_left_out_on_request_and_said(tmp_path, caplog, other):
    layer = {"lora_down.weight": torch.randn(2, 8), "lora_up.weight": torch.randn(8, 2), "alpha": torch.tensor(1.0)}
    tensors = {f"{key}.{name}": tensor.clone() for key in (KEY, other) for name, tensor in layer.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(LoRAError, match=r"text encoder.*denoiser_only=True"):
        LoRA.load(tmp_path / "a.safetensors", key_map=SD15)
    only_layer(tmp_path / "a.safetensors", denoiser_only=True)
    assert "3 tensors of text encoders are left out" in caplog.text


@pytest.mark.parametrize("other", ["bundle_emb.word.string_to_param", "lora_te1_norm.w_norm", "lora_te1_fc.diff_b"])
def test_other_tensors_of_text_encoders_are_left_out_on_request(tmp_path, other):
    tensors = {f"{KEY}.lora_down.weight": torch.randn(2, 8), f"{KEY}.lora_up.weight": torch.randn(8, 2)}
    save_file({**tensors, other: torch.ones(8)}, tmp_path / "a.safetensors")
    with pytest.raises(LoRAError, match=r"text encoder.*denoiser_only=True"):
        LoRA.load(tmp_path / "a.safetensors", key_map=SD15)
    assert only_layer(tmp_path / "a.safetensors", denoiser_only=True).rank == 2


@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 2)])
def test_factors_of_any_number_of_axes_are_read_or_refused(tmp_path, shape):
    with pytest.raises(LoRAError, match="low-rank factors need shapes"):
        LoRA.load(kohya(tmp_path, {"lora_down.weight": torch.ones(shape), "lora_up.weight": torch.ones(shape)}))


@pytest.mark.parametrize("size", [1e-8, 1e-6, 1e-4, 1.0])
def test_a_small_update_is_saved_in_float16_as_precisely_as_a_large_one(tmp_path, size):
    """A power of two goes from one factor to the other; below 6e-5 float16 loses bits."""
    layer = LowRank(torch.randn(4, 64), torch.randn(64, 4) * size)
    path = LoRA({"mid_block.attentions.0.proj_in": layer}).save(tmp_path / "a.safetensors", dtype=torch.float16)
    assert relative_error(only_layer(path), layer) < 1e-3


@pytest.mark.parametrize("name", ["lora_B.bias", "diff", "diff_b", "lora_up.bias"])
def test_zeros_beside_the_factors_are_tolerated_and_other_numbers_refused_by_name(tmp_path, name):
    factors = {"lora_down.weight": torch.randn(2, 8), "lora_up.weight": torch.randn(8, 2)}
    assert only_layer(kohya(tmp_path, {**factors, name: torch.zeros(8)})).rank == 2
    with pytest.raises(LoRAError, match=rf"{name}.*bias"):
        LoRA.load(kohya(tmp_path, {**factors, name: torch.full((8,), 1e-3)}))


# Headers and tensors of any kind

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
SETTINGS = [
    "r",
    "lora_alpha",
    "alpha_pattern",
    "rank_pattern",
    "use_rslora",
    "peft_type",
    "bias",
    "use_dora",
    "init_lora_weights",
]
TENSORS = [
    "lora_A.weight",
    "lora_B.weight",
    "alpha",
    "diff",
    "lora_B.bias",
    "lokr_w1",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_t2",
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.int64, torch.bool, torch.complex64]


@settings(max_examples=60)
@given(
    header=st.text(max_size=20)
    | st.dictionaries(st.sampled_from(["transformer." + name for name in SETTINGS] + SETTINGS), JSON).map(json.dumps),
    tensors=st.dictionaries(
        st.sampled_from(TENSORS),
        st.tuples(st.lists(st.integers(0, 3), max_size=4), st.sampled_from(DTYPES), st.integers(-2, 2)),
    ),
)
def test_a_file_of_anything_is_a_lora_or_a_lora_error(tmp_path_factory, header, tensors):
    path = tmp_path_factory.getbasetemp() / "anything.safetensors"
    made = {f"{TO_Q}.{name}": torch.full(shape, fill).to(dtype) for name, (shape, dtype, fill) in tensors.items()}
    save_file(made, path, {ADAPTER_METADATA: header})
    with suppress(LoRAError):
        LoRA.load(path)


# Time grows with the file


def calls(function):
    """Python and C functions called, a count of steps that no other load on the machine changes."""
    count = 0

    def profile(_frame, event, _argument):
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(profile)
    try:
        function()
    except LoRAError:
        pass
    finally:
        sys.setprofile(None)
    return count


def layers_file(folder, count, *, halves):
    tensors = {f"{TO_Q}{index}.lora_A.weight": torch.ones(1, 1) for index in range(count)}
    if not halves:
        tensors |= {f"{TO_Q}{index}.lora_B.weight": torch.ones(1, 1) for index in range(count)}
    patterns = {f"attn.to_q{index}": 2 for index in range(count)} | {"to_[qk]1+": 3}
    header = {"transformer.lora_alpha": 1, "transformer.alpha_pattern": patterns}
    save_file(tensors, folder / "a.safetensors", {ADAPTER_METADATA: json.dumps(header)})
    return folder / "a.safetensors"


@pytest.mark.parametrize("halves", [False, True])
def test_twice_the_layers_and_patterns_take_twice_the_steps(tmp_path, halves):
    steps = []
    for count in (200, 400):
        path = layers_file(tmp_path, count, halves=halves)
        steps.append(calls(partial(LoRA.load, path)))
    assert steps[1] < 2.3 * steps[0]


@pytest.mark.parametrize("pattern", ["(a|a)*b", "(?:a{1,40}){1,40}b", "(a|aa)+c"])
def test_a_pattern_that_would_never_end_is_given_up(pattern, monkeypatch):
    monkeypatch.setattr(pattern_module, "_LIMIT_S", 0.2)
    with pytest.raises(LoRAError, match=r"more than 0\.2 s"):
        match_patterns({pattern: 1.0}, ["a" * 400 + "!b!"])


@pytest.mark.parametrize("pattern", ["(a+)+b", "a*a*a*a*a*a*b", "(.*)*b", "(?:a?){60}a{60}"])
def test_patterns_that_python_never_ends_on_are_matched(pattern):
    assert match_patterns({pattern: 1.0}, ["a" * 400 + "!b!"]) == {}


def test_many_patterns_share_one_limit(monkeypatch):
    monkeypatch.setattr(pattern_module, "_LIMIT_S", 0.05)
    with pytest.raises(LoRAError, match="Expected names"):
        match_patterns({f"a+{index}": 1.0 for index in range(1000)}, [f"blocks.{k}.attn.to_q" for k in range(1000)])


@pytest.mark.parametrize("pattern", ["to_q(", "[", "a" * 201 + "+", "(?P<x"])
def test_what_is_no_regular_expression_is_refused(pattern):
    with pytest.raises(LoRAError, match="no regular expression"):
        match_patterns({pattern: 1.0}, ["to_q"])


PIECES = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", "(a|b.a)", "a*", "b+", ".*", ".?", "[0-9]+"])


@given(pieces=st.lists(PIECES, max_size=5), start=st.sampled_from(["", "^"]), name=st.text("ab.1", max_size=8))
def test_a_pattern_matches_what_pefts_own_function_matches(pieces, start, name):
    from peft.utils.other import get_pattern_key  # noqa: PLC0415 - the oracle

    pattern = start + "".join(pieces)
    found = name in match_patterns({pattern: 1.0}, [name])
    expected = get_pattern_key([pattern], name) == pattern
    if pattern != name:  # PEFT returns the name itself where nothing matches
        assert found == expected
