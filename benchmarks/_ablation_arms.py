"""The arms of the ablation: ways to learn from the same pairs. A new one is a line in `ARMS`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache

import artaug as aa
from artaug import playground
from artaug.diffusion import DiffusersSynthesizer
from benchmarks.objectives import NEEDS_NOTHING, passes_counted


@dataclass(frozen=True)
class Arm:
    """A way to learn from pairs: an objective with its settings, and what the trainer takes for it."""

    objective: aa.Objective
    learning_rate: float
    echo: int = 1
    own_noise: bool = False

    def trainer(self, *, rank: int, steps: int, batch_size: int) -> aa.DifferentialLoRATrainer:
        """The trainer of a training of this size."""
        return aa.DifferentialLoRATrainer(
            objective=self.objective,
            learning_rate=self.learning_rate,
            echo=self.echo,
            own_noise=self.own_noise,
            rank=rank,
            steps=steps,
            batch_size=batch_size,
        )


DEFAULT = "PairedPreference"
"""The library's default objective: the arm of the axes that have one alone, and the one that all others are compared with."""
PLAIN = "fine-tuning"
ARMS: Mapping[str, Arm] = {
    "PairedDifference": Arm(aa.PairedDifference(), 4e-3),
    "PairedDifference, echo 2": Arm(aa.PairedDifference(), 4e-3, echo=2),
    "PairedDifference, echo 4": Arm(aa.PairedDifference(), 4e-3, echo=4),
    "PairedDifference, reach 2": Arm(aa.PairedDifference(reach=2), 4e-3),
    "PairedDifference, at before .5": Arm(aa.PairedDifference(at_before=0.5), 4e-3),
    "PairedDifference, own noise": Arm(aa.PairedDifference(), 4e-3, own_noise=True),
    DEFAULT: Arm(aa.PairedPreference(), 3e-3, echo=aa.PairedPreference.recommended_echo),
    "PairedPreference, echo 1": Arm(aa.PairedPreference(), 3e-3),
    "PairedPreference, anchor .1": Arm(aa.PairedPreference(anchor=0.1), 4e-3),
    "PairedPreference, own noise": Arm(aa.PairedPreference(), 3e-3, own_noise=True),
    "Bipolar": Arm(aa.Bipolar(), 4e-3),
    "TwoStage": Arm(aa.TwoStage(per_pair=False), 2e-3),
    PLAIN: Arm(aa.SupervisedFineTuning(), 4e-3),
    "DPO": Arm(aa.DirectPreference(beta=5, anchor=0.1), 2e-3),
    "DPO, anchor .01": Arm(aa.DirectPreference(beta=5, anchor=0.01), 1e-3),
    "DPO, safeguard .5": Arm(aa.DirectPreference(beta=5, anchor=0.1, safeguard=0.5), 2e-3),
    "DPO, norm guard 10": Arm(aa.DirectPreference(beta=5, anchor=0.1, norm_guard=10), 2e-3),
    "DPO, own noise": Arm(aa.DirectPreference(beta=5, anchor=0.1), 2e-3, own_noise=True),
    "NegativeAware, beta 1": Arm(aa.NegativeAware(beta=1), 1e-3),
    "NegativeAware, beta 2": Arm(aa.NegativeAware(beta=2), 1e-3),
}
"""All arms. ``--tune`` shows what each learning rate gains at a drift of 0.002."""

REFERENCE = "PairedDifference"
"""The arm whose passes are the budget where passes are equal."""
ON_THE_FRONT = (
    DEFAULT,
    "PairedDifference",
    "PairedDifference, at before .5",
    PLAIN,
    "DPO",
    "NegativeAware, beta 1",
)
"""The arms that go several rounds, and whose cost is measured."""


@cache
def passes_a_step(arm: Arm) -> float:
    """Denoiser calls of a step for each picture of its batch, a backward pass counted as two: counted in a short training."""
    base, (prompt,) = _base(), playground.prompts(1, seed=0)
    before, after = (playground.render(prompt + words, seed=0) for words in ("", NEEDS_NOTHING))
    pair = aa.ImagePair(prompt=prompt, seed=0, before=before, after=after, plan=aa.Plan(prompt))
    trainer = arm.trainer(rank=1, steps=max(2, arm.echo), batch_size=1)  # a batch, and a step for each of two stages
    with passes_counted(base) as passes:
        trainer.train([pair], base, seed=0, progress=False)
    return passes.denoiser_calls / trainer.steps


@cache
def _base() -> DiffusersSynthesizer:
    return playground.synthesizer()


def steps_of_equal_passes(arm: Arm, steps: int) -> int:
    """The steps that come nearest to the denoiser calls of ``steps`` steps of the reference, at least two."""
    return max(2, round(steps * passes_a_step(ARMS[REFERENCE]) / passes_a_step(arm)))


def described(part: object) -> str:
    """A part and those of its settings that are not the defaults: an arm that gets a new setting stays the same arm."""
    if not is_dataclass(part):
        return repr(part)
    settings = [
        f"{item.name}={described(getattr(part, item.name))}"
        for item in fields(part)
        if getattr(part, item.name) != (item.default_factory() if callable(item.default_factory) else item.default)
    ]
    return f"{type(part).__name__}({', '.join(settings)})"
