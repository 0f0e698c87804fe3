"""Baking: the sum in float32 and its rounding, the bytes that are copied, and what is left after an error or a kill."""

import json
import logging
import multiprocessing
import os
import resource
import signal
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from artaug._internal.files import atomic_output
from artaug.errors import LoRAMismatchError, ModelError, NonFiniteError, StorageError
from artaug.lora import baking
from artaug.lora.baking import bake, rounding, stream
from artaug.lora.baking.rounding import stochastic_round, stochastic_round_bf16
from artaug.lora.lora import LoRA, LowRank
from support.disks import small_disk
from support.tiny_flux import tiny_flux

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIXTEEN = [torch.bfloat16, torch.float16]
LAYERS = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_out")
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(shape, *, rank=2, seed=0, scale=0.1):
    return LowRank(normal(rank, shape[1], seed=seed), normal(shape[0], rank, seed=seed + 1, scale=scale))


def write_checkpoint(path, *, dtype=torch.bfloat16, shape=(40, 24)):
    """A file with the weight to update between tensors of other types and lengths."""
    tensors = {
        "a.weight": normal(3, 5).double(),
        "odd": torch.arange(7, dtype=torch.uint8),
        "proj.bias": normal(shape[0]).to(dtype),
        "proj.weight": normal(*shape, scale=0.02).to(dtype),
        "empty": torch.zeros(0, 4),
        "z.weight": normal(4, 4).to(torch.float8_e4m3fn),
    }
    save_file(tensors, path, metadata={"format": "pt", "note": "kept"})
    return tensors


def layer_lora(layer):
    return LoRA({"proj": layer})


def tiny_lora(transformer, *, names=LAYERS, **options):
    return LoRA({name: low_rank(transformer.get_submodule(name).weight.shape, **options) for name in names})


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "flux"
    pipeline = tiny_flux().to(torch.bfloat16)
    pipeline.save_pretrained(folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="40KB")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").touch()
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_diffusers_loads_a_baked_pipeline_and_only_the_named_layers_changed(pipeline_folder, tmp_path):
    base = FluxTransformer2DModel.from_pretrained(pipeline_folder / "transformer", dtype=torch.bfloat16)
    lora = tiny_lora(base)

    baked = bake(pipeline_folder, lora, tmp_path / "out", progress=False)

    shards = list((tmp_path / "out" / "transformer").glob("*.safetensors"))
    assert len(shards) > 2
    found = DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).transformer.state_dict()
    for key, before in base.state_dict().items():
        layer = lora.layers.get(key.removesuffix(".weight"))
        expected = before if layer is None else (before.float() + layer.delta()).bfloat16()
        torch.testing.assert_close(found[key], expected, rtol=0 if layer is None else 2**-7, atol=0)
    assert baked.files.keys() == contents(tmp_path / "out").keys()
    assert not (tmp_path / "out" / ".cache").exists()


def test_baked_weights_equal_those_that_diffusers_fuses(pipeline_folder, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder, dtype=torch.float32)
    lora = tiny_lora(pipeline.transformer)
    path = lora.save(tmp_path / "lora.safetensors")
    pipeline.transformer.save_pretrained(tmp_path / "float32")
    bake(tmp_path / "float32", lora, tmp_path / "out", progress=False)
    pipeline.load_lora_weights(path)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()

    found = FluxTransformer2DModel.from_pretrained(tmp_path / "out").state_dict()

    for key, expected in pipeline.transformer.state_dict().items():
        torch.testing.assert_close(found[key], expected, rtol=1e-6, atol=1e-6)


def eighths(*shape, steps, seed):
    """Multiples of 1/8: sums of a few of their products are exact in float32, in any order."""
    return torch.randint(-steps, steps + 1, shape, generator=torch.Generator().manual_seed(seed)) / 8


