"""One run of the optimizer over a student's factors: a step, and where it stands between two."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from artaug.errors import ContractError, TrainingDivergedError
from artaug.lora.lora import LoRA
from artaug.training.adapters import AdapterTensors
from artaug.training.batches import StepBatch
from artaug.training.distributed import World
from artaug.training.objectives import Loss
from artaug.training.state import Nested
from artaug.training.student import AdapterStudent


@dataclass(frozen=True)
class Stepped:
    """What one step was like."""

    loss: float
    gradient_norm: float


@dataclass(frozen=True, eq=False)
class Captured:
    """Where an optimization stands between two steps."""

    layers: Mapping[str, AdapterTensors]
    """What is learned."""
    average: Mapping[str, AdapterTensors]
    """Its moving average, if one is kept."""
    optimizer: Nested
    """The optimizer's ``state_dict``."""
    learned: LoRA | None
    """What would be exported now."""


class OptimizerLoop:
    """A student on its way, its optimizer, and the moving average of what it learns if one is kept."""

    def __init__(self, student: AdapterStudent, optimizer: torch.optim.Optimizer, *, ema: float | None) -> None:
        self._student = student
        self._factors = student.parameters()
        self._optimizer = optimizer
        self._decay = ema
        self._average = None if ema is None else [one.detach().clone() for one in self._factors]
        self._switch("train")

    def resume(
        self, layers: Mapping[str, AdapterTensors], average: Mapping[str, AdapterTensors], optimizer: Nested
    ) -> None:
        """Stand where `captured` was taken."""
        self._student.put(layers)
        self._optimizer.load_state_dict(optimizer)
        if self._average is not None:
            kept = (average[name][part] for name, parts in self._student.trained.items() for part in parts)
            for mine, one in zip(self._average, kept, strict=True):
                mine.copy_(one)

    def step(
        self,
        turn: StepBatch,
        loss: Loss,
        *,
        number: int,
        learning_rate: float,
        max_grad_norm: float,
        processes: World,
    ) -> Stepped:
        """Take one step on one batch.

        Raises:
            ContractError: if the objective returned no loss.
            TrainingDivergedError: if the loss or its gradient is not finite; the step is not taken then.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.zero_grad(set_to_none=True)
        whole = processes.count * sum(len(batch.sigmas) for batch in turn.batches)
        student = self._student.on(turn.model)
        total = torch.zeros((), device=self._factors[0].device)
        for batch in turn.batches:
            part = _checked(loss(student, batch)) * (len(batch.sigmas) / whole)
            part.backward()
            total += part.detach()
        norm = self._gathered(total, max_grad_norm, processes)
        stepped = Stepped(total.item(), norm.item())
        if not (total.isfinite() and norm.isfinite()):
            raise TrainingDivergedError(number, stepped.loss, gradient_norm=stepped.gradient_norm)
        self._optimizer.step()
        if self._average is not None and self._decay is not None:
            torch._foreach_lerp_(self._average, list(self._factors), 1 - self._decay)
        return stepped

    def _gathered(self, total: Tensor, max_grad_norm: float, processes: World) -> Tensor:
        """Add gradients up over all processes, shorten them, and say how long they were."""
        if processes.count > 1:
            for one in self._factors:
                one.grad = torch.zeros_like(one) if one.grad is None else one.grad
            processes.all_reduce([total, *(one.grad for one in self._factors if one.grad is not None)])
        return nn.utils.clip_grad_norm_(self._factors, max_grad_norm)

    def captured(self, *, export: bool) -> "Captured":
        """Where it stands; what has been learned so far, too, if that is to be exported."""
        layers = self._student.layers()
        average = {} if self._average is None else self._student.filled(self._average)
        learned = self._learned(layers, average) if export else None
        return Captured(layers, average, self._optimizer.state_dict(), learned)

    def _learned(self, layers: Mapping[str, AdapterTensors], average: Mapping[str, AdapterTensors]) -> LoRA:
        if average or not hasattr(self._optimizer, "eval"):
            return self._student.lora(average or layers)
        self._switch("eval")
        learned = self._student.lora()
        self._switch("train")
        self._student.put(layers)  # there and back is not exact
        return learned

    def _switch(self, mode: str) -> None:
        """Schedule-free optimizers keep other factors to train on than to use."""
        if hasattr(self._optimizer, mode):
            getattr(self._optimizer, mode)()


def _checked(loss: Tensor) -> Tensor:
    """The loss, if an optimizer can do something with it."""
    if loss.ndim != 0 or not loss.requires_grad:
        raise ContractError(
            f"the objective returned a loss of shape {tuple(loss.shape)}, "
            f"{'with' if loss.requires_grad else 'without'} gradient. Expected a scalar made from model.predict."
        )
    return loss
