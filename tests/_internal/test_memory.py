"""Errors that say that memory ran out, and batches that are halved until they fit."""

import errno
import gc
import logging
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug._internal.memory import FittingBatches, is_out_of_memory

OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:81] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


def run(batches, function, items):
    return list(batches.run(function, items, owner="Mine", item="number", remedy="Use less."))


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_what_says_that_memory_ran_out_is_recognized(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(errno.ENOSPC, "No space left on device"),
        aa.PartError("Served raised HTTPError: 500: CUDA out of memory"),  # the server's memory, not ours
    ],
    ids=repr,
)
def test_other_errors_do_not_say_so(error):
    assert not is_out_of_memory(error)


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 40))
def test_every_item_is_done_once_in_order_whatever_fits(count, largest, fits):
    batches, done = FittingBatches(largest), []

    def function(batch):
        if len(batch) > fits:
            raise MemoryError
        done.extend(batch)
        return len(batch)

    results = run(batches, function, range(count))
    assert done == [item for batch, _ in results for item in batch] == list(range(count))
    assert all(size == len(batch) <= fits for batch, size in results)
    assert batches.largest == largest or fits / 2 - 1 < batches.largest <= fits


def test_a_smaller_batch_stays_and_is_logged_once(caplog):
    batches, sizes = FittingBatches(8), []

    def function(batch):
        sizes.append(len(batch))
        if len(batch) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with caplog.at_level(logging.WARNING):
        run(batches, function, range(16))
        run(batches, function, range(8))
    assert sizes == [8, 4, 4, 4, 4, 4, 4]
    (record,) = caplog.records
    assert record.getMessage() == (
        "Mine ran out of memory at 8 numbers together, so they are 4 at a time from now on "
        "(OutOfMemoryError: CUDA out of memory)"
    )


def test_what_a_failed_batch_held_is_free_before_the_next_begins():
    class Tensor:
        pass

    held, alive = [], []

    def function(batch):
        gc.disable()  # only what is released on purpose
        alive.append([reference() for reference in held if reference() is not None])
        tensor = Tensor()
        tensor.itself = tensor
        held.append(weakref.ref(tensor))
        if len(batch) > 1:
            raise MemoryError

    try:
        run(FittingBatches(4), function, range(4))
    finally:
        gc.enable()
    assert alive[:3] == [[], [], []]


def test_a_single_item_that_does_not_fit_is_an_error_that_says_what_to_do():
    error = MemoryError("no room")

    def function(_batch):
        raise error

    with pytest.raises(MemoryError) as caught:
        run(FittingBatches(4), function, range(4))
    assert caught.value is error
    assert caught.value.__notes__ == ["Mine ran out of memory at a single number. Use less."]