@given(
    dtype=st.sampled_from(DTYPES),
    outputs=st.integers(1, 300),
    inputs=st.integers(1, 1000),
    rank=st.integers(1, 3),
    scale=st.sampled_from([1, -0.5, 2**-8, 0.0]),
)
@settings(max_examples=25)
def test_a_weight_is_the_float32_sum_cast_once(tmp_path_factory, dtype, outputs, inputs, rank, scale):
    folder = tmp_path_factory.mktemp("sum")
    before = eighths(outputs, inputs, steps=255, seed=0).to(dtype)
    layer = LowRank(eighths(rank, inputs, steps=31, seed=1), eighths(outputs, rank, steps=31, seed=2))
    save_file({"proj.weight": before}, folder / "in.safetensors")

    baked = bake(folder / "in.safetensors", layer_lora(layer), folder / "out.safetensors", scale=scale, progress=False)

    after, expected = load_file(folder / "out.safetensors")["proj.weight"], before.float() + scale * layer.delta()
    assert torch.equal(after, expected.to(dtype))
    report = baked.layers["proj"]
    assert report.error_norm == pytest.approx((after.double() - expected.double()).norm().item(), rel=1e-4)
    assert report.update_norm == pytest.approx(abs(scale) * layer.delta().double().norm().item(), rel=1e-5)
    assert (report.unchanged, report.numel) == (int((after == before).sum()), before.numel())
    if dtype == torch.float32 or scale == 0:
        assert baked.relative_error == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_other_bytes_are_copied(dtype, tmp_path):
    write_checkpoint(tmp_path / "in.safetensors", dtype=dtype)
    layer = low_rank((40, 24), rank=16)

    bake(tmp_path / "in.safetensors", layer_lora(layer), tmp_path / "out.safetensors", progress=False)

    before, after = ((tmp_path / name).read_bytes() for name in ("in.safetensors", "out.safetensors"))
    header = 8 + int.from_bytes(before[:8], "little")
    start, end = (header + offset for offset in json.loads(before[8:header])["proj.weight"]["data_offsets"])
    assert (before[:start], before[end:]) == (after[:start], after[end:])
    assert before[start:end] != after[start:end]


def test_the_result_does_not_depend_on_the_chunks(tmp_path, monkeypatch):
    save_file({"proj.weight": eighths(700, 300, steps=255, seed=0).bfloat16()}, tmp_path / "in.safetensors")
    lora = layer_lora(LowRank(eighths(2, 300, steps=31, seed=1), eighths(700, 2, steps=31, seed=2)))
    unchunked = bake(tmp_path / "in.safetensors", lora, tmp_path / "one", stochastic_seed=3, progress=False)
    monkeypatch.setattr(stream, "_CHUNK_BYTES", 1000)

    in_chunks = bake(tmp_path / "in.safetensors", lora, tmp_path / "two", stochastic_seed=3, progress=False)

    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert unchunked.layers == in_chunks.layers


@pytest.mark.parametrize("block_elements", [1, 23, 24, 25, 24 * 40 - 1, 24 * 40, 24 * 40 + 1], ids=str)
@pytest.mark.parametrize("chunk_bytes", [1, 24 * 2, 24 * 2 + 1, 24 * 2 * 40 - 1, 24 * 2 * 40, 24 * 2 * 40 + 1], ids=str)
def test_every_boundary_of_blocks_and_chunks_gives_the_same_weights(tmp_path, monkeypatch, block_elements, chunk_bytes):
    tensors, layer = write_checkpoint(tmp_path / "in.safetensors"), low_rank((40, 24))
    monkeypatch.setattr(rounding, "_BLOCK_ELEMENTS", block_elements)
    monkeypatch.setattr(stream, "_CHUNK_BYTES", chunk_bytes)

    baked = bake(tmp_path / "in.safetensors", layer_lora(layer), tmp_path / "out.safetensors", progress=False)

    weight = load_file(tmp_path / "out.safetensors")["proj.weight"]
    expected = (tensors["proj.weight"].float() + layer.delta()).bfloat16()
    torch.testing.assert_close(weight, expected, rtol=2**-7, atol=0)
    assert baked.layers["proj"].unchanged == int((weight == tensors["proj.weight"]).sum())


