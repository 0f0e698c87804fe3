"""What is trained beside a layer: it starts at nothing, keeps the laws of training, and is the LoRA that is exported."""

import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug.errors import InvalidValueError, ModelError
from artaug.lora.lora import LoRA, LowRank
from artaug.training.adapters import BlockDiagonalFactor, Factor, KroneckerFactor
from artaug.training.student import inject_adapter

WHOLE = 10_000
"""A rank no layer has: DoRA's update in full."""
ADAPTERS = [aa.PlainLoRA(), aa.LoKr(factor=4), aa.DoRA(export_rank=WHOLE)]
each = pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda one: type(one).__name__)


def student_of(model, adapter, *, rank=2):
    return inject_adapter(
        model, rank=rank, targets="blocks", generator=torch.Generator().manual_seed(0), adapter=adapter
    )


def moved(student):
    """Have it learn something, at random."""
    generator = torch.Generator().manual_seed(1)
    for parameter in student.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def asked_of(model):
    model.module.eval()
    return torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.8]), model.encode_prompts(["a", "b"])


@each
def test_the_exported_lora_does_what_the_model_in_training_did(tiny_model, adapter):
    asked = asked_of(tiny_model)
    with student_of(tiny_model, adapter) as student:
        moved(student)
        learned, taught, lora = student.predict(*asked), student.teacher_predict(*asked), student.to_lora()
    with lora.applied_to(tiny_model.module):
        torch.testing.assert_close(tiny_model.predict(*asked), learned, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tiny_model.predict(*asked), taught, rtol=0, atol=0)
    assert (learned - taught).abs().max() > 0.01


@each
def test_an_earlier_lora_that_is_worn_is_no_part_of_what_is_exported(make_model, adapter):
    model = make_model()
    asked = asked_of(model)
    worn = aa.LoRA({"blocks.1.attn": LowRank(0.1 * torch.randn(3, 64), torch.randn(64, 3))})
    with worn.applied_to(model.module):
        with student_of(model, adapter) as student:
            moved(student)
            learned, lora = student.predict(*asked), student.to_lora()
        with lora.applied_to(model.module):
            torch.testing.assert_close(model.predict(*asked), learned, rtol=1e-4, atol=1e-4)


@each
def test_the_difference_of_nothing_is_nothing(tiny_model, pair_of, adapter):
    trainer = aa.DifferentialLoRATrainer(rank=2, steps=3, batch_size=1, learning_rate=1e-2, adapter=adapter)
    training = trainer.train([pair_of(1, changed=False)], tiny_model, seed=0, progress=False)
    assert training.losses == (0.0, 0.0, 0.0)
    assert all(layer.energy() < 1e-12 for layer in training.lora.layers.values())


