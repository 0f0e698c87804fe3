"""Several processes training one LoRA: each takes its share of every batch, and their gradients are added up.

A LoRA's factors are small, so every process holds all of them and sums gradients itself, in one exchange a step. The
frozen model may be whole in every process, or sharded over them by FSDP2 (`shard`): training does not see the
difference.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from artaug.errors import ModelError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """How many processes work on one training, and which of them this one is."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> "World":
        """Those that ``accelerate launch`` or ``torchrun`` has started; this one alone otherwise."""
        if not distributed.is_available():
            return SINGLE_PROCESS
        if not distributed.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return SINGLE_PROCESS
            from accelerate import PartialState  # noqa: PLC0415 - knows backends and devices; loads transformers

            PartialState()
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.rank == 0

    def share(self, things: Sequence[T]) -> Sequence[T]:
        """What of these is this process's to do."""
        return things[self.rank :: self.count]

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in one exchange."""
        if self.count == 1:
            return
        together = torch.cat([one.flatten().float() for one in tensors])
        distributed.all_reduce(together)
        for one, summed in zip(tensors, together.split([one.numel() for one in tensors]), strict=True):
            one.copy_(summed.view_as(one))

    def all_agree(self, said: bool, device: torch.device) -> bool:
        """Whether all of them say so; every process has to ask."""
        if self.count == 1:
            return said
        together = torch.tensor(float(said), device=device)
        distributed.all_reduce(together, op=distributed.ReduceOp.MIN)
        return bool(together)

    def wait(self) -> None:
        """Go on once all processes are here."""
        if self.count > 1:
            distributed.barrier()


SINGLE_PROCESS = World()


def shard(module: nn.Module) -> None:
    """Spread a denoiser's weights over all processes (FSDP2), block by block: each holds a part and gathers as it computes.

    Call it once in every process, before drawing or training; `DifferentialLoRATrainer` needs nothing else. It cannot be
    undone: the module stays sharded.

    Raises:
        ModelError: if this process is alone, or the module names no repeated blocks.
    """
    if World.current().count == 1:
        raise ModelError("there is one process, so nothing to shard over. Start several: accelerate launch script.py.")
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - not in every build of torch

    kinds = set(getattr(module, "_repeated_blocks", None) or getattr(module, "_no_split_modules", None) or ())
    blocks = [one for one in module.modules() if type(one).__name__ in kinds]
    if not blocks:
        raise ModelError(
            f"{type(module).__name__} does not say which of its modules are repeated blocks (found {kinds})."
        )
    for one in (*blocks, module):
        fully_shard(one)
