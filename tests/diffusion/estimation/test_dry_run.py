"""What a dry run counts: bytes while something holds them, and multiplications."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch.utils.checkpoint import checkpoint

from artaug.diffusion.estimation.dry_run import DeviceKernels, MemoryTracker


def empty(*shape, **options):
    return torch.empty(*shape, device="meta", **options)


def attention_peak(tokens):
    query = empty(1, 2, tokens, 16, requires_grad=True)
    with MemoryTracker() as ledger, DeviceKernels(fused_norms=True):
        F.scaled_dot_product_attention(query, query, query).sum().backward()
    return ledger.peak


def test_what_is_made_counts_until_nothing_holds_it():
    given = empty(1000)
    with MemoryTracker() as ledger:
        kept = given + 1
        assert ledger.now == 4000
        other = kept * 2
        del other
    assert (ledger.now, ledger.peak) == (4000, 8000)


def test_views_and_what_was_there_before_cost_nothing():
    given = empty(10, 100)
    with MemoryTracker() as ledger:
        held = [given.t(), given.view(-1), given[3:], given.mul_(2)]
    assert len(held) == 4
    assert ledger.peak == 0


def test_what_autograd_saves_is_held_until_the_backward_pass_is_over():
    weight = empty(1000, requires_grad=True)
    with MemoryTracker() as ledger:
        total = weight.exp().sum()
        assert ledger.now == 4000 + 4
        total.backward()
        del total
        assert ledger.now == 4000  # the gradient


def test_a_product_of_matrices_is_two_operations_an_element():
    with MemoryTracker() as ledger:
        empty(3, 4) @ empty(4, 5)
    assert ledger.flops == 2 * 3 * 4 * 5


def test_attention_is_two_products_there_and_five_back():
    query, key = empty(1, 2, 8, 4, requires_grad=True), empty(1, 2, 6, 4)
    with MemoryTracker() as ledger, DeviceKernels(fused_norms=True):
        out = F.scaled_dot_product_attention(query, key, key)
        assert ledger.flops == 2 * 2 * (2 * 8 * 6 * 4)
        out.sum().backward()
    assert ledger.flops == 7 * 2 * (2 * 8 * 6 * 4)


def test_attention_holds_no_table_of_queries_and_keys():
    assert attention_peak(4096) == pytest.approx(4 * attention_peak(1024), rel=1e-3)


def test_a_norm_in_one_kernel_holds_its_input_and_a_number_a_row():
    def held(*, fused):
        inputs = empty(64, 128, dtype=torch.bfloat16, requires_grad=True)
        with MemoryTracker() as ledger, DeviceKernels(fused_norms=fused):
            out = F.rms_norm(inputs, (128,), eps=1e-6)
            assert out.shape == inputs.shape
            return ledger.now

    assert held(fused=True) == 64 * 128 * 2 + 64 * 4
    assert held(fused=False) > 64 * 128 * 4


def test_the_same_kernels_run_again_under_gradient_checkpointing():
    query = empty(1, 2, 512, 16, requires_grad=True)

    def attended(query):
        return F.scaled_dot_product_attention(query, query, query)

    def again():
        return torch.utils.checkpoint.noop_context_fn()[0], DeviceKernels(fused_norms=True)

    with MemoryTracker() as ledger, DeviceKernels(fused_norms=True):
        checkpoint(attended, query, use_reentrant=False, context_fn=again).sum().backward()
    assert ledger.flops == (2 + 2 + 5) * 2 * (2 * 512 * 512 * 16)
    assert ledger.peak < 2 * 512 * 512 * 4
