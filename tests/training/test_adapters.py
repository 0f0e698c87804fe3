"""Adapters: their update starts at zero, keeps the laws of training, and is that of the exported LoRA."""

import logging
import math
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
from artaug.training.injection import inject_adapter

FULL_RANK = 10_000
"""A rank no layer has: DoRA's update in full."""
ADAPTERS = [aa.PlainLoRA(), aa.LoKr(factor=4), aa.FullRank(), aa.DoRA(export_rank=FULL_RANK)]
each_adapter = pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: type(adapter).__name__)


def student_of(model, adapter, *, rank=2):
    return inject_adapter(
        model, rank=rank, targets="blocks", generator=torch.Generator().manual_seed(0), adapter=adapter
    )


def perturb(student):
    """Change all parameters at random."""
    generator = torch.Generator().manual_seed(1)
    for parameter in student.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def inputs_of(model):
    model.module.eval()
    return torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.8]), model.encode_prompts(["a", "b"])


@each_adapter
def test_the_exported_lora_does_what_the_model_in_training_did(tiny_model, adapter):
    inputs = inputs_of(tiny_model)
    with student_of(tiny_model, adapter) as student:
        perturb(student)
        learned, teacher, lora = student.predict(*inputs), student.teacher_predict(*inputs), student.to_lora()
    with lora.applied_to(tiny_model.module):
        torch.testing.assert_close(tiny_model.predict(*inputs), learned, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tiny_model.predict(*inputs), teacher, rtol=0, atol=0)
    assert (learned - teacher).abs().max() > 0.01


@each_adapter
def test_an_applied_lora_is_no_part_of_the_exported_one(make_model, adapter):
    model = make_model()
    inputs = inputs_of(model)
    applied = aa.LoRA({"blocks.1.attn": LowRank(0.1 * torch.randn(3, 64), torch.randn(64, 3))})
    with applied.applied_to(model.module):
        with student_of(model, adapter) as student:
            perturb(student)
            learned, lora = student.predict(*inputs), student.to_lora()
        with lora.applied_to(model.module):
            torch.testing.assert_close(model.predict(*inputs), learned, rtol=1e-4, atol=1e-4)


@each_adapter
def test_the_difference_of_nothing_is_nothing(tiny_model, pair_of, adapter):
    trainer = aa.DifferentialLoRATrainer(rank=2, steps=3, batch_size=1, learning_rate=1e-2, adapter=adapter)
    training = trainer.train([pair_of(1, changed=False)], tiny_model, seed=0, progress=False)
    assert training.losses == pytest.approx([math.log(2)] * 3), "no preference, in no step"
    assert all(layer.energy() < 1e-12 for layer in training.lora.layers.values())