@each
@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_resumed_training_ends_with_the_same_bits(tmp_path, make_model, two_pairs, adapter, ema):
    trainer = aa.DifferentialLoRATrainer(
        rank=2,
        steps=6,
        batch_size=2,
        learning_rate=1e-2,
        adapter=adapter,
        ema=ema,
        objective=aa.TwoStage(per_pair=False),
    )
    whole = trainer.train(two_pairs, make_model(), seed=0, progress=False)

    def stop(event):
        if event.step == 5:
            raise KeyboardInterrupt

    checkpoints = aa.Checkpoints(folder=tmp_path, every=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(two_pairs, make_model(), seed=0, checkpoints=checkpoints, on_step=stop, progress=False)
    resumed = trainer.train(two_pairs, make_model(), seed=0, checkpoints=checkpoints, progress=False)
    assert resumed.losses == whole.losses
    for name, layer in whole.lora.layers.items():
        assert torch.equal(resumed.lora.layers[name].down, layer.down)
        assert torch.equal(resumed.lora.layers[name].up, layer.up)


@each
def test_it_learns_and_its_file_says_the_same(tmp_path, make_model, two_pairs, adapter):
    trainer = aa.DifferentialLoRATrainer(rank=4, steps=60, batch_size=2, learning_rate=1e-2, adapter=adapter)
    training = trainer.train(two_pairs, make_model(), seed=0, progress=False)
    assert sum(training.losses[-10:]) < 0.8 * sum(training.losses[:10])
    again = LoRA.load(training.lora.save(tmp_path / "lora.safetensors"))
    for name, layer in training.lora.layers.items():
        torch.testing.assert_close(again.layers[name].delta(), layer.delta())


@given(
    across=st.integers(1, 4),
    down=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3)),
    seed=st.integers(0, 99),
)
def test_structured_factors_multiply_as_the_matrices_they_stand_for(across, down, sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs, rank = sizes
    small, outer, inner = (
        torch.randn(shape, generator=generator) for shape in ((rank, inputs), (down, across), (outputs, rank))
    )
    first, second = BlockDiagonalFactor(small, blocks=across), KroneckerFactor(outer, inner)
    given = torch.randn(3, 2, across * inputs, generator=generator)
    dense = torch.kron(outer, inner @ small)
    torch.testing.assert_close(second(first(given)), given @ dense.T, rtol=1e-4, atol=1e-5)


def test_lokr_is_exported_as_exactly_the_lora_it_is(tiny_model):
    with student_of(tiny_model, aa.LoKr(factor=4), rank=2) as student:
        moved(student)
        parts, lora = student.tensors(), student.to_lora()
        numbers = sum(one.numel() for one in student.parameters())
    for name, layer in lora.layers.items():
        mine = parts[name]
        wanted = torch.kron(mine["up.outer"], mine["up.inner"] @ mine["down.weight"])
        torch.testing.assert_close(layer.delta(), wanted)
        assert layer.rank == 4 * 2
    assert numbers < sum(one.down.numel() + one.up.numel() for one in lora.layers.values()) / 8


def test_lokr_takes_the_largest_size_that_divides_a_layer():
    down, up = aa.LoKr(factor=4).build_factors(9, 10, 2, torch.Generator())
    assert isinstance(down, BlockDiagonalFactor)
    assert (down.weight.shape, up.outer.shape, up.inner.shape) == ((2, 3), (2, 3), (5, 2))
    assert aa.LoKr(factor=4).lora_rank(9, 10, 2) == 6


def test_dora_is_what_its_paper_says(tiny_model):
    with student_of(tiny_model, aa.DoRA(export_rank=WHOLE)) as student:
        moved(student)
        lora, parts = student.to_lora(), student.tensors()
    for name, layer in lora.layers.items():
        weight = tiny_model.module.get_submodule(name).weight
        moved_weight = weight + parts[name]["up.weight"] @ parts[name]["down.weight"]
        wanted = parts[name]["magnitude"][:, None] * moved_weight / moved_weight.norm(dim=1, keepdim=True)
        torch.testing.assert_close(weight + layer.delta(), wanted, rtol=1e-3, atol=1e-4)


def test_what_a_lora_of_some_rank_loses_of_dora_is_said(tiny_model, caplog):
    with student_of(tiny_model, aa.DoRA(export_rank=3)) as student:
        moved(student)
        with caplog.at_level(logging.WARNING):
            lora = student.to_lora()
        whole = aa.DoRA(export_rank=WHOLE).to_lora(student.tensors(), student.layer_weights)
    assert lora.rank == 3
    kept = sum(one.energy() for one in lora.layers.values()) / sum(one.energy() for one in whole.layers.values())
    assert f"a LoRA of rank 3 keeps {100 * kept:.1f}% of the squared norm of DoRA's update" in caplog.text


def test_dora_has_no_update_to_turn_around(tiny_model, two_pairs):
    trainer = aa.DifferentialLoRATrainer(steps=1, adapter=aa.DoRA(), objective=aa.Bipolar())
    with pytest.raises(ModelError, match=r"asks for -1 times the update, and DoRA rotates weights"):
        trainer.train(two_pairs, tiny_model, seed=0, progress=False)


def test_lokr_learns_sliders_as_well(tiny_model, two_pairs):
    trainer = aa.DifferentialLoRATrainer(rank=2, steps=2, adapter=aa.LoKr(), objective=aa.Bipolar())
    assert len(trainer.train(two_pairs, tiny_model, seed=0, progress=False).losses) == 2


def test_sizes_that_are_none_are_refused():
    with pytest.raises(InvalidValueError, match=r"factor=1\): need a factor of at least 2; at 1 it is a PlainLoRA"):
        aa.LoKr(factor=1)
    with pytest.raises(InvalidValueError, match=r"export_rank=0\): need an export_rank of at least 1"):
        aa.DoRA(export_rank=0)


def test_a_factor_computes_in_the_precision_of_its_input():
    factor = Factor(torch.randn(2, 4))
    assert factor(torch.randn(3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert factor.weight.dtype == torch.float32


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 8), (8, 12)])
def test_lokr_of_more_ranks_than_a_layer_has_is_exported_with_as_many_as_it_has(inputs, outputs):
    kind = aa.LoKr(factor=4)
    first, last = kind.build_factors(inputs, outputs, 5, torch.Generator().manual_seed(0))
    for factor in last.parameters():
        factor.data = torch.randn(factor.shape, generator=torch.Generator().manual_seed(1))
    parts = {f"down.{name}": one for name, one in first.named_parameters()}
    parts |= {f"up.{name}": one for name, one in last.named_parameters()}
    layer = kind.to_lora({"layer": {name: one.detach() for name, one in parts.items()}}, str).layers["layer"]
    assert layer.rank == kind.lora_rank(inputs, outputs, 5) == 8
    given = torch.eye(inputs)
    torch.testing.assert_close(layer.delta(), last(first(given)).T.detach())