@pytest.mark.parametrize(
    ("unit", "chunk_size"), [(1, 1000), (999, 999), (1000, 1000), (1001, 1001), (500, 1000), (400, 800), (3000, 3000)]
)
def test_a_chunk_is_the_largest_multiple_of_the_unit_below_the_limit_or_one_unit(monkeypatch, unit, chunk_size):
    monkeypatch.setattr(stream, "_CHUNK_BYTES", 1000)
    sizes = list(stream.ByteRange(10**4, unit=unit).chunk_sizes())
    assert set(sizes[:-1]) == {chunk_size}
    assert sum(sizes) == 10**4


@pytest.mark.parametrize(
    ("draw", "rounded"), [(0, 1.0), (2**14 - 1, 1.0), (2**15 - 1, 1.0), (2**15, 1 + 2**-7), (2**16 - 1, 1 + 2**-7)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_half_way_between_two_numbers_exactly_half_of_the_draws_round_up(draw, rounded, sign):
    exact, found = torch.full((1,), sign * (1 + 2**-8)), torch.empty(1, dtype=torch.bfloat16)
    stochastic_round_bf16(exact, found, np.array([draw], dtype=np.uint16))
    assert found.item() == sign * rounded
    assert stochastic_round(exact, torch.bfloat16, torch.tensor([0.5])).item() == sign


def test_the_result_does_not_depend_on_the_shards(pipeline_folder, tmp_path):
    whole = FluxTransformer2DModel.from_pretrained(pipeline_folder / "transformer", dtype=torch.bfloat16)
    whole.save_pretrained(tmp_path / "whole")
    lora = tiny_lora(whole)
    for name, source in {"one": tmp_path / "whole", "many": pipeline_folder / "transformer"}.items():
        bake(source, lora, tmp_path / name, stochastic_seed=1, progress=False)

    one, many = (FluxTransformer2DModel.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))

    assert all(torch.equal(one[key], many[key]) for key in one)


def test_the_checksums_are_those_of_the_files(pipeline_folder, tmp_path):
    transformer = FluxTransformer2DModel.from_pretrained(pipeline_folder / "transformer")
    baked = bake(pipeline_folder, tiny_lora(transformer), tmp_path / "out", progress=False)

    for name, written in contents(tmp_path / "out").items():
        assert (baked.files[name].size, baked.files[name].sha256) == (len(written), sha256(written).hexdigest())


@pytest.mark.parametrize(("part", "lost"), [(0.1, 0.017), (0.01, 0.17), (0.001, 0.79)])
def test_the_relative_error_in_bfloat16_is_the_documented_one(part, lost, tmp_path, caplog):
    weight, layer = normal(768, 768, scale=0.02), low_rank((768, 768), rank=16, scale=1.0)
    layer = LowRank(layer.down, layer.up * (part * weight.norm() / layer.delta().norm()))
    save_file({"proj.weight": weight.bfloat16()}, tmp_path / "in.safetensors")

    with caplog.at_level(logging.WARNING):
        baked = bake(tmp_path / "in.safetensors", layer_lora(layer), tmp_path / "out.safetensors", progress=False)

    assert baked.relative_error == pytest.approx(lost, rel=0.1)
    assert ("of the update to rounding" in caplog.text) == (lost > 0.5)


@cache
def representable(dtype):
    """All finite numbers of a type, ascending, in float64."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    return numbers[numbers.isfinite()].unique().numpy()


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@given(number=st.floats(-6e4, 6e4, width=32) | st.floats(-(2**-20), 2**-20, width=32))
def test_stochastic_rounding_gives_a_neighbor_and_the_right_mean(dtype, number):
    numbers, draws = representable(dtype), 512
    low = numbers[max(np.searchsorted(numbers, number, side="right") - 1, 0)]
    high = numbers[np.searchsorted(numbers, number, side="left")]

    expected, step = torch.full((draws,), number), (1 << 16) // draws

    results = [stochastic_round(expected, dtype, (torch.arange(draws) + 0.5) / draws)]
    if dtype == torch.bfloat16:
        results.append(torch.empty(draws, dtype=dtype))
        stochastic_round_bf16(expected, results[-1], (np.arange(draws) * step + step // 2).astype(np.uint16))

    for rounded in results:
        assert rounded.dtype == dtype
        assert set(rounded.tolist()) <= {low, high}
        assert abs(rounded.double().mean().item() - number) <= (high - low) / draws


def test_stochastic_rounding_keeps_the_mean_that_rounding_to_the_nearest_loses(tmp_path):
    save_file({"proj.weight": torch.ones(512, 512, dtype=torch.bfloat16)}, tmp_path / "in.safetensors")
    tiny = layer_lora(LowRank(torch.ones(1, 512), torch.full((512, 1), 2**-12)))

    nearest = bake(tmp_path / "in.safetensors", tiny, tmp_path / "nearest", progress=False)
    chance = bake(tmp_path / "in.safetensors", tiny, tmp_path / "chance", stochastic_seed=0, progress=False)
    again = bake(tmp_path / "in.safetensors", tiny, tmp_path / "again", stochastic_seed=0, progress=False)
    other = bake(tmp_path / "in.safetensors", tiny, tmp_path / "other", stochastic_seed=1, progress=False)

    assert (nearest.unchanged, nearest.relative_error) == (1, 1)
    mean = load_file(tmp_path / "chance")["proj.weight"].double().mean() - 1
    assert mean.item() == pytest.approx(2**-12, rel=0.05)
    assert chance.files["chance"].sha256 == again.files["again"].sha256 != other.files["other"].sha256


def test_a_layer_the_checkpoint_lacks_is_an_error_before_anything_is_written(tmp_path):
    write_checkpoint(tmp_path / "in.safetensors")
    lora = LoRA({"proj": low_rank((40, 24)), "gone": low_rank((2, 2))})

    with pytest.raises(LoRAMismatchError, match=r"has only 1 of them; first missing is 'gone\.weight', names there"):
        bake(tmp_path / "in.safetensors", lora, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_layer_of_another_shape_is_an_error(tmp_path):
    write_checkpoint(tmp_path / "in.safetensors")
    with pytest.raises(LoRAMismatchError, match=r"with shape \(24, 40\), and in the checkpoint it has \(40, 24\)"):
        bake(tmp_path / "in.safetensors", layer_lora(low_rank((24, 40))), tmp_path / "out", progress=False)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.float64], ids=str)
def test_quantized_weights_are_refused(dtype, tmp_path):
    save_file({"proj.weight": torch.zeros(4, 4).to(dtype)}, tmp_path / "in.safetensors")
    with pytest.raises(ModelError, match=r"'proj\.weight' is stored as .*Bake first, then quantize"):
        bake(tmp_path / "in.safetensors", layer_lora(low_rank((4, 4))), tmp_path / "out", progress=False)


def test_a_sum_out_of_range_is_an_error_that_leaves_nothing(tmp_path):
    save_file({"proj.weight": torch.full((4, 4), 6e4, dtype=torch.float16)}, tmp_path / "in.safetensors")
    big = LowRank(torch.ones(1, 4), torch.full((4, 1), 1e4))
    with pytest.raises(NonFiniteError, match=r"'proj\.weight' holds NaN or infinity.*F16 reaches 6\.55e\+04"):
        bake(tmp_path / "in.safetensors", layer_lora(big), tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry | {"data_offsets": [0, 28]},
        lambda entry: entry | {"data_offsets": [4, 32]},
        lambda entry: entry | {"data_offsets": [0, 36]},
        lambda entry: entry | {"data_offsets": [32, 0]},
        lambda entry: entry | {"shape": [-4, -4]},
        lambda entry: entry | {"shape": ["4", 4]},
        lambda entry: entry | {"shape": [4, 5]},
        lambda entry: entry | {"dtype": "F32"},
    ],
    ids=["too short", "a gap", "too long", "backwards", "negative", "a string", "other shape", "other type"],
)
def test_a_header_that_does_not_describe_the_file_is_an_error(tmp_path, change):
    entry = {"dtype": "BF16", "shape": [4, 4], "data_offsets": [0, 32]}
    path, lora = tmp_path / "in.safetensors", layer_lora(low_rank((4, 4)))
    for described in (entry, change(entry)):
        header = json.dumps({"proj.weight": described}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(32))
        if described is entry:
            bake(path, lora, tmp_path / "out", progress=False)
            continue
        with pytest.raises((ModelError, LoRAMismatchError), match=r"damaged|of another size"):
            bake(path, lora, tmp_path / "other", progress=False)


@pytest.mark.parametrize(
    ("offsets", "data_bytes"),
    [
        pytest.param({"proj.weight": [4, 36]}, 36, id="a gap at the start"),
        pytest.param({"proj.weight": [0, 32], "z.weight": [36, 68]}, 68, id="a gap between tensors"),
        pytest.param({"proj.weight": [0, 32], "z.weight": [28, 60]}, 60, id="an overlap"),
        pytest.param({"proj.weight": [0, 32]}, 36, id="bytes at the end"),
        pytest.param({"proj.weight": [0, 32], "z.weight": [32, 64]}, 60, id="cut short"),
    ],
)
def test_tensors_that_do_not_fill_the_file_are_an_error(tmp_path, offsets, data_bytes):
    entries = {name: {"dtype": "BF16", "shape": [4, 4], "data_offsets": span} for name, span in offsets.items()}
    header, path = json.dumps(entries).encode(), tmp_path / "in.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data_bytes))
    with pytest.raises(ModelError, match="cut short or damaged"):
        bake(path, layer_lora(low_rank((4, 4))), tmp_path / "out", progress=False)


@given(st.integers(0, 400))
@settings(max_examples=30)
def test_a_file_cut_short_is_an_error(tmp_path_factory, length):
    folder = tmp_path_factory.mktemp("cut")
    write_checkpoint(folder / "in.safetensors")
    (folder / "in.safetensors").write_bytes((folder / "in.safetensors").read_bytes()[:length])
    with pytest.raises(ModelError, match=r"cut short|no safetensors file"):
        bake(folder / "in.safetensors", layer_lora(low_rank((40, 24))), folder / "out", progress=False)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
@settings(max_examples=30)
def test_a_random_header_is_an_error(tmp_path_factory, nonsense):
    path = tmp_path_factory.mktemp("nonsense") / "in.safetensors"
    header = json.dumps({"proj.weight": nonsense}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match=r"cut short or damaged"):
        bake(path, layer_lora(low_rank((40, 24))), path.with_name("out"), progress=False)


def folder_of(tmp_path, names, *, index=None):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in names:
        save_file({f"{name}.weight": torch.zeros(4, 4)}, folder / name)
    if index is not None:
        (folder / INDEX).write_text(json.dumps(index))
    return folder


WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
SHARDS = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]


@pytest.mark.parametrize(
    ("names", "index", "message"),
    [
        pytest.param([], None, "does not hold the weights of one denoiser", id="nothing"),
        pytest.param(
            [WEIGHTS_FILE, "diffusion_pytorch_model.fp16.safetensors"], None, "not exactly one whole set", id="two"
        ),
        pytest.param([WEIGHTS_FILE, "diffusion_pytorch_model.bin"], None, "not exactly one whole set", id="pickled"),
        pytest.param(SHARDS, None, "not exactly one whole set", id="no index"),
        pytest.param(SHARDS[:1], {"weight_map": dict(enumerate(SHARDS))}, "which is not there", id="missing"),
        pytest.param(
            [*SHARDS, WEIGHTS_FILE], {"weight_map": dict(enumerate(SHARDS))}, "not exactly one", id="one more"
        ),
        pytest.param(SHARDS, {"weights": 1}, "is no index of shards", id="no map"),
        pytest.param(SHARDS, [], "is no index of shards", id="no object"),
    ],
)
def test_a_folder_without_exactly_one_set_of_weights_is_an_error(names, index, message, tmp_path):
    folder = folder_of(tmp_path, names, index=index)
    with pytest.raises(ModelError, match=message):
        bake(folder, layer_lora(low_rank((4, 4))), tmp_path / "out", progress=False)


def test_a_missing_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ModelError, match=r"does not exist\. Expected a safetensors file, or a folder"):
        bake(tmp_path / "gone", layer_lora(low_rank((4, 4))), tmp_path / "out", progress=False)


def test_a_tensor_that_two_shards_hold_is_an_error(tmp_path):
    folder = folder_of(tmp_path, SHARDS, index={"weight_map": dict(enumerate(SHARDS))})
    for name in SHARDS:
        save_file({"proj.weight": torch.zeros(4, 4)}, folder / name)
    with pytest.raises(ModelError, match=r"holds 'proj\.weight', which another shard holds too"):
        bake(folder, layer_lora(low_rank((4, 4))), tmp_path / "out", progress=False)


@pytest.mark.parametrize("part", ["", "transformer"])
def test_links_of_the_hubs_cache_are_followed(part, tmp_path):
    repo = tmp_path / "models--me--tiny"
    snapshot = repo / "snapshots" / "0123"
    (repo / "blobs").mkdir(parents=True)
    (snapshot / "transformer").mkdir(parents=True)
    write_checkpoint(repo / "blobs" / "abc")
    (snapshot / "transformer" / WEIGHTS_FILE).symlink_to("../../../blobs/abc")

    bake(snapshot / part, layer_lora(low_rank((40, 24))), tmp_path / "out", progress=False)

    baked = tmp_path / "out" / ("" if part else "transformer") / WEIGHTS_FILE
    assert not baked.is_symlink()
    assert load_file(baked).keys() == load_file(repo / "blobs" / "abc").keys()


def hostile_entries():
    """What a foreign folder may hold that must not be copied or waited for: by name, a function that puts it there."""
    return {
        "a link to a file outside": lambda folder, secret: (folder / "NOTICE").symlink_to(secret),
        "a link to a file outside, in a folder": lambda folder, secret: (folder / "sub" / "NOTICE").symlink_to(secret),
        "a link to a folder outside": lambda folder, secret: (folder / "extra").symlink_to(secret.parent),
        "a link to the folder itself": lambda folder, _: (folder / "loop").symlink_to("."),
        "a link to a folder inside": lambda folder, _: (folder / "other").symlink_to("sub"),
        "a link round": lambda folder, _: (folder / "round").symlink_to("round"),
        "a link to nothing": lambda folder, _: (folder / "gone").symlink_to("nowhere"),
        "a chain of links that leaves": lambda folder, secret: [
            (folder / "a").symlink_to("b"),
            (folder / "b").symlink_to(secret),
        ],
        "weights outside": lambda folder, secret: [
            (folder / WEIGHTS_FILE).rename(secret.parent / "weights"),
            (folder / WEIGHTS_FILE).symlink_to(secret.parent / "weights"),
        ],
        "a FIFO": lambda folder, _: os.mkfifo(folder / "pipe"),
        "a FIFO as index": lambda folder, _: os.mkfifo(folder / INDEX),
        "a link to a FIFO": lambda folder, secret: [
            os.mkfifo(secret.parent / "pipe"),
            (folder / "pipe").symlink_to(secret.parent / "pipe"),
        ],
        "a device": lambda folder, _: (folder / "random").symlink_to("/dev/zero"),
        "a link to blobs that are not the cache's": lambda folder, secret: [
            (secret.parent / "blobs").mkdir(),
            (secret.parent / "blobs" / "key").write_text("PRIVATE"),
            (folder / "key").symlink_to(secret.parent / "blobs" / "key"),
        ],
    }


@pytest.mark.parametrize("entry", hostile_entries())
def test_nothing_from_outside_of_a_folder_gets_into_the_copy(entry, tmp_path):
    folder, private = tmp_path / "foreign", tmp_path / "private"
    (folder / "sub").mkdir(parents=True)
    private.mkdir()
    (private / "key").write_text("PRIVATE")
    write_checkpoint(folder / WEIGHTS_FILE)
    hostile_entries()[entry](folder, private / "key")
    with pytest.raises(ModelError, match=r"is a link|neither a file"):
        bake(folder, layer_lora(low_rank((40, 24))), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_link_within_the_folder_is_copied_as_the_file_it_leads_to(tmp_path):
    (tmp_path / "in").mkdir()
    write_checkpoint(tmp_path / "in" / WEIGHTS_FILE)
    (tmp_path / "in" / "LICENSE").write_text("free")
    (tmp_path / "in" / "COPYING").symlink_to("LICENSE")
    bake(tmp_path / "in", layer_lora(low_rank((40, 24))), tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "COPYING").read_text() == "free"
    assert not (tmp_path / "out" / "COPYING").is_symlink()


def test_folders_nested_deeper_than_any_pipeline_has_are_an_error(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_checkpoint(folder / WEIGHTS_FILE)
    deep = folder
    for _ in range(101):
        deep = deep / "d"
        deep.mkdir()
    with pytest.raises(ModelError, match="nested deeper than 100"):
        bake(folder, layer_lora(low_rank((40, 24))), tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": ["b"]}}',
        '{"weight_map": {"a": "../secret"}}',
        '{"weight_map": {"a": "a\\u0000b"}}',
        "[" * 100_000,
        "1e400",
        "\xff",
    ],
)
def test_an_index_that_names_no_neighbours_is_an_error(text, tmp_path):
    (tmp_path / "secret").write_text("PRIVATE")
    folder = folder_of(tmp_path, SHARDS)
    (folder / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"is no index|which is not there"):
        bake(folder, layer_lora(low_rank((4, 4))), tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"[1, 2]",
        b"3",
        b'{"\xff": 1}',
        b'{"a": 1}',
        b'{"a": []}',
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [1e400, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [NaN, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "0"]}}',
        b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 0]}}',
        b'{"a": {"shape": [1], "data_offsets": [0, 0]}}',
        b'{"__metadata__": 3}',
        b'{"__metadata__": {"a": 3}}',
    ],
    ids=lambda header: header[:60].decode("latin-1"),
)
def test_a_header_of_any_shape_is_an_error_of_ours(header, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError):
        bake(path, layer_lora(low_rank((4, 4))), tmp_path / "out", progress=False)


@pytest.mark.parametrize("kind", ["file", "folder", "broken link"])
def test_an_existing_output_is_an_error_and_stays(kind, tmp_path):
    write_checkpoint(tmp_path / "in.safetensors")
    out = tmp_path / "out"
    match kind:
        case "file":
            out.write_text("mine")
        case "folder":
            out.mkdir()
        case _:
            out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="exists already, and is left as it is"):
        bake(tmp_path / "in.safetensors", layer_lora(low_rank((40, 24))), out, progress=False)
    assert os.path.lexists(out)


def test_a_checkpoint_is_not_written_into(pipeline_folder):
    transformer = FluxTransformer2DModel.from_pretrained(pipeline_folder / "transformer")
    before = contents(pipeline_folder)
    with pytest.raises(StorageError, match="lies in the checkpoint"):
        bake(pipeline_folder, tiny_lora(transformer), pipeline_folder / "baked" / "here", progress=False)
    assert contents(pipeline_folder) == before


def test_an_output_that_another_process_writes_is_an_error(tmp_path):
    write_checkpoint(tmp_path / "in.safetensors")
    with atomic_output(tmp_path / "out") as place:
        place.write_text("half")
        with pytest.raises(StorageError, match="another process is writing"):
            bake(tmp_path / "in.safetensors", layer_lora(low_rank((40, 24))), tmp_path / "out", progress=False)
    assert (tmp_path / "out").read_text() == "half"


def killed_at(write, source, out):
    """Bake in a process that kills itself in the middle of its n-th write."""
    writes, original = 0, vars(stream)["write_chunk"]

    def write_or_die(file, chunk, position):
        nonlocal writes
        writes += 1
        if writes == write:
            file.write(chunk[: len(chunk) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        original(file, chunk, position)

    vars(stream)["write_chunk"] = write_or_die
    bake(source, tiny_lora(FluxTransformer2DModel.from_pretrained(source)), out, progress=False)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # the child starts its own
def test_a_killed_run_leaves_no_output_and_the_next_run_gives_the_full_result(pipeline_folder, tmp_path):
    source, forked = pipeline_folder / "transformer", multiprocessing.get_context("fork")
    lora = tiny_lora(FluxTransformer2DModel.from_pretrained(source))
    whole = bake(source, lora, tmp_path / "whole", progress=False)
    for write in (1, 2, 5, 9):
        process = forked.Process(target=killed_at, args=(write, source, tmp_path / "out"))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        assert any((tmp_path / ".artaug-partial").iterdir())

    baked = bake(source, lora, tmp_path / "out", progress=False)

    assert not (tmp_path / ".artaug-partial").exists()
    assert (baked.files, baked.layers) == (whole.files, whole.layers)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@contextmanager
def longest_file(size):
    """Limit the size of files, which fails as a full file system does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_file_system_is_an_error_that_leaves_nothing(tmp_path):
    write_checkpoint(tmp_path / "in.safetensors", shape=(400, 240))
    with longest_file(50_000), pytest.raises(StorageError, match=r"could not be written, and nothing is left of it"):
        bake(tmp_path / "in.safetensors", layer_lora(low_rank((400, 240))), tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize("checked_before", [True, False], ids=["known before", "noticed on the way"])
def test_a_full_disk_is_an_error_that_leaves_nothing(checked_before, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "in.safetensors", shape=(400, 240))
    message = r"takes 0\.00 GiB, and 0\.00 GiB are free there" if checked_before else r"No space left.*make room"
    with small_disk(tmp_path / "disk", "64k") as disk:
        if not checked_before:
            monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=2**40, free=2**40))
        with pytest.raises(StorageError, match=message):
            bake(tmp_path / "in.safetensors", layer_lora(low_rank((400, 240))), disk / "out", progress=False)
        assert not list(disk.iterdir())


