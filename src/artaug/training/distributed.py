"""Several processes training one LoRA: each takes its part of every batch, and their gradients are summed.

A LoRA's factors are small, so every process holds all of them and sums gradients itself, in one all-reduce per step. The
frozen model may be complete in every process, or sharded over them by FSDP2 (`shard`): training is the same for both.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from artaug._internal.annotations import checked
from artaug.errors import ModelError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """How many processes work on one training, and which of them this one is."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "World":
        """The processes that ``accelerate launch`` or ``torchrun`` has started; this one alone otherwise."""
        if not distributed.is_available():
            return SINGLE_PROCESS
        if not distributed.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return SINGLE_PROCESS
            from accelerate import PartialState  # noqa: PLC0415 - knows backends and devices; loads transformers

            PartialState()
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def split(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of the items: every ``size``-th."""
        return items[self.rank :: self.size]

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in one exchange."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten().float() for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def all_agree(self, condition: bool, device: torch.device) -> bool:
        """Whether ``condition`` holds in all processes; every process has to call this."""
        if self.size == 1:
            return condition
        lowest = torch.tensor(float(condition), device=device)
        distributed.all_reduce(lowest, op=distributed.ReduceOp.MIN)
        return bool(lowest)

    def barrier(self) -> None:
        """Wait until all processes get here."""
        if self.size > 1:
            distributed.barrier()


SINGLE_PROCESS = World()


@checked
def shard(module: nn.Module) -> None:
    """Shard a denoiser's weights over all processes (FSDP2), block by block: each holds a part and gathers as it computes.

    Call it once in every process, before drawing or training; `DifferentialLoRATrainer` needs nothing else. It cannot be
    undone: the module stays sharded.

    Raises:
        ModelError: if this process is alone, or the module names no repeated blocks.
    """
    if World.current().size == 1:
        raise ModelError("there is one process, so nothing to shard over. Start several: accelerate launch script.py.")
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - not in every build of torch

    block_types = set(getattr(module, "_repeated_blocks", None) or getattr(module, "_no_split_modules", None) or ())
    blocks = [submodule for submodule in module.modules() if type(submodule).__name__ in block_types]
    if not blocks:
        raise ModelError(
            f"{type(module).__name__} does not name its repeated blocks in _repeated_blocks or _no_split_modules "
            f"(found {block_types}), so it cannot be sharded. Train it unsharded."
        )
    for submodule in (*blocks, module):
        fully_shard(submodule)
