"""The benchmarks of training steps and of baking: a row for every case, and nothing left behind."""

import json
from dataclasses import replace

import pytest
import torch
from benchmarks import _record as record
from benchmarks import bake, training
from diffusers import FluxTransformer2DModel

from support.tiny_geometry import TINY


def test_the_baking_benchmark_has_a_row_for_every_case_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = bake.Geometry(channels=32, double_blocks=1, single_blocks=1)

    cold = bake.Case(geometry=tiny, dtype=torch.float32, cold=True, stochastic_seed=0, rounds=2)

    rows = list(bake.run_cases((bake.Case(geometry=tiny, rounds=2), cold)))

    assert [(row["dtype"], row["rounding"], row["cold"]) for row in rows] == [
        ("bfloat16", "nearest", False),
        ("float32", "stochastic", True),
    ]
    for row in rows:
        assert row["ratio_to_cp"] > row["ratio_to_cp_unsynced"] > 0
        assert row["lora_layers"] == 17
        assert row["peak_bytes"] > 0
        assert all(row[f"{part}_seconds"] > 0 for part in ("read", "update", "hash", "write", "sync", "cpu", "cp_cpu"))
        assert row["bytes"] > sum(outputs * inputs for outputs, inputs in tiny.shapes().values()) * 2
    assert not list((tmp_path / "runs").iterdir())
    assert len(bake.plot(rows).axes) == 1


def test_the_baking_benchmark_has_the_layers_of_flux():
    transformer = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    )

    found = {
        name: tuple(layer.weight.shape) for name, layer in transformer.named_modules() if hasattr(layer, "in_features")
    }

    shapes = bake.Geometry(channels=32, double_blocks=1, single_blocks=1).shapes()
    assert shapes == {name: shape for name, shape in found.items() if name in shapes}
    assert shapes.keys() == {name for name in found if "transformer_blocks." in name}


@pytest.mark.parametrize("storage", ["plain", "fp8", "nf4"])
def test_the_training_benchmark_has_a_row_for_every_method_and_leaves_the_model_as_it_was(storage):
    geometry = replace(TINY, storage=storage)
    module = geometry.model()
    layers, weights = (
        dict(module.named_modules()),
        {name: tensor.clone() for name, tensor in module.state_dict().items()},
    )
    case = training.Case(side=4, batch=2, recomputing=True)
    rows = training.measure_case(geometry, module, case, rounds=2)
    expected_methods = (*training.OBJECTIVES, training.SCRIPT) if storage == "plain" else training.QUANTIZED
    assert tuple(row["method"] for row in rows) == expected_methods
    assert rows[0]["ratio_to_sft"] == 1
    assert rows[-1].get("peak_to_script") == (1 if storage == "plain" else None)
    assert all(row["pairs_per_second"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert dict(module.named_modules()) == layers
    assert all(
        tensor.dtype == weights[name].dtype and torch.equal(weights[name].float(), tensor.float())
        for name, tensor in module.state_dict().items()
    )
    assert len(training.plot(rows).axes) == 2


def test_a_benchmark_that_is_cut_short_leaves_the_rows_it_had(tmp_path, monkeypatch):
    def measure(*, quick):
        yield {"row": 1, "quick": quick}
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["bench", "--quick", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        record.run("bench", measure, training.plot)
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == [{"row": 1, "quick": True}]
