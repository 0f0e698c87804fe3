"""Fusers: exact addition by concatenation, and the Eckart-Young bound by SVD."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from artaug._internal.values import from_json, to_json
from artaug.errors import ContractError, InvalidValueError, LoRAError
from artaug.lora.fusing import CompressedLayer, ConcatFuser, Fuser, SvdFuser, fuse_loras, retained_energy
from artaug.lora.lora import LoRA, LowRank

SHAPES = {"attn.to_q": (5, 7), "ff.net.0": (12, 3), "proj_out": (4, 4)}


@st.composite
def loras(draw, *, names=tuple(SHAPES)):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    layers = {}
    for name in chosen:
        rank = draw(st.integers(1, 6))
        outputs, inputs = SHAPES[name]
        layers[name] = LowRank(
            torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
        )
    return LoRA(layers)


def dense_sum(lora_list):
    """The oracle: dense updates, added."""
    total = {}
    for lora in lora_list:
        for name, layer in lora.layers.items():
            total[name] = total.get(name, 0) + layer.up.double() @ layer.down.double()
    return total


def lora_of(rank=2, *, name="proj_out", scale=1.0):
    outputs, inputs = SHAPES[name]
    generator = torch.Generator().manual_seed(rank)
    down, up = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
    return LoRA({name: LowRank(down, up * scale)})


@given(st.lists(loras(), min_size=1, max_size=4))
def test_concatenation_is_the_exact_sum_over_all_layers(lora_list):
    fused, expected = ConcatFuser().fuse(lora_list), dense_sum(lora_list)
    assert fused.layers.keys() == expected.keys()
    for name, layer in fused.layers.items():
        torch.testing.assert_close(layer.delta().double(), expected[name], rtol=1e-5, atol=1e-5)
        assert layer.rank == sum(lora.layers[name].rank for lora in lora_list if name in lora.layers)


@given(st.lists(loras(), min_size=1, max_size=3), st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_a_weighted_sum_is_fused_from_scaled_loras(lora_list, weights):
    fused = ConcatFuser().fuse([lora.scaled(weight) for lora, weight in zip(lora_list, weights, strict=False)])
    for name, layer in fused.layers.items():
        expected = sum(
            weight * lora.layers[name].delta().double()
            for lora, weight in zip(lora_list, weights, strict=False)
            if name in lora.layers
        )
        torch.testing.assert_close(layer.delta().double(), expected, rtol=1e-4, atol=1e-4)


@given(st.lists(loras(), min_size=1, max_size=4), st.integers(1, 8))
def test_svd_reaches_the_eckart_young_bound(lora_list, rank):
    fused, expected = SvdFuser(rank=rank).fuse(lora_list), dense_sum(lora_list)
    for name, layer in fused.layers.items():
        singular_values = torch.linalg.svdvals(expected[name])
        bound = singular_values[rank:].square().sum().sqrt()
        error = torch.linalg.matrix_norm(layer.delta().double() - expected[name])
        assert layer.rank <= rank
        assert error <= bound + 1e-5 * singular_values[0] + 1e-6


@given(loras())
def test_a_sufficient_rank_loses_nothing(lora):
    fused = SvdFuser(rank=12).fuse([lora])
    assert all(kept == pytest.approx(1, abs=1e-6) for kept in retained_energy(lora, fused).values())


@given(loras())
def test_svd_gives_both_factors_the_same_norm(lora):
    for layer in SvdFuser(rank=3).fuse([lora]).layers.values():
        assert layer.down.dtype == layer.up.dtype == torch.float32
        torch.testing.assert_close(layer.down @ layer.down.T, layer.up.T @ layer.up, rtol=1e-4, atol=1e-3)


@given(loras(), st.floats(0.05, 1.0))
def test_energy_keeps_the_fewest_singular_values_that_hold_it(lora, energy):
    fused = SvdFuser(rank=12, energy=energy).fuse([lora])
    for name, layer in fused.layers.items():
        energies = torch.linalg.svdvals(lora.layers[name].delta().double()).square()
        assert energies[: layer.rank].sum() / energies.sum() >= energy - 1e-5
        if energy < 1 and layer.rank > 1:
            assert energies[: layer.rank - 1].sum() / energies.sum() < energy + 1e-5


@given(st.lists(loras(), min_size=1, max_size=3), st.integers(1, 4))
def test_retained_energy_is_that_of_the_dense_matrices(lora_list, rank):
    full = ConcatFuser().fuse(lora_list)
    fused = SvdFuser(rank=rank).fuse(lora_list)
    for name, kept in retained_energy(full, fused).items():
        total = full.layers[name].delta().double()
        lost = total - fused.layers[name].delta().double()
        assert kept == pytest.approx(1 - (lost.square().sum() / total.square().sum()).item(), abs=1e-5)


def test_the_retained_energy_of_missing_and_of_zero_layers():
    full = ConcatFuser().fuse([lora_of(name="proj_out"), lora_of(name="attn.to_q", scale=0.0)])
    assert retained_energy(full, lora_of(name="attn.to_q", scale=0.0)) == {"proj_out": 0.0, "attn.to_q": 1.0}
    assert retained_energy(lora_of(scale=0.0), lora_of())["proj_out"] == -torch.inf


def test_retained_energy_refuses_unknown_layers():
    with pytest.raises(LoRAError, match=r"updates 'attn\.to_q', which the full one does not"):
        retained_energy(lora_of(), lora_of(name="attn.to_q"))


def test_an_update_of_zero_keeps_rank_one():
    assert SvdFuser(rank=4, energy=0.5).fuse([lora_of(scale=0.0)]).rank == 1


def test_all_of_an_update_of_zero_is_kept():
    compression = SvdFuser(rank=1).compress([lora_of(scale=0.0)])
    assert (compression.energy, compression.layers["proj_out"].energy) == (1, 1)


@pytest.mark.parametrize(("field", "allowed", "refused"), [("rank_before", 1, 0), ("rank_after", 1, 0)])
def test_a_compressed_layer_has_a_rank_of_at_least_one(field, allowed, refused):
    fields = {"rank_before": 2, "rank_after": 2, "energy": 0.5}
    assert getattr(CompressedLayer(**{**fields, field: allowed}), field) == allowed
    with pytest.raises(InvalidValueError, match=f"CompressedLayer\\({field}"):
        CompressedLayer(**{**fields, field: refused})


@pytest.mark.parametrize(("energy", "allowed"), [(0, True), (1, True), (-1e-9, False), (1 + 1e-9, False)])
def test_the_energy_of_a_compressed_layer_is_a_share(energy, allowed):
    if allowed:
        assert CompressedLayer(rank_before=2, rank_after=1, energy=energy).energy == energy
    else:
        with pytest.raises(InvalidValueError, match="CompressedLayer\\(energy"):
            CompressedLayer(rank_before=2, rank_after=1, energy=energy)


def test_the_printed_report_lists_three_layers_and_the_html_all():
    layers = {f"layer {index}": LowRank(torch.eye(2), torch.diag(torch.tensor([1.0, index]))) for index in range(1, 6)}
    compression = SvdFuser(rank=1).compress([LoRA(layers)])
    lines = [line.partition(":")[0].strip() for line in str(compression).splitlines()[1:]]
    assert lines == ["layer 1", "layer 2", "layer 3"]
    assert all(name in compression._repr_html_() for name in layers)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_share_of_the_energy_does_not_depend_on_the_size_of_an_update(scale):
    lora = LoRA({"proj": LowRank(torch.eye(2), scale * torch.diag(torch.tensor([2.0, 1.0])))})
    compression = SvdFuser(rank=1).compress([lora])
    assert (compression.energy, compression.layers["proj"].energy) == (pytest.approx(0.8), pytest.approx(0.8))


def test_half_precision_loras_are_computed_in_float32():
    lora = lora_of(3)
    half = LoRA({name: LowRank(layer.down.bfloat16(), layer.up.bfloat16()) for name, layer in lora.layers.items()})
    fused = SvdFuser(rank=3).fuse([half])
    torch.testing.assert_close(fused.layers["proj_out"].delta(), half.layers["proj_out"].delta(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fuser", [ConcatFuser(), SvdFuser(rank=2)], ids=repr)
def test_fusing_no_lora_is_an_error(fuser):
    with pytest.raises(LoRAError, match="received 0 LoRAs"):
        fuser.fuse([])


@pytest.mark.parametrize("fuser", [ConcatFuser(), SvdFuser(rank=2)], ids=repr)
def test_layers_of_one_name_and_two_shapes_cannot_be_fused(fuser):
    wide = LoRA({"proj_out": LowRank(torch.ones(1, 9), torch.ones(4, 1))})
    with pytest.raises(LoRAError, match=r"disagree on the shape of 'proj_out': \[\(4, 4\), \(4, 9\)\]"):
        fuser.fuse([lora_of(), wide])


@given(st.lists(loras(), min_size=1, max_size=3), st.integers(1, 8), st.floats(0.05, 1.0))
@settings(max_examples=40)
def test_the_report_agrees_with_retained_energy(lora_list, rank, energy):
    compression = SvdFuser(rank=rank, energy=energy).compress(lora_list)
    full = ConcatFuser().fuse(lora_list)
    again = retained_energy(full, compression.lora)
    assert compression.layers.keys() == full.layers.keys()
    for name, layer in compression.layers.items():
        assert (layer.rank_before, layer.rank_after) == (full.layers[name].rank, compression.lora.layers[name].rank)
        assert layer.energy == pytest.approx(again[name], abs=1e-5)
    energies = {name: layer.energy() for name, layer in full.layers.items()}
    kept = sum(again[name] * energies[name] for name in again) / sum(energies.values())
    assert compression.energy == pytest.approx(kept, abs=1e-5)


@given(st.lists(loras(), min_size=1, max_size=3), st.floats(0.05, 0.999))
@settings(max_examples=40)
def test_energy_alone_limits_the_rank(lora_list, energy):
    compression = SvdFuser(energy=energy).compress(lora_list)
    assert all(layer.energy >= energy - 1e-6 for layer in compression.layers.values())
    capped = SvdFuser(rank=100, energy=energy).fuse(lora_list)
    assert {name: layer.rank_after for name, layer in compression.layers.items()} == {
        name: layer.rank for name, layer in capped.layers.items()
    }


@given(loras())
@settings(max_examples=40)
def test_the_energy_of_an_update_is_that_of_its_dense_matrix(lora):
    for layer in lora.layers.values():
        assert layer.energy() == pytest.approx(layer.delta().double().square().sum().item(), rel=1e-5)


def test_the_report_lists_the_worst_layers_first_and_escapes_names():
    strong = LowRank(torch.eye(3), torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    compression = SvdFuser(rank=2).compress(
        [LoRA({"easy": LowRank(torch.ones(1, 3), torch.ones(3, 1)), "<b>": strong})]
    )
    assert str(compression) == (
        "2 layers, rank 3 to 2, 95.6522% of the energy kept; least of it in\n"
        "  <b>: rank 3 to 2, 92.8571% kept\n"
        "  easy: rank 1 to 1, 100.0000% kept"
    )
    html = compression._repr_html_()
    assert "<summary>2 layers, rank 3 to 2, 95.6522% of the energy kept</summary>" in html
    assert html.index("&lt;b&gt;") < html.index("easy")
    assert "<b>" not in html


def test_a_report_survives_json():
    layer = SvdFuser(rank=1).compress([lora_of(2)]).layers["proj_out"]
    assert from_json(CompressedLayer, to_json(layer)) == layer


def test_a_fuser_without_a_limit_is_refused():
    with pytest.raises(InvalidValueError, match=r"would leave out nothing\. Give it a rank, or an energy"):
        SvdFuser()


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 1, "energy": 0.0}, {"energy": 1.1}], ids=repr)
def test_a_fuser_that_would_keep_nothing_is_refused(options):
    with pytest.raises(InvalidValueError, match="need a rank of at least 1 and an energy above 0"):
        SvdFuser(**options)


class BrokenFuser(Fuser):
    """Returns whatever it is made of."""

    def __init__(self, result):
        self.result = result

    def fuse(self, loras):
        del loras
        return self.result


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, r"BrokenFuser\.fuse returned None for 2 LoRAs\. Expected artaug.*\.LoRA\."),
        (lora_of(name="attn.to_q"), r"returned a LoRA without 'proj_out' for 2 LoRAs\. Expected shape \(4, 4\)\."),
        (
            LoRA({"proj_out": LowRank(torch.ones(1, 9), torch.ones(4, 1))}),
            r"a LoRA in which 'proj_out' has shape \(4, 9\) for 2 LoRAs\. Expected shape \(4, 4\)\.",
        ),
        (
            LoRA({**lora_of().layers, **lora_of(name="attn.to_q").layers}),
            r"'attn\.to_q' has shape \(5, 7\) for 2 LoRAs\. Expected only layers of the LoRAs that it fuses\.",
        ),
    ],
    ids=["no LoRA", "missing layer", "other shape", "unknown layer"],
)
def test_a_fuser_that_breaks_its_contract_is_named(result, message):
    with pytest.raises(ContractError, match=message):
        fuse_loras(BrokenFuser(result), [lora_of(), lora_of(3)])


def test_one_lora_is_counted_in_the_singular():
    with pytest.raises(ContractError, match=r"returned None for 1 LoRA\. Expected"):
        fuse_loras(BrokenFuser(None), [lora_of()])


@pytest.mark.parametrize("fuser", [ConcatFuser(), SvdFuser(rank=2)], ids=repr)
def test_the_built_in_fusers_keep_their_contract(fuser):
    lora_list = [lora_of(), lora_of(3, name="attn.to_q")]
    assert fuse_loras(fuser, lora_list).layers.keys() == {"proj_out", "attn.to_q"}


# Energies of the singular values 4, 2, 2, 1: 16, 20, 24 and 25 of 25


@pytest.mark.parametrize(
    ("energy", "rank"),
    [(0.05, 1), (0.64, 1), (0.65, 2), (0.80, 2), (0.81, 3), (0.96, 3), (0.97, 4)],
)
def test_the_rank_is_the_smallest_that_holds_the_energy(energy, rank):
    lora = LoRA({"proj": LowRank(torch.eye(4), torch.diag(torch.tensor([4.0, 2.0, 2.0, 1.0])))})
    compression = SvdFuser(energy=energy).compress([lora])
    assert compression.layers["proj"].rank_after == rank
    assert compression.energy == [16, 20, 24, 25][rank - 1] / 25


def test_an_energy_of_one_keeps_every_singular_value_also_those_that_are_zero():
    lora = LoRA({"proj": LowRank(torch.eye(4), torch.diag(torch.tensor([4.0, 2.0, 0.0, 0.0])))})
    assert SvdFuser(rank=4).fuse([lora]).rank == 4
    assert SvdFuser(rank=1).fuse([lora]).rank == 1
