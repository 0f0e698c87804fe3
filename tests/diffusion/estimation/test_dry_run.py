"""What a dry run counts: live bytes, and floating-point operations."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch.utils.checkpoint import checkpoint

from artaug.diffusion.estimation.dry_run import DeviceKernels, MemoryTracker


def empty(*shape, **options):
    return torch.empty(*shape, device="meta", **options)


def attention_peak(tokens):
    query = empty(1, 2, tokens, 16, requires_grad=True)
    with MemoryTracker() as tracker, DeviceKernels(fused_norms=True):
        F.scaled_dot_product_attention(query, query, query).sum().backward()
    return tracker.peak_bytes


def test_new_tensors_count_until_they_are_freed():
    inputs = empty(1000)
    with MemoryTracker() as tracker:
        kept = inputs + 1
        assert tracker.live_bytes == 4000
        other = kept * 2
        del other
    assert (tracker.live_bytes, tracker.peak_bytes) == (4000, 8000)


def test_views_and_existing_tensors_do_not_count():
    inputs = empty(10, 100)
    with MemoryTracker() as tracker:
        views = [inputs.t(), inputs.view(-1), inputs[3:], inputs.mul_(2)]
    assert len(views) == 4
    assert tracker.peak_bytes == 0


def test_what_autograd_saves_counts_until_the_backward_pass_is_over():
    weight = empty(1000, requires_grad=True)
    with MemoryTracker() as tracker:
        total = weight.exp().sum()
        assert tracker.live_bytes == 4000 + 4
        total.backward()
        del total
        assert tracker.live_bytes == 4000  # the gradient


def test_a_matrix_product_takes_two_operations_for_each_element():
    with MemoryTracker() as tracker:
        empty(3, 4) @ empty(4, 5)
    assert tracker.flops == 2 * 3 * 4 * 5


def test_attention_takes_two_products_forward_and_five_backward():
    query, key = empty(1, 2, 8, 4, requires_grad=True), empty(1, 2, 6, 4)
    with MemoryTracker() as tracker, DeviceKernels(fused_norms=True):
        out = F.scaled_dot_product_attention(query, key, key)
        assert tracker.flops == 2 * 2 * (2 * 8 * 6 * 4)
        out.sum().backward()
    assert tracker.flops == 7 * 2 * (2 * 8 * 6 * 4)


def test_attention_saves_no_matrix_of_queries_by_keys():
    assert attention_peak(4096) == pytest.approx(4 * attention_peak(1024), rel=1e-3)


def test_a_fused_norm_saves_its_input_and_one_number_a_row():
    def saved_bytes(*, fused):
        inputs = empty(64, 128, dtype=torch.bfloat16, requires_grad=True)
        with MemoryTracker() as tracker, DeviceKernels(fused_norms=fused):
            out = F.rms_norm(inputs, (128,), eps=1e-6)
            assert out.shape == inputs.shape
            return tracker.live_bytes

    assert saved_bytes(fused=True) == 64 * 128 * 2 + 64 * 4
    assert saved_bytes(fused=False) > 64 * 128 * 4


def test_gradient_checkpointing_recomputes_with_the_same_kernels():
    query = empty(1, 2, 512, 16, requires_grad=True)

    def attention(query):
        return F.scaled_dot_product_attention(query, query, query)

    def contexts():
        return torch.utils.checkpoint.noop_context_fn()[0], DeviceKernels(fused_norms=True)

    with MemoryTracker() as tracker, DeviceKernels(fused_norms=True):
        checkpoint(attention, query, use_reentrant=False, context_fn=contexts).sum().backward()
    assert tracker.flops == (2 + 2 + 5) * 2 * (2 * 512 * 512 * 16)
    assert tracker.peak_bytes < 2 * 512 * 512 * 4


def test_freeing_an_existing_tensor_makes_room_for_another():
    weight = empty(1000)
    with MemoryTracker([weight]) as tracker:
        del weight
        unpacked = empty(500) + 1
        assert tracker.live_bytes == -4000 + 2000
        del unpacked
    assert tracker.peak_bytes == 0
