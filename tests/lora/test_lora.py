"""LoRA as a value: its factors, its files, and the module that it is applied to."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from artaug._internal import files
from artaug.errors import LoRAError, LoRAMismatchError
from artaug.lora.formats import Format
from artaug.lora.lora import LoRA, LowRank, sum_loras
from support.tiny_flux import tiny_flux

TO_Q = "transformer_blocks.0.attn.to_q"
FF = "transformer_blocks.0.ff.net.0.proj"
SINGLE = "single_transformer_blocks.1.proj_out"
A, B = torch.arange(8.0).reshape(2, 4) - 3, torch.arange(6.0).reshape(3, 2) + 1


def low_rank(rank, inputs, outputs, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
    return LowRank(down.to(dtype), up.to(dtype))


def write(path, tensors, adapter=None):
    metadata = (
        None
        if adapter is None
        else {"lora_adapter_metadata": adapter if isinstance(adapter, str) else json.dumps(adapter)}
    )
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata=metadata)
    return path


def factors(name="proj", *, down=A, up=B):
    return {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}


def delta_in(path, name="proj"):
    return LoRA.load(path).layers[name].delta()


# Values


@pytest.mark.parametrize(
    ("down", "up"),
    [((2, 4), (3, 1)), ((2,), (3, 2)), ((2, 4, 1, 1, 1, 1), (3, 2)), ((2, 4), (3, 2, 1)), ((0, 4), (3, 0))],
)
def test_factors_whose_shapes_do_not_match_are_refused(down, up):
    with pytest.raises(LoRAError, match="need shapes") as caught:
        LowRank(torch.zeros(down), torch.zeros(up))
    assert str(tuple(down)) in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_with_nan_or_infinity_are_refused(value):
    with pytest.raises(LoRAError, match="NaN or infinity"):
        LowRank(torch.full((1, 2), value), torch.ones(2, 1))


def test_a_lora_without_layers_is_refused():
    with pytest.raises(LoRAError, match="at least one layer"):
        LoRA({})


def test_the_repr_of_a_lora_is_its_size():
    assert repr(LoRA({"one": LowRank(A, B), "two": low_rank(5, 4, 3)})) == "LoRA(2 layers, rank 5)"


def test_the_layers_of_a_lora_cannot_be_changed():
    layers = {"proj": LowRank(A, B)}
    lora = LoRA(layers)
    layers.clear()
    assert list(lora.layers) == ["proj"]
    with pytest.raises(TypeError):
        lora.layers["proj"] = None


def test_scaling_scales_the_update_and_leaves_the_original_alone():
    lora = LoRA({"proj": LowRank(A, B)})
    assert torch.equal(lora.scaled(-0.5).layers["proj"].delta(), -0.5 * (B @ A))
    assert torch.equal(lora.layers["proj"].delta(), B @ A)


@pytest.mark.parametrize("travelled", [copy.deepcopy, lambda lora: pickle.loads(pickle.dumps(lora))])
def test_a_lora_can_be_copied_and_sent_to_another_process(travelled):
    lora = travelled(LoRA({"proj": LowRank(A, B)}))
    assert torch.equal(lora.layers["proj"].delta(), B @ A)


def test_the_update_of_a_sum_is_the_sum_of_the_updates():
    first, second = LoRA({"proj": LowRank(A, B)}), LoRA({"proj": low_rank(3, 4, 3), "out": low_rank(1, 5, 5)})
    total = sum_loras([first, second])
    torch.testing.assert_close(total.layers["proj"].delta(), B @ A + second.layers["proj"].delta())
    assert torch.equal(total.layers["out"].delta(), second.layers["out"].delta())


# Files


@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_a_loaded_lora_equals_the_saved_one(tmp_path_factory, ranks, dtype):
    lora = LoRA({f"blocks.{n}.proj": low_rank(rank, 4, 3, seed=n, dtype=dtype) for n, rank in enumerate(ranks)})
    loaded = LoRA.load(lora.save(tmp_path_factory.mktemp("lora") / "lora.safetensors"))
    assert loaded.layers.keys() == lora.layers.keys()
    for name, layer in lora.layers.items():
        read = loaded.layers[name]
        assert read.rank == lora.rank
        assert read.down.dtype == dtype
        assert torch.equal(read.down[: layer.rank], layer.down)
        assert torch.equal(read.up[:, : layer.rank], layer.up)
        assert not read.down[layer.rank :].any()
        assert not read.up[:, layer.rank :].any()


def test_saving_creates_folders_and_keeps_metadata(tmp_path):
    path = LoRA({"proj": LowRank(A, B)}).save(tmp_path / "runs" / "lora.safetensors", metadata={"base": "tiny"})
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert (header["format"], header["base"]) == ("pt", "tiny")
    assert json.loads(header["lora_adapter_metadata"])["transformer.lora_alpha"] == 2


def test_metadata_cannot_overwrite_reserved_names(tmp_path):
    with pytest.raises(LoRAError, match=r"may not set \['lora_adapter_metadata'\]"):
        LoRA({"proj": LowRank(A, B)}).save(tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": "{}"})
    assert not list(tmp_path.iterdir())


def test_layers_may_share_a_tensor(tmp_path):
    shared = LoRA({"to_q": LowRank(A, B), "to_k": LowRank(A, B[:, [1, 0]]), "to_v": LowRank(A[:, :2], B.clone())})
    loaded = LoRA.load(shared.save(tmp_path / "lora.safetensors"))
    assert torch.equal(loaded.layers["to_k"].delta(), B[:, [1, 0]] @ A)


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = LoRA({"proj": LowRank(A, B)}).save(tmp_path / "lora.safetensors")

    def half_a_file(_tensors, target, _header):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", half_a_file)
    with pytest.raises(OSError, match="disk full"):
        LoRA({"proj": LowRank(2 * A, B)}).save(path)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]
    assert torch.equal(delta_in(path), B @ A)


def flux_lora(*, dtype=torch.float32):
    """Ranks differ, and the last layer's name is also the end of a layer's name outside the blocks."""
    layers = {TO_Q: low_rank(3, 32, 32), FF: low_rank(1, 32, 128, seed=1), SINGLE: low_rank(2, 160, 32, seed=2)}
    return LoRA({name: LowRank(layer.down.to(dtype), layer.up.to(dtype)) for name, layer in layers.items()})


def read_back(transformer):
    """The dense updates that diffusers and PEFT have loaded, by layer."""
    return {
        name: layer.scaling["default_0"] * layer.lora_B["default_0"].weight @ layer.lora_A["default_0"].weight
        for name, layer in transformer.named_modules()
        if hasattr(layer, "lora_A")
    }


def test_diffusers_reads_the_same_updates_for_the_same_layers(tmp_path):
    lora, pipeline = flux_lora(), tiny_flux()
    pipeline.load_lora_weights(lora.save(tmp_path / "lora.safetensors"))
    read = read_back(pipeline.transformer)
    assert read.keys() == lora.layers.keys()
    for name, layer in lora.layers.items():
        torch.testing.assert_close(read[name], layer.delta())


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"to_q": 7}}, {"alpha_pattern": {r"attn\.to_.": 3, "to_q": 9}}],
    ids=repr,
)
def test_a_file_of_diffusers_is_read_at_the_strength_diffusers_gives_it(tmp_path, options):
    from peft import LoraConfig  # noqa: PLC0415
    from peft.utils import get_peft_model_state_dict  # noqa: PLC0415

    pipeline = tiny_flux()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "proj_mlp"], init_lora_weights=False, **options)
    pipeline.transformer.add_adapter(config, adapter_name="default_0")
    pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer, adapter_name="default_0"),
        transformer_lora_adapter_metadata=pipeline.transformer.peft_config["default_0"].to_dict(),
    )
    lora, expected = LoRA.load(tmp_path / "pytorch_lora_weights.safetensors"), read_back(pipeline.transformer)
    assert lora.layers.keys() == expected.keys()
    for name, layer in lora.layers.items():
        torch.testing.assert_close(layer.delta(), expected[name])


@pytest.mark.parametrize(
    ("adapter", "strength"),
    [
        (None, 1.0),
        ({}, 1.0),
        ({"transformer.r": 2, "transformer.lora_alpha": 2}, 1.0),
        ({"transformer.r": 2, "transformer.lora_alpha": 8}, 4.0),
        ({"transformer.r": 2, "transformer.lora_alpha": 8, "transformer.use_rslora": True}, 8 / 2**0.5),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"proj": 1}}, 0.5),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"roj": 1}}, 4.0),
    ],
)
def test_alpha_in_the_header_is_folded_in(tmp_path, adapter, strength):
    path = write(tmp_path / "lora.safetensors", factors("blocks.0.proj"), adapter)
    torch.testing.assert_close(delta_in(path, "blocks.0.proj"), strength * (B @ A))


def test_alpha_beside_a_layer_is_folded_into_that_layer(tmp_path):
    tensors = {**factors("one"), **factors("two"), "transformer.one.alpha": torch.tensor(6.0)}
    path = write(tmp_path / "lora.safetensors", tensors)
    torch.testing.assert_close(delta_in(path, "one"), 3 * (B @ A))
    torch.testing.assert_close(delta_in(path, "two"), B @ A)


def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path):
    (tmp_path / "text.safetensors").write_text("not a LoRA")
    for name in ("text.safetensors", "."):
        with pytest.raises(LoRAError, match=r"is not a LoRA file: .* Expected a safetensors file\."):
            LoRA.load(tmp_path / name)
    with pytest.raises(LoRAError, match=r"there is no file me/flux-artaug\. .* artaug\.hub\.pull"):
        LoRA.load("me/flux-artaug")


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (
            {"lora_unet_double_blocks_0_img_mlp_0.lora_down.weight": A},
            "lora_unet_double_blocks_0_img_mlp_0.lora_down.weight",
        ),
        ({"transformer.proj.lora_A.weight": A}, "transformer.proj.lora_A.weight"),
        ({"transformer.proj.lora_B.weight": B}, "transformer.proj.lora_B.weight"),
        ({**factors(), "transformer.out.lora_B.weight": B}, "transformer.out.lora_B.weight"),
        ({**factors(), "transformer.out.alpha": torch.tensor(1.0)}, "transformer.out.alpha"),
        ({**factors(), "transformer.proj.lora_B.bias": B}, "transformer.proj.lora_B.bias"),
        ({**factors(), "text_encoder.proj.lora_A.weight": A}, "text_encoder.proj.lora_A.weight"),
        ({}, "no tensor at all"),
    ],
)
def test_a_file_with_an_unknown_key_is_refused_naming_the_key(tmp_path, tensors, named):
    path = write(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(LoRAError, match="holds") as caught:
        LoRA.load(path)
    assert f"{named!r}" in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("adapter", ["{", "[1]", '"text"'])
def test_a_header_that_cannot_be_parsed_is_refused(tmp_path, adapter):
    with pytest.raises(LoRAError, match="so its strength is unknown"):
        LoRA.load(write(tmp_path / "lora.safetensors", factors(), adapter))


@pytest.mark.parametrize("down", [torch.zeros(3, 4), torch.zeros(2, 4, 1), torch.full((2, 4), torch.nan)])
def test_mismatched_factors_in_a_file_are_refused_naming_the_file(tmp_path, down):
    path = write(tmp_path / "lora.safetensors", factors(down=down))
    with pytest.raises(LoRAError, match=r"lora\.safetensors is not a LoRA artaug can read: low-rank factors"):
        LoRA.load(path)


# Applying


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 6, dtype=dtype), nn.Linear(6, 3, bias=False, dtype=dtype)

    def forward(self, inputs):
        return self.second(torch.tanh(self.first(inputs)))


def net_lora(seed=0):
    return LoRA({"first": low_rank(2, 4, 6, seed=seed), "second": low_rank(1, 6, 3, seed=seed + 1)})


def with_weights(net, *loras, scale=1.0):
    """The oracle: a copy with the updates added to its weights."""
    net = copy.deepcopy(net)
    for lora in loras:
        for name, layer in lora.layers.items():
            net.get_submodule(name).weight.data += scale * layer.delta()
    return net


def hooks_of(net):
    return [tuple(layer._forward_hooks) for layer in net.modules() if layer._forward_hooks]  # noqa: SLF001 - torch has no public list


INPUTS = torch.linspace(-1, 1, 20).reshape(5, 4)


@given(scale=st.floats(-2, 2), seed=st.integers(0, 100))
def test_applying_adds_exactly_the_update(scale, seed):
    net, lora = Net(), net_lora(seed)
    expected = with_weights(net, lora, scale=scale)(INPUTS)
    with lora.applied_to(net, scale=scale):
        torch.testing.assert_close(net(INPUTS), expected, rtol=1e-5, atol=1e-5)


def test_several_applied_loras_add_up():
    net, inner, outer = Net(), net_lora(1), net_lora(7)
    expected = with_weights(net, inner, outer)(INPUTS)
    with inner.applied_to(net), outer.applied_to(net):
        torch.testing.assert_close(net(INPUTS), expected, rtol=1e-5, atol=1e-5)
    with sum_loras([inner, outer]).applied_to(net):
        torch.testing.assert_close(net(INPUTS), expected, rtol=1e-5, atol=1e-5)


def test_applying_leaves_no_trace_even_after_an_exception():
    net = Net()
    plain, weights = net(INPUTS), copy.deepcopy(net.state_dict())
    with pytest.raises(KeyboardInterrupt), net_lora().applied_to(net):
        raise KeyboardInterrupt
    assert torch.equal(net(INPUTS), plain)
    assert not any(hooks_of(net))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())


def test_an_applied_lora_takes_the_precision_of_the_inputs():
    net = Net(torch.bfloat16)
    with net_lora().applied_to(net):
        assert net(INPUTS.bfloat16()).dtype == torch.bfloat16


def test_gradients_flow_through_an_applied_lora_and_not_into_it():
    net, inputs = Net(), INPUTS.clone().requires_grad_()
    oracle = with_weights(net, net_lora())
    with net_lora().applied_to(net):
        (gradient,) = torch.autograd.grad(net(inputs).sum(), inputs)
    (expected,) = torch.autograd.grad(oracle(inputs).sum(), inputs)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            LoRA({"a": LowRank(A, B), "b": LowRank(A, B)}),
            "names 2 layers and Net has none of them; first missing is 'a', names there look like 'first'",
        ),
        (LoRA({"first": low_rank(2, 4, 6), "b": LowRank(A, B)}), "has only 1 of them; first missing is 'b'"),
        (LoRA({"first": low_rank(2, 4, 3)}), r"updates 'first' with shape \(3, 4\), and in Net it has \(6, 4\)"),
    ],
)
def test_a_lora_for_another_model_is_refused_before_anything_changes(lora, message):
    net = Net()
    with pytest.raises(LoRAMismatchError, match=message), lora.applied_to(net):
        pytest.fail("the block ran")
    assert not any(hooks_of(net))


def test_a_module_without_linear_layers_is_refused():
    with pytest.raises(LoRAMismatchError, match="no linear layer"), LoRA({"a": LowRank(A, B)}).applied_to(nn.ReLU()):
        pytest.fail("the block ran")


def test_a_format_can_be_given_by_its_name(tmp_path):
    lora = LoRA({TO_Q: low_rank(2, 8, 8), FF: low_rank(3, 8, 8, seed=1)})
    by_name, by_member = (
        lora.save(tmp_path / f"{format_!r}.safetensors", format=format_) for format_ in ("peft", Format.PEFT)
    )
    assert by_name.read_bytes() == by_member.read_bytes()
    with pytest.raises(LoRAError, match=r"there is no format 'webui': choose one of 'peft', 'kohya'"):
        lora.save(tmp_path / "lora.safetensors", format="webui")


def test_the_update_can_be_weighted_per_token_or_skipped_per_layer():
    net, lora = Net(), net_lora()
    weights = torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0]).unsqueeze(1)
    hidden = torch.tanh(net.first(INPUTS) + weights * (INPUTS @ lora.layers["first"].delta().T))
    with lora.applied_to(net, output_weights=lambda name, _: weights if name == "first" else None):
        torch.testing.assert_close(net(INPUTS), net.second(hidden), rtol=1e-5, atol=1e-5)


def test_the_digest_distinguishes_loras():
    lora = LoRA({TO_Q: low_rank(2, 8, 8)})
    assert lora.digest == LoRA({TO_Q: low_rank(2, 8, 8)}).digest
    assert len({lora.digest, lora.scaled(2).digest, LoRA({FF: low_rank(2, 8, 8)}).digest}) == 3
