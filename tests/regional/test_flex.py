"""FlexAttention under a group mask: sorted tokens, tiles by counting, and the definition as the oracle."""

import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex_attention
from hypothesis import HealthCheck, given, settings

import artaug as aa
from artaug.regional.attention_costs import TILE
from artaug.regional.attention_mask import GroupMask, joint_mask
from artaug.regional.denoiser import Span
from artaug.regional.flex import FlexMask, masked_flex_attention
from artaug.regional.region_weights import split_grid
from support.layouts import layouts, random_qkv, reference_attention

CPU = torch.device("cpu")


@pytest.fixture
def _uncompiled(monkeypatch):
    """Run FlexAttention's definition as it stands: compiling it anew for every layout drawn would take minutes."""
    monkeypatch.setattr(torch_flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts(max_regions=6))
def test_flex_attention_is_the_definition(layout):
    query, key, value = random_qkv(layout.mask)
    result = masked_flex_attention(query, key, value, FlexMask.of([layout.mask], CPU), compiled=False)
    expected = reference_attention(query, key, value, layout.mask)
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0)


@settings(max_examples=40)
@given(layout=layouts(max_regions=5))
def test_the_block_mask_lists_just_the_tiles_with_a_visible_pair(layout):
    mask = layout.mask
    flex_mask = FlexMask.of([mask], CPU)
    visible = mask.weights[flex_mask.query_order[0]][:, mask.groups[flex_mask.key_order[0]]] > 0
    rows, columns = (-(-length // TILE) for length in visible.shape)
    padded = torch.zeros(rows * TILE, columns * TILE)
    padded[: visible.shape[0], : visible.shape[1]] = visible
    pairs = padded.reshape(rows, TILE, columns, TILE).sum(dim=(1, 3))
    block_mask = flex_mask.block_mask
    for counts, listed, expected in (
        (block_mask.kv_num_blocks, block_mask.kv_indices, (pairs > 0) & (pairs < TILE * TILE)),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, pairs == TILE * TILE),
    ):
        for row in range(rows):
            assert set(listed[0, 0, row, : counts[0, 0, row]].tolist()) == set(expected[row].nonzero()[:, 0].tolist())


@settings(max_examples=40)
@given(layout=layouts(max_regions=5))
def test_sorting_puts_queries_of_equal_class_and_keys_of_one_group_side_by_side(layout):
    flex_mask = FlexMask.of([layout.mask], CPU)
    for order, numbers in (
        (flex_mask.query_order, torch.unique(layout.mask.weights > 0, dim=0, return_inverse=True)[1]),
        (flex_mask.key_order, layout.mask.groups),
    ):
        runs = torch.unique_consecutive(numbers[order[0]])
        assert len(runs) == len(torch.unique(numbers))
    unsorted = flex_mask.query_order[0][flex_mask.inverse_query_order[0]]
    assert torch.equal(unsorted, torch.arange(len(unsorted)))


def test_whole_tiles_are_full_or_absent_and_a_border_is_partial():
    weights = torch.tensor([[1.0, 0.0]]).repeat(TILE, 1)
    weights = torch.cat([weights, torch.tensor([[0.0, 1.0]]).repeat(TILE, 1)])
    groups = torch.arange(2).repeat_interleave(TILE)
    block_mask = FlexMask.of([GroupMask(weights, groups, (slice(0, 2 * TILE),))], CPU).block_mask
    assert block_mask.full_kv_num_blocks.tolist() == [[[1, 1]]]
    assert block_mask.kv_num_blocks.tolist() == [[[0, 0]]]
    weights[TILE - 1] = weights[TILE]
    block_mask = FlexMask.of([GroupMask(weights, groups, (slice(0, 2 * TILE),))], CPU).block_mask
    assert block_mask.full_kv_num_blocks.sum() + block_mask.kv_num_blocks.sum() == 3
    assert block_mask.kv_num_blocks.sum() == 2


def test_a_hard_mask_changes_no_score_and_soft_weights_add_their_logarithm():
    groups = torch.tensor([0, 1])
    hard = GroupMask(torch.tensor([[2.0, 0.0], [3.0, 3.0]]), groups, (slice(0, 2),))
    assert FlexMask.of([hard], CPU).score_mod is None
    soft = FlexMask.of([GroupMask(torch.tensor([[4.0, 1.0]]), groups, (slice(0, 1),))], CPU)
    zero, first = torch.zeros(()), torch.tensor(0)
    added = [soft.score_mod(zero, first, first, first, torch.tensor(key)).item() for key in (0, 1)]
    assert added == pytest.approx([0, -1.3862944])  # log(4/4) and log(1/4): the largest weight is divided out


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_compiles_flex_to_the_definition(dtype):
    regions = (aa.Region(aa.Box(0, 0, 0.5, 0.5), "a"), aa.Region(aa.Box(0.4, 0.4, 1, 1), "b", feather=0.1))
    spans = (Span("text", 9, 1), Span("text", 7, 2), Span("text", 16, 0), Span("image", 256))
    mask = joint_mask(spans, split_grid(regions, (16, 16), base_weight=0.3), aa.Isolation(base_weight=0.3))
    query, key, value = torch.randn(3, 1, 2, len(mask.groups), 16, device="cuda", dtype=dtype)
    result = masked_flex_attention(query, key, value, FlexMask.of([mask], query.device), compiled=True)
    expected = reference_attention(query.cpu(), key.cpu(), value.cpu(), mask)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(result.cpu().double(), expected, atol=tolerance, rtol=0)


LAYOUTS_OF_ABOUT_ONE_LENGTH = """
import torch
import artaug as aa
from artaug.regional.attention import dense_attention
from artaug.regional.attention_mask import joint_mask
from artaug.regional.denoiser import Span
from artaug.regional.flex import FlexMask, masked_flex_attention
from artaug.regional.region_weights import split_grid

for number, (box, length) in enumerate([((0, 0, 0.5, 0.5), 9), ((0, 0, 0.25, 0.75), 20), ((0.1, 0.1, 0.9, 1), 3)]):
    regions = (aa.Region(aa.Box(*box), "a"), aa.Region(aa.Box(0.5, 0.5, 1, 1), "b"))
    spans = (Span("text", length, 1), Span("text", 7, 2), Span("text", 16, 0), Span("image", 256))
    mask = joint_mask(spans, split_grid(regions, (16, 16), base_weight=0.3), aa.Isolation(base_weight=0.3))
    query, key, value = torch.randn(3, 1, 2, len(mask.groups), 16)
    with torch._dynamo.config.patch(error_on_recompile=number > 0), torch.no_grad():
        result = masked_flex_attention(query, key, value, FlexMask.of([mask], query.device), compiled=True)
    torch.testing.assert_close(result, dense_attention(query, key, value, mask.bias), atol=1e-5, rtol=0)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_another_layout_and_other_prompts_of_about_the_same_length_run_the_same_kernel():
    # In a process of its own, since the checks of types that run with the tests would be compiled, too.
    done = subprocess.run(
        [sys.executable, "-c", LAYOUTS_OF_ABOUT_ONE_LENGTH], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
