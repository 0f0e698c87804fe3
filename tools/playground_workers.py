"""Data-parallel training with one single-threaded process on each core, synchronized once a step."""

import logging
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn


@dataclass(frozen=True)
class Job:
    """The settings of a training run, equal for every worker."""

    out: Path
    seed: int
    steps: int
    batch_size: int
    """Pictures a step, over all workers."""
    workers: int
    compiled: bool = True
    """Whether to run the transformer through `torch.compile`: minutes to start, then a third faster."""


def launch(train: Callable[[int, Job], None], job: Job) -> None:
    """Run `train(rank, job)` in one process for each worker, and wait for all."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29517")
    spawn(_worker, args=(train, job), nprocs=job.workers)


def _worker(rank: int, train: Callable[[int, Job], None], job: Job) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("playground").setLevel(logging.INFO)
    distributed.init_process_group("gloo", rank=rank, world_size=job.workers)
    train(rank, job)
    distributed.destroy_process_group()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the workers."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def learning_rate(step: int, *, steps: int, peak: float, warmup: int = 200) -> float:
    """Warm up linearly, then fall along a cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


class ParameterAverage:
    """An exponential moving average of parameters, which draws better than those of the last step."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, decay: float) -> None:
        """Start at the present values."""
        self.decay = decay
        self.values: list[Tensor] = [parameter.detach().clone() for parameter in parameters]
        self.count = 0

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter]) -> None:
        """Move towards the present values."""
        self.count += 1
        decay = min(self.decay, self.count / (self.count + 10))
        torch._foreach_lerp_(self.values, [parameter.detach() for parameter in parameters], 1 - decay)

    @torch.no_grad()
    def swap(self, parameters: Iterable[nn.Parameter]) -> None:
        """Exchange average and present values; do it twice to undo it."""
        for value, parameter in zip(self.values, parameters, strict=True):
            present = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(present)