def test_a_source_that_shrinks_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "in.safetensors")
    original = stream.reserve_file

    def shrinking(target, size):
        os.truncate(tmp_path / "in.safetensors", 900)
        original(target, size)

    monkeypatch.setattr(baking, "reserve_file", shrinking)
    with pytest.raises(StorageError, match="became shorter while it was read"):
        bake(tmp_path / "in.safetensors", layer_lora(low_rank((40, 24))), tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_the_report_lists_the_worst_layers_first_and_escapes_names(tmp_path):
    save_file({"<i>.weight": torch.ones(4, 4, dtype=torch.bfloat16), "b.weight": torch.zeros(4, 4)}, tmp_path / "in")
    small = LowRank(torch.ones(1, 4), torch.full((4, 1), 2**-12))
    baked = bake(tmp_path / "in", LoRA({"b": small, "<i>": small}), tmp_path / "out", progress=False)

    assert "baked 2 layers into" in str(baked)
    assert "70.71% of the update lost to rounding (BF16, F32), 50.00% of the weights unchanged" in str(baked)
    assert "most lost in <i> (100.0%), b (0.0%)" in str(baked)
    assert sha256((tmp_path / "out").read_bytes()).hexdigest() in str(baked)
    assert "&lt;i&gt;" in baked._repr_html_()
    assert "<i>" not in baked._repr_html_()
