"""Verification by the second reader: it finds what was written, and every difference is an error."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from artaug.errors import LoRAError
from artaug.lora.formats import FLUX1, Format
from artaug.lora.formats.low_rank import LowRank, relative_error
from artaug.lora.formats.verification import Verification, layer_errors, read_by_definition
from artaug.lora.lora import LoRA

TO_Q, TO_K = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"
PROJ_OUT = "norm_out.linear"


def low_rank(rank, outputs=6, inputs=5, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator))


LAYERS = {TO_Q: low_rank(2), TO_K: low_rank(3, seed=1)}


@given(rank=st.integers(1, 4), other_rank=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_relative_error_is_that_of_the_updates_themselves(rank, other_rank, seed):
    expected, found = low_rank(rank, seed=seed), low_rank(other_rank, seed=seed + 1)
    dense = (found.delta() - expected.delta()).norm() / expected.delta().norm()
    assert relative_error(found, expected) == pytest.approx(dense.item(), rel=1e-5)


@given(rank=st.integers(1, 4), share=st.floats(1e-5, 1))
def test_small_errors_are_found(rank, share):
    expected = low_rank(rank)
    found = LowRank(expected.down.double(), expected.up.double() * (1 + share))
    assert relative_error(found, expected) == pytest.approx(share, 1e-3)


def test_the_error_of_an_update_that_should_be_zero_is_infinite():
    none = LowRank(torch.zeros(1, 5), torch.zeros(6, 1))
    assert relative_error(none, none) == 0
    assert relative_error(low_rank(1), none) == float("inf")
    assert relative_error(low_rank(1, outputs=7), low_rank(1)) == float("inf")


def compared(found, expected=LAYERS, tolerance=1e-3):
    return layer_errors(found, expected, path=Path("a.safetensors"), reader="a reader", tolerance=tolerance)


def test_a_layer_that_is_missing_is_named():
    with pytest.raises(LoRAError, match=r"a\.safetensors: a reader finds 1 of 2 layers; missing is '.*to_k'"):
        compared({TO_Q: LAYERS[TO_Q]})


def test_a_layer_too_many_is_named_unless_its_update_is_zero():
    with pytest.raises(LoRAError, match="finds an update of 'more'"):
        compared({**LAYERS, "more": low_rank(1)})
    assert compared({**LAYERS, "more": LowRank(torch.ones(1, 5), torch.zeros(6, 1))}).keys() == LAYERS.keys()


def test_a_layer_of_another_strength_is_named_with_its_error():
    half = {**LAYERS, TO_K: LowRank(LAYERS[TO_K].down, LAYERS[TO_K].up / 2)}
    with pytest.raises(LoRAError, match=r"another update of '.*to_k'.*relative error 5\.0e-01, and 1e-03 is allowed"):
        compared(half)
    assert compared(half, tolerance=0.51)[TO_K] == pytest.approx(0.5)


def test_an_error_equal_to_the_tolerance_is_allowed():
    expected = {TO_Q: LowRank(torch.ones(1, 4), torch.ones(4, 1))}
    half = {TO_Q: LowRank(torch.ones(1, 4), torch.full((4, 1), 0.5))}
    assert compared(half, expected, tolerance=0.5) == {TO_Q: 0.5}
    with pytest.raises(LoRAError, match="another update"):
        compared(half, expected, tolerance=0.4999999)


@pytest.mark.parametrize("kind", FLUX1.key_formats)
def test_the_second_reader_finds_what_was_written(tmp_path, kind):
    path = LoRA(LAYERS).save(tmp_path / "a.safetensors", format=kind, key_map=FLUX1)
    assert max(compared(read_by_definition(path, LAYERS)).values()) < 1e-7


def test_the_second_reader_swaps_halves_back(tmp_path):
    layer, key = low_rank(2), "lora_unet_final_layer_adaLN_modulation_1"
    tensors = {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": layer.up.roll(3, 0)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert relative_error(read_by_definition(tmp_path / "a.safetensors", {PROJ_OUT: layer})[PROJ_OUT], layer) < 1e-7


@pytest.mark.parametrize(
    ("adapter", "strength"),
    [
        ({"lora_alpha": 6}, 3.0),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"to_q": 1}}, 0.5),
    ],
)
def test_the_second_reader_takes_strength_from_the_header(tmp_path, adapter, strength):
    layer = low_rank(2)
    tensors = {f"transformer.{TO_Q}.lora_A.weight": layer.down, f"transformer.{TO_Q}.lora_B.weight": layer.up}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in adapter.items()})}
    save_file(tensors, tmp_path / "a.safetensors", header)
    found = read_by_definition(tmp_path / "a.safetensors", {TO_Q: layer})[TO_Q]
    torch.testing.assert_close(found.delta(), layer.delta() * strength)


def with_more(path, more):
    save_file({**load_file(path), **more}, path)
    return path


def test_a_key_that_is_no_layer_of_the_lora_is_named(tmp_path):
    path = LoRA(LAYERS).save(tmp_path / "a.safetensors")
    with pytest.raises(LoRAError, match=r"'transformer\.transformer_blocks\.0\.attn\.to_k', which is no layer"):
        read_by_definition(path, {TO_Q: LAYERS[TO_Q]})
    with pytest.raises(LoRAError, match="'unknown', which is no part of a LoRA"):
        read_by_definition(with_more(path, {"unknown": torch.ones(1)}), LAYERS)


def test_a_layer_with_two_names_in_a_file_is_an_error(tmp_path):
    path = LoRA(LAYERS).save(tmp_path / "a.safetensors", format=Format.KOHYA, key_map=FLUX1)
    flat = f"lora_unet_{TO_Q}".replace(".", "_")
    repeated = {f"{flat}.lora_down.weight": LAYERS[TO_Q].down, f"{flat}.lora_up.weight": LAYERS[TO_Q].up}
    with pytest.raises(LoRAError, match="2 times"):
        read_by_definition(with_more(path, repeated), LAYERS)


def test_a_verification_shows_the_file_and_its_readers():
    verification = Verification(
        path=Path("a<b.safetensors"), format=Format.KOHYA, readers=("one", "two"), errors={TO_Q: 0.0, TO_K: 2e-7}
    )
    assert verification.worst == (TO_K, 2e-7)
    assert repr(verification) == (
        "Verification('a<b.safetensors': kohya file of 2 layers, largest relative error 2.0e-07 in "
        f"'{TO_K}', read by one, two)"
    )
    assert "a&lt;b.safetensors (kohya)" in verification._repr_html_()
