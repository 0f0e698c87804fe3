"""How a training is set: every number that decides what it gives."""

import math
import re
from dataclasses import dataclass, field

from artaug.errors import InvalidValueError
from artaug.training.adapters import Adapter, PlainLoRA
from artaug.training.objectives import Objective, PairedDifference
from artaug.training.optimizers import AdamW, Optimizer, Schedule

ATTENTION = r"attn|attention"
"""Linear layers of attention, in every family."""
ATTENTION_AND_MLP = r"attn|attention|feed_forward|\bff|mlp|blocks\.\d+\.proj_out"
"""Linear layers of attention and MLPs, as FLUX, SD3, Qwen-Image and the UNets name them; modulation is left alone."""
EVERY_LINEAR = r""
"""All linear layers, modulation and embeddings included; some readers of LoRA files fail on those."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The settings of a `DifferentialLoRATrainer`."""

    rank: int = 16
    adapter: Adapter = field(default_factory=PlainLoRA)
    """What is trained beside each layer. Whatever it is, the result is an ordinary LoRA."""
    steps: int = 400
    """Optimizer steps in all, over every stage and pair, so that objectives compare at equal cost."""
    batch_size: int = 4
    """Pairs a step, over all processes."""
    micro_batch_size: int | None = None
    """Pairs a process works on at a time; less than its share of ``batch_size`` saves memory, and changes nothing else."""
    echo: int = 1
    """How often each batch is learned from, noise included (data echoing, arXiv 1907.05550). The teacher is asked about it
    once, and what it said is held in memory in float32, a number a latent, for each of ``batch_size * steps / echo`` pairs
    and each question about one: one of `PairedDifference`, two of `Bipolar` and `DirectPreference`."""
    learning_rate: float = 1e-4
    targets: str = ATTENTION_AND_MLP
    """Regular expression, searched for in the paths of linear layers, that says which of them learn."""
    objective: Objective = field(default_factory=PairedDifference)
    optimizer: Optimizer = field(default_factory=AdamW)
    schedule: Schedule = Schedule.CONSTANT
    """How the learning rate goes on after the warmup."""
    warmup: float = 0.05
    """Part of every stage in which the learning rate rises linearly, in [0, 1]."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are shortened to it."""
    ema: float | None = None
    """Decay of a moving average of the factors, in (0, 1), that is exported in their place; None for none."""
    sigma_range: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest noise level to train at: high levels decide composition, low ones texture."""
    logit_normal: bool = False
    """Spread the noise levels of flow models as SD3 and FLUX were trained, logit-normally before they are shifted for the
    size of the picture; else as their samplers spread them."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, which saves most of their memory and costs a forward pass."""

    def __post_init__(self) -> None:
        self._check_kinds()
        faults = {
            **{name: _counts(getattr(self, name)) for name in ("rank", "steps", "batch_size", "echo")},
            "micro_batch_size": self.micro_batch_size is None or _counts(self.micro_batch_size),
            "learning_rate": 0 < self.learning_rate < math.inf,
            "max_grad_norm": self.max_grad_norm > 0,
            "warmup": 0 <= self.warmup <= 1,
            "ema": self.ema is None or 0 < self.ema < 1,
            "sigma_range": 0 <= self.sigma_range[0] < self.sigma_range[1] <= 1,
        }
        wrong = [f"{name}={getattr(self, name)!r}" for name, legal in faults.items() if not legal]
        if wrong:
            raise InvalidValueError(
                f"{type(self).__name__}({', '.join(wrong)}): need rank, steps, batch_size, echo and micro_batch_size whole and of at least 1, "
                "learning_rate and max_grad_norm above 0, warmup in [0, 1], ema above 0 and below 1, and sigma_range as "
                "(lowest, highest) in [0, 1]."
            )
        try:
            re.compile(self.targets)
        except re.error as fault:
            raise InvalidValueError(
                f"{type(self).__name__}(targets={self.targets!r}) is no regular expression: {fault}."
            ) from None

    def _check_kinds(self) -> None:
        kinds = {"adapter": Adapter, "objective": Objective, "optimizer": Optimizer, "schedule": Schedule}
        for name, kind in kinds.items():
            if not isinstance(value := getattr(self, name), kind):
                raise InvalidValueError(
                    f"{type(self).__name__}({name}={value!r}): need a value of artaug.training.{kind.__name__}, made with "
                    "its parentheses (aa.LoKr(factor=4), aa.AdamW(), aa.Schedule.COSINE)."
                )

    def learning_rate_at(self, step: int, *, steps: int) -> float:
        """The rate of a step, counted from 1, of a stage that has so many: warmup first, then the schedule."""
        rising = math.ceil(self.warmup * steps)
        if step <= rising:
            return self.learning_rate * (step / rising)
        return self.learning_rate * self.schedule.factor((step - rising - 1) / (steps - rising))


def _counts(value: object) -> bool:
    return isinstance(value, int) and value >= 1