@each_adapter
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
    uninterrupted = trainer.train(two_pairs, make_model(), seed=0, progress=False)

    def stop(event):
        if event.step == 5:
            raise KeyboardInterrupt

    checkpoints = aa.Checkpoints(folder=tmp_path, every=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(two_pairs, make_model(), seed=0, checkpoints=checkpoints, on_step=stop, progress=False)
    resumed = trainer.train(two_pairs, make_model(), seed=0, checkpoints=checkpoints, progress=False)
    assert resumed.losses == uninterrupted.losses
    for name, layer in uninterrupted.lora.layers.items():
        assert torch.equal(resumed.lora.layers[name].down, layer.down)
        assert torch.equal(resumed.lora.layers[name].up, layer.up)


@each_adapter
def test_it_learns_and_its_file_has_the_same_update(tmp_path, make_model, two_pairs, adapter):
    trainer = aa.DifferentialLoRATrainer(rank=4, steps=60, batch_size=2, learning_rate=1e-2, adapter=adapter)
    training = trainer.train(two_pairs, make_model(), seed=0, progress=False)
    assert sum(training.losses[-10:]) < 0.8 * sum(training.losses[:10])
    loaded = LoRA.load(training.lora.save(tmp_path / "lora.safetensors"))
    for name, layer in training.lora.layers.items():
        torch.testing.assert_close(loaded.layers[name].delta(), layer.delta())


@given(
    columns=st.integers(1, 4),
    rows=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3)),
    seed=st.integers(0, 99),
)
def test_structured_factors_multiply_as_the_dense_matrices_do(columns, rows, sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    in_features, out_features, rank = sizes
    down, outer, inner = (
        torch.randn(shape, generator=generator)
        for shape in ((rank, in_features), (rows, columns), (out_features, rank))
    )
    first, second = BlockDiagonalFactor(down, blocks=columns), KroneckerFactor(outer, inner)
    hidden = torch.randn(3, 2, columns * in_features, generator=generator)
    dense = torch.kron(outer, inner @ down)
    torch.testing.assert_close(second(first(hidden)), hidden @ dense.T, rtol=1e-4, atol=1e-5)


def test_lokr_is_exported_as_exactly_the_lora_it_is(tiny_model):
    with student_of(tiny_model, aa.LoKr(factor=4), rank=2) as student:
        perturb(student)
        tensors, lora = student.tensors(), student.to_lora()
        trained = sum(parameter.numel() for parameter in student.parameters())
    for name, layer in lora.layers.items():
        factors = tensors[name]
        expected = torch.kron(factors["up.outer"], factors["up.inner"] @ factors["down.weight"])
        torch.testing.assert_close(layer.delta(), expected)
        assert layer.rank == 4 * 2
    assert trained < sum(layer.down.numel() + layer.up.numel() for layer in lora.layers.values()) / 8


def test_lokr_takes_the_largest_size_that_divides_a_layer():
    down, up = aa.LoKr(factor=4).build_factors(9, 10, 2, torch.Generator())
    assert isinstance(down, BlockDiagonalFactor)
    assert (down.weight.shape, up.outer.shape, up.inner.shape) == ((2, 3), (2, 3), (5, 2))
    assert aa.LoKr(factor=4).lora_rank(9, 10, 2) == 6


def test_dora_follows_its_paper(tiny_model):
    with student_of(tiny_model, aa.DoRA(export_rank=FULL_RANK)) as student:
        perturb(student)
        lora, tensors = student.to_lora(), student.tensors()
    for name, layer in lora.layers.items():
        weight = tiny_model.module.get_submodule(name).weight
        moved_weight = weight + tensors[name]["up.weight"] @ tensors[name]["down.weight"]
        expected = tensors[name]["magnitude"][:, None] * moved_weight / moved_weight.norm(dim=1, keepdim=True)
        torch.testing.assert_close(weight + layer.delta(), expected, rtol=1e-3, atol=1e-4)


def test_a_warning_states_how_much_of_dora_a_lora_of_lower_rank_loses(tiny_model, caplog):
    with student_of(tiny_model, aa.DoRA(export_rank=3)) as student:
        perturb(student)
        with caplog.at_level(logging.WARNING):
            lora = student.to_lora()
        full = aa.DoRA(export_rank=FULL_RANK).to_lora(student.tensors(), student.layer_weights)
    assert lora.rank == 3
    kept = sum(layer.energy() for layer in lora.layers.values()) / sum(layer.energy() for layer in full.layers.values())
    assert f"a LoRA of rank 3 keeps {100 * kept:.1f}% of the squared norm of DoRA's update" in caplog.text


def test_dora_has_no_update_at_minus_one(tiny_model, two_pairs):
    trainer = aa.DifferentialLoRATrainer(steps=1, adapter=aa.DoRA(), objective=aa.Bipolar())
    with pytest.raises(ModelError, match=r"asks for -1 times the update, and DoRA rotates weights"):
        trainer.train(two_pairs, tiny_model, seed=0, progress=False)


def test_lokr_learns_sliders(tiny_model, two_pairs):
    trainer = aa.DifferentialLoRATrainer(rank=2, steps=2, adapter=aa.LoKr(), objective=aa.Bipolar())
    assert len(trainer.train(two_pairs, tiny_model, seed=0, progress=False).losses) == 2


def test_a_factor_or_rank_out_of_range_is_refused():
    with pytest.raises(InvalidValueError, match=r"factor=1\): need a factor of at least 2; at 1 it is a PlainLoRA"):
        aa.LoKr(factor=1)
    with pytest.raises(InvalidValueError, match=r"export_rank=0\): need an export_rank of at least 1"):
        aa.DoRA(export_rank=0)


def test_a_factor_computes_in_the_precision_of_its_input():
    factor = Factor(torch.randn(2, 4))
    assert factor(torch.randn(3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert factor.weight.dtype == torch.float32


@pytest.mark.parametrize(("in_features", "out_features"), [(12, 8), (8, 12)])
def test_lokr_of_more_ranks_than_a_layer_has_is_exported_with_as_many_as_it_has(in_features, out_features):
    adapter = aa.LoKr(factor=4)
    first, last = adapter.build_factors(in_features, out_features, 5, torch.Generator().manual_seed(0))
    for factor in last.parameters():
        factor.data = torch.randn(factor.shape, generator=torch.Generator().manual_seed(1))
    tensors = {f"down.{name}": parameter for name, parameter in first.named_parameters()}
    tensors |= {f"up.{name}": parameter for name, parameter in last.named_parameters()}
    layer = adapter.to_lora({"layer": {name: tensor.detach() for name, tensor in tensors.items()}}, str).layers["layer"]
    assert layer.rank == adapter.lora_rank(in_features, out_features, 5) == 8
    identity = torch.eye(in_features)
    torch.testing.assert_close(layer.delta(), last(first(identity)).T.detach())


WRONG_TYPES = """
import torch
import artaug as aa
from artaug import playground
from artaug.diffusion import estimate

synthesizer = playground.synthesizer()
for construct, message in [
    (lambda: aa.DifferentialLoRATrainer(adapter=aa.LoKr), "expected an instance of artaug.Adapter, received the class LoKr. Make one"),
    (lambda: aa.DifferentialLoRATrainer(optimizer="adamw"), "optimizer='adamw'): expected an instance of artaug.Optimizer, received a str. Such as"),
    (lambda: aa.DifferentialLoRATrainer(schedule="cosine"), "Schedule.COSINE"),
    (lambda: aa.DifferentialLoRATrainer(objective=aa.TwoStage), "expected an instance of artaug.Objective, received the class TwoStage"),
    (lambda: aa.DifferentialLoRATrainer(rank=2.0), "expected a whole number, received a float. Write 2."),
    (lambda: aa.DifferentialLoRATrainer(echo=1.5), "expected a whole number or None"),
    (lambda: aa.Checkpoints(folder="x", every=2.5), "every=2.5): expected a whole number"),
    (lambda: estimate(synthesizer), "estimate(source=DiffusersSynthesizer(FluxPipeline"),
    (lambda: estimate(synthesizer.pipeline, dtype="bfloat16"), "expected an instance of torch.dtype or None, received a str. Such as torch.bfloat16"),
]:
    try:
        construct()
    except aa.InvalidValueError as error:
        assert message in str(error), error
    else:
        raise SystemExit(f"nothing was refused with {message}")
"""


def test_a_value_of_the_wrong_type_is_refused_at_construction():
    # In a process of its own: here the type checker that runs with the tests would raise first.
    finished = subprocess.run([sys.executable, "-c", WRONG_TYPES], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_a_warning_names_the_number_of_pairs_that_are_not_used(make_model, pair_of, caplog):
    pairs = [pair_of(seed) for seed in range(8)]
    trainer = aa.DifferentialLoRATrainer(rank=2, steps=4, batch_size=2)
    with caplog.at_level(logging.WARNING, "artaug"):
        trainer.train(pairs, make_model(), seed=0, progress=False)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "artaug"):
        replace(trainer, echo=2).train(pairs, make_model(), seed=0, progress=False)
    (message,) = caplog.messages
    assert "use 4 of 8 pairs" in message


def test_an_adapter_whose_first_factor_has_no_weight_is_named(tiny_model, two_pairs):
    class Deep(aa.PlainLoRA):
        def build_factors(self, in_features, out_features, rank, generator):
            first, last = super().build_factors(in_features, out_features, rank, generator)
            return torch.nn.Sequential(first), last

    with pytest.raises(
        aa.ContractError, match=r"Deep\.build_factors returned Sequential and Factor, and PEFT asks for their weight"
    ):
        aa.DifferentialLoRATrainer(adapter=Deep(), steps=2).train(two_pairs, tiny_model, seed=0, progress=False)


def test_exporting_dora_seeds_only_the_generator_it_uses(tiny_model, two_pairs, monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda _: pytest.fail("it seeds every device"))
    before = torch.random.get_rng_state()
    aa.DifferentialLoRATrainer(adapter=aa.DoRA(), steps=2).train(two_pairs, tiny_model, seed=0, progress=False)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_step_of_full_rank_is_one_of_fine_tuning(make_model, two_pairs):
    model, reference = make_model(), make_model()
    trainer = aa.DifferentialLoRATrainer(
        adapter=aa.FullRank(),
        objective=aa.SupervisedFineTuning(),
        optimizer=aa.AdamW(weight_decay=0.0),
        targets=r"blocks\.\d\.attn",
        steps=3,
        batch_size=2,
        learning_rate=1e-3,
        warmup=0.0,
        sigma_range=(0.3, 0.7),
    )
    batches = []

    class Watched(aa.Objective):
        def loss(self, model, batch):
            batches.append(batch)
            return aa.SupervisedFineTuning().loss(model, batch)

    lora = replace(trainer, objective=Watched()).train(two_pairs, model, seed=0, progress=False).lora
    module = reference.module.eval()
    layers = {name: module.get_submodule(name) for name in lora.layers}
    optimizer = torch.optim.AdamW([layer.weight for layer in layers.values()], lr=1e-3, weight_decay=0.0)
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    for batch in batches:
        sigmas = batch.sigmas[:, None, None, None]
        noisy = (1 - sigmas) * batch.after + sigmas * batch.noise
        error = reference.predict(noisy, batch.sigmas, batch.conditioning) - (batch.noise - batch.after)
        optimizer.zero_grad()
        error.square().mean().backward()
        torch.nn.utils.clip_grad_norm_([layer.weight for layer in layers.values()], 1.0)
        optimizer.step()
    for name, layer in layers.items():
        torch.testing.assert_close(lora.layers[name].delta(), layer.weight - before[name], rtol=1e-3, atol=1e-6)
