"""The settings of a training: every number that decides its result."""

import math
import re
from dataclasses import dataclass, field
from numbers import Real

from artaug._internal.annotations import checked
from artaug._internal.arguments import check_argument, check_items, check_number
from artaug._internal.text import short_repr
from artaug.errors import InvalidValueError
from artaug.training.adapters import Adapter, PlainLoRA
from artaug.training.objectives import Objective, PairedPreference
from artaug.training.optimizers import AdamW, Optimizer, Schedule

# A U-Net calls whole transformer blocks, their MLPs included, "attentions". The MLP of Z-Image's "t_embedder" is no MLP of a
# block: it embeds the timestep.
ATTENTION = r"attn|attention(?!s)"
"""Linear layers of attention, of pictures and text, in every family. FLUX.2's single blocks hold queries, keys, values and MLP
in one layer, and it is one of these; FLUX.1's ``proj_out`` of a single block reads mostly its MLP, and is not."""
ATTENTION_AND_MLP = (
    rf"{ATTENTION}|feed_forward|\bff|(?<!embedder\.)mlp|blocks\.\d+\.proj_out|attentions\.\d+\.proj_(in|out)"
)
"""Linear layers of attention and MLPs in every family, and those that lead into and out of a U-Net's transformer blocks (as
sd-scripts trains them); without modulation and embeddings."""
EVERY_LINEAR = r""
"""All linear layers, with modulation and embeddings; some readers of LoRA files fail on those."""


@checked
@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The settings of a `DifferentialLoRATrainer`."""

    rank: int = 16
    adapter: Adapter = field(default_factory=PlainLoRA)
    """What is trained beside each layer. For all of them the result is an ordinary LoRA."""
    steps: int = 400
    """Optimizer steps in all, over every stage and pair, so that objectives compare at equal cost."""
    batch_size: int = 4
    """Pairs per step, over all processes."""
    micro_batch_size: int | None = None
    """Pairs a process works on at a time; less than its share of ``batch_size`` saves memory, and changes nothing else."""
    echo: int | None = None
    """How many steps use each batch, noise included (data echoing, arXiv 1907.05550). None: as many as the objective
    recommends (`Objective.recommended_echo`), or fewer where the batches would not hold every pair otherwise.

    The teacher predicts once per batch. Its predictions are held in memory, or with a ``cache`` of latents on that disk, until
    its batches are done with: a float32 per latent and pair, of fewer than 256 batches or twice as many as hold every pair,
    for each time that the objective asks (`PairedDifference` once, the preferences and `Bipolar` twice)."""
    learning_rate: float = 1e-4
    targets: str = ATTENTION_AND_MLP
    """Regular expression, searched for in the paths of linear layers: those where it is found learn."""
    objective: Objective = field(default_factory=PairedPreference)
    optimizer: Optimizer = field(default_factory=AdamW)
    schedule: Schedule = Schedule.CONSTANT
    """The learning rate after the warmup."""
    warmup: float = 0.05
    """Part of every stage in which the learning rate rises linearly, in [0, 1]."""
    max_grad_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it."""
    ema: float | None = None
    """Decay of an exponential moving average of the factors, in (0, 1), that is exported in their place; None for none. It
    rises to its value as in diffusers' ``EMAModel``, ``(1 + n) / (10 + n)`` after ``n`` steps, so nothing of the untrained
    factors stays: 0.999 counts from about 9,000 steps on."""
    sigma_range: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest noise level to train at: high levels decide composition, low ones texture."""
    logit_normal: bool = False
    """Draw the noise levels of flow models as SD3 and FLUX were trained, logit-normally before they are shifted for the
    size of the picture; else with the density of their samplers' levels."""
    own_noise: bool = False
    """Noise each pair with what it was drawn from, rebuilt from `ImagePair.seed` (the prior noise of PNAPO, arXiv 2605.09433), in
    place of a new draw in every batch. Noise levels are drawn as ever."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, which saves most of their memory and costs a forward pass."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        types = {"adapter": Adapter, "objective": Objective, "optimizer": Optimizer, "schedule": Schedule}
        for name, expected in types.items():
            if not isinstance(value := getattr(self, name), expected):
                raise InvalidValueError(
                    f"{type(self).__name__}({name}={value!r}): need a value of artaug.training.{expected.__name__}, made "
                    "with its parentheses (aa.LoKr(factor=4), aa.AdamW(), aa.Schedule.COSINE)."
                )
        check_argument(type(self).__name__, "targets", self.targets, str)
        for name in ("learning_rate", "warmup", *(() if self.ema is None else ("ema",))):
            check_number(type(self).__name__, name, getattr(self, name))
        check_argument(type(self).__name__, "max_grad_norm", self.max_grad_norm, Real)
        check_items(type(self).__name__, "sigma_range", self.sigma_range, Real)
        sigmas: tuple[float, ...] = self.sigma_range  # as it came, of any length
        is_legal = {
            **{name: _is_count(getattr(self, name)) for name in ("rank", "steps", "batch_size")},
            **{
                name: getattr(self, name) is None or _is_count(getattr(self, name))
                for name in ("micro_batch_size", "echo")
            },
            "learning_rate": 0 < self.learning_rate < math.inf,
            "max_grad_norm": self.max_grad_norm > 0,
            "warmup": 0 <= self.warmup <= 1,
            "ema": self.ema is None or 0 < self.ema < 1,
            "sigma_range": len(sigmas) == 2 and 0 <= sigmas[0] < sigmas[1] <= 1,
        }
        illegal = [f"{name}={getattr(self, name)!r}" for name, legal in is_legal.items() if not legal]
        if illegal:
            raise InvalidValueError(
                f"{type(self).__name__}({', '.join(illegal)}): need rank, steps, batch_size, echo and micro_batch_size "
                "whole and of at least 1, learning_rate and max_grad_norm above 0, warmup in [0, 1], ema above 0 and "
                "below 1, and sigma_range as (lowest, highest) in [0, 1]."
            )
        try:
            re.compile(self.targets)
        except re.error as error:
            raise InvalidValueError(
                f"{type(self).__name__}(targets={self.targets!r}) is no regular expression: {error}."
            ) from None

    def learning_rate_at(self, step: int, *, steps: int) -> float:
        """The learning rate of a step, counted from 1, of a stage of ``steps`` steps: warmup first, then the schedule."""
        warmup_steps = math.ceil(self.warmup * steps)
        if step <= warmup_steps:
            return self.learning_rate * (step / warmup_steps)
        return self.learning_rate * self.schedule.multiplier((step - warmup_steps - 1) / (steps - warmup_steps))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 1