KINDS = """
import torch
import artaug as aa
from artaug import playground
from artaug.diffusion import estimate

synthesizer = playground.synthesizer()
for wrong, told in [
    (lambda: aa.DifferentialLoRATrainer(adapter=aa.LoKr), "need a value of artaug.training.Adapter, made with its paren"),
    (lambda: aa.DifferentialLoRATrainer(optimizer="adamw"), "optimizer='adamw'): need a value of"),
    (lambda: aa.DifferentialLoRATrainer(schedule="cosine"), "aa.Schedule.COSINE"),
    (lambda: aa.DifferentialLoRATrainer(objective=aa.TwoStage), "need a value of artaug.training.Objective"),
    (lambda: aa.DifferentialLoRATrainer(rank=2.0), "whole and of at least 1"),
    (lambda: aa.DifferentialLoRATrainer(echo=1.5), "whole and of at least 1"),
    (lambda: aa.Checkpoints(folder="x", every=2.5), "need whole numbers of at least 1"),
    (lambda: estimate(synthesizer), "received a DiffusersSynthesizer to estimate"),
    (lambda: estimate(synthesizer.pipeline, dtype="bfloat16"), "need a floating type"),
]:
    try:
        wrong()
    except aa.InvalidValueError as fault:
        assert told in str(fault), fault
    else:
        raise SystemExit(f"nothing was said of {told}")
"""


def test_what_is_no_value_of_its_kind_is_refused_at_the_door():
    # In a process of its own: here the checker of annotations that runs with the tests would be first to say so.
    done = subprocess.run([sys.executable, "-c", KINDS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pairs_that_no_batch_has_are_said(make_model, pair_of, caplog):
    pairs = [pair_of(seed) for seed in range(8)]
    trainer = aa.DifferentialLoRATrainer(rank=2, steps=4, batch_size=2)
    with caplog.at_level(logging.WARNING, "artaug"):
        trainer.train(pairs, make_model(), seed=0, progress=False)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "artaug"):
        replace(trainer, echo=2).train(pairs, make_model(), seed=0, progress=False)
    (said,) = caplog.messages
    assert "use 4 of 8 pairs" in said


def test_an_adapter_whose_first_map_has_no_weight_is_told_what_is_missing(tiny_model, two_pairs):
    class Deep(aa.PlainLoRA):
        def build_factors(self, in_features, out_features, rank, generator):
            first, last = super().build_factors(in_features, out_features, rank, generator)
            return torch.nn.Sequential(first), last

    with pytest.raises(
        aa.ContractError, match=r"Deep\.build_factors returned Sequential and Factor, and PEFT asks for their weight"
    ):
        aa.DifferentialLoRATrainer(adapter=Deep(), steps=2).train(two_pairs, tiny_model, seed=0, progress=False)


def test_exporting_dora_reaches_no_generator_but_its_own(tiny_model, two_pairs, monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda _: pytest.fail("it seeds every device"))
    before = torch.random.get_rng_state()
    aa.DifferentialLoRATrainer(adapter=aa.DoRA(), steps=2).train(two_pairs, tiny_model, seed=0, progress=False)
    assert torch.equal(before, torch.random.get_rng_state())
