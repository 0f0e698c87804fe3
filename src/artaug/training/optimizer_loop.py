"""One run of the optimizer over a student's parameters: a step, and saving and restoring between two steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from artaug.errors import TrainingDivergedError
from artaug.lora.lora import LoRA
from artaug.training.adapters import AdapterTensors
from artaug.training.batches import StepBatch
from artaug.training.distributed import World
from artaug.training.learners import AdapterStudent, CompanionLearner, Learner, Role
from artaug.training.loss_scale import LossScale
from artaug.training.objectives import Loss, compute_loss
from artaug.training.state import OptimizerState


@dataclass(frozen=True)
class StepResult:
    """The loss of a step and the norm of its gradient before clipping."""

    loss: float
    gradient_norm: float
    loss_scale: float | None
    """What the loss was multiplied by in the backward pass; None unless the model computes in float16."""
    is_skipped: bool
    """Whether the gradient overflowed float16, so that the step was not taken."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What an `OptimizerLoop` is restored from, and what it would export."""

    adapter: Mapping[str, AdapterTensors]
    """The trained tensors, by layer."""
    ema: Mapping[str, AdapterTensors]
    """Their moving average; empty if none is kept."""
    ema_updates: int
    """How many parameters it has averaged."""
    loss_scale: LossScale | None
    """None unless the model computes in float16."""
    optimizer: OptimizerState
    """The optimizer's ``state_dict``."""
    lora: LoRA | None
    """The LoRA of this step; None unless ``export`` was set."""


class OptimizerLoop:
    """A student or its companion, its optimizer, and the moving average of its parameters if one is kept."""

    def __init__(
        self,
        student: AdapterStudent,
        optimizer: torch.optim.Optimizer,
        *,
        ema: float | None,
        loss_scale: LossScale | None = None,
        companion: CompanionLearner | None = None,
    ) -> None:
        self._student = student
        self._learner: Learner = companion or student
        self._role: Role = "companion" if companion else "student"
        self._parameters = self._learner.parameters()
        self._optimizer = optimizer
        self._decay = ema
        self._ema = None if ema is None else [parameter.detach().clone() for parameter in self._parameters]
        self._ema_updates = 0
        self._loss_scale = loss_scale
        self._set_mode("train")

    @property
    def trained(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        """The parameters by layer; after a step they hold its gradients."""
        return self._learner.trained

    def restore(
        self,
        adapter: Mapping[str, AdapterTensors],
        ema: Mapping[str, AdapterTensors],
        optimizer: OptimizerState,
        *,
        ema_updates: int,
    ) -> None:
        """Restore what a `Snapshot` holds; its loss scale is given when the loop is made."""
        self._learner.load(adapter)
        self._optimizer.load_state_dict(optimizer)
        self._ema_updates = ema_updates
        if self._ema is not None:
            saved = (ema[layer][name] for layer, parameters in self._learner.trained.items() for name in parameters)
            for average, tensor in zip(self._ema, saved, strict=True):
                average.copy_(tensor)

    def step(
        self,
        batch: StepBatch,
        loss: Loss,
        *,
        number: int,
        learning_rate: float,
        max_grad_norm: float,
        world: World,
    ) -> StepResult:
        """Take one step: gradients of all micro batches and processes, clipping, the optimizer, the moving average.

        Raises:
            ContractError: if the objective does not return a scalar with gradient.
            TrainingDivergedError: if the loss is not finite, or its gradient is not and no smaller loss scale can help; the
                step is not taken then.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.zero_grad(set_to_none=True)
        # A loss is the mean over the pairs of its micro batch. Weighted by its share of all pairs of the step, in all
        # processes, the losses and their gradients add up to those of the mean over the step's batch.
        total_pairs = world.size * sum(len(micro_batch.sigmas) for micro_batch in batch.micro_batches)
        student = self._student.with_model(batch.model)
        scale = 1.0 if self._loss_scale is None else self._loss_scale.value
        total_loss = torch.zeros((), device=self._parameters[0].device)
        for micro_batch in batch.micro_batches:
            with student.roles.learning(self._role), student.steering.until_backward():
                weighted = compute_loss(loss, student, micro_batch) * (len(micro_batch.sigmas) / total_pairs)
                (scale * weighted).backward()  # adds to .grad, and frees the activations of this micro batch
            total_loss += weighted.detach()
        if world.size > 1:
            self._reduce_gradients(total_loss, world)
        if scale != 1:  # in float32, before anything reads their size: clipping, the optimizer
            torch._foreach_div_([p.grad for p in self._parameters if p.grad is not None], scale)
        norm = nn.utils.clip_grad_norm_(self._parameters, max_grad_norm).item()
        loss_value, loss_scale = total_loss.item(), self._loss_scale
        overflows = math.isfinite(loss_value) and not math.isfinite(norm)
        if overflows and loss_scale is not None and loss_scale.can_shrink:
            self._loss_scale = loss_scale.after_overflow()
            return StepResult(loss_value, norm, scale, is_skipped=True)
        if not (math.isfinite(loss_value) and math.isfinite(norm)):
            raise TrainingDivergedError(number, loss_value, gradient_norm=norm)
        self._optimizer.step()
        self._average()
        if loss_scale is None:
            return StepResult(loss_value, norm, None, is_skipped=False)
        self._loss_scale = loss_scale.after_step()
        return StepResult(loss_value, norm, scale, is_skipped=False)

    def _average(self) -> None:
        """``average <- decay * average + (1 - decay) * parameters``, with a decay that rises to its value.

        At a constant decay ``d``, ``d^t`` of the untrained parameters would be left after ``t`` steps: 0.67 at 0.999 and 400.
        """
        if self._ema is None or self._decay is None:
            return
        torch._foreach_lerp_(self._ema, list(self._parameters), 1 - ema_decay(self._decay, self._ema_updates))
        self._ema_updates += 1

    def _reduce_gradients(self, total_loss: Tensor, world: World) -> None:
        """Sum the loss and all gradients over the processes, in one exchange; all of them clip and step the same then."""
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        world.all_reduce([total_loss, *gradients])

    def snapshot(self, *, export: bool) -> Snapshot:
        """Copy all that `restore` needs, and with ``export`` what has been learned so far as a LoRA."""
        adapter = self._learner.tensors()
        ema = {} if self._ema is None else self._learner.group_by_layer(self._ema)
        lora = self._export(adapter, ema) if export else None
        return Snapshot(adapter, ema, self._ema_updates, self._loss_scale, self._optimizer.state_dict(), lora)

    def _export(self, adapter: Mapping[str, AdapterTensors], ema: Mapping[str, AdapterTensors]) -> LoRA:
        if ema or not hasattr(self._optimizer, "eval"):
            return self._student.to_lora(ema or adapter)
        self._set_mode("eval")
        lora = self._student.to_lora()
        self._set_mode("train")
        self._learner.load(adapter)  # switching there and back rounds
        return lora

    def _set_mode(self, mode: str) -> None:
        """Schedule-free optimizers use different weights for training and for evaluation; others have no modes."""
        if hasattr(self._optimizer, mode):
            getattr(self._optimizer, mode)()


def ema_decay(decay: float, updates: int) -> float:
    """The decay of a moving average after ``updates`` updates: ``(1 + n) / (10 + n)`` until that is ``decay``, and 0 at first.

    This is the warmup of TensorFlow's ``ExponentialMovingAverage`` and diffusers' ``EMAModel``: the average is over about the
    last tenth of the steps until it is over as many as ``decay`` says.
    """
    return min(decay, (1 + updates) / (10 + updates)) if updates else 0.0
