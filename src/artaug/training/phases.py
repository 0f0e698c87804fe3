"""Phases: a training plan laid out over the steps, one run of the optimizer after the other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from artaug.errors import InvalidValueError
from artaug.training.config import TrainingConfig
from artaug.training.objectives import Companion, Loss, TrainingPlan

_CYCLE = 128
"""Batches of a cycle, at least, in a phase that has so many."""


@dataclass(frozen=True)
class Phase:
    """One stage of one group of pairs: the steps from ``start + 1`` to ``stop``, counted over the training from 1."""

    group: int
    pairs: tuple[int, ...]
    """Indices of the group's pairs."""
    stage: int
    is_last_stage: bool
    """Whether it is the group's last stage, whose LoRA is the group's result."""
    loss: Loss
    start: int
    """Steps of the whole training before it."""
    stop: int
    """Steps of the whole training when it is over."""
    group_start: int
    """Steps of the whole training before its group's first phase."""
    echo: int
    """How many steps use each of its batches."""
    batch_size: int
    companion: Companion | None = None
    """What learns beside the stage."""

    @property
    def steps(self) -> int:
        """How many it has."""
        return self.stop - self.start

    @property
    def batches(self) -> int:
        """How many different batches it uses."""
        return math.ceil(self.steps / self.echo)

    def cycle(self, step: int) -> range:
        """The steps, ``step`` among them, that go through the same batches, ``echo`` times through all of them.

        A cycle is long, so that a batch comes again when others have been learned from, and holds every pair. It ends, so
        that the teacher's predictions for its batches take the same memory in a training of any length.
        """
        if self.echo == 1:
            return range(self.start + 1, self.stop + 1)
        cycles = max(1, self.batches // max(_CYCLE, math.ceil(len(self.pairs) / self.batch_size)))
        slot = (step - 1 - self.start) // self.echo
        # Cycle i has batches floor(b i / c) to floor(b (i + 1) / c), so it is that of a slot if b i < c (slot + 1).
        cycle = (cycles * (slot + 1) - 1) // self.batches
        first, end = (self.echo * (self.batches * number // cycles) + self.start + 1 for number in (cycle, cycle + 1))
        return range(first, min(end, self.stop + 1))

    def batch_index(self, step: int) -> int:
        """Index of the batch that a step uses, counted from the group's first.

        With data echoing, a cycle goes through all of its batches before any comes again. Every stage has new batches, so
        indices of stages do not overlap.
        """
        cycle = self.cycle(step)
        before = (cycle.start - 1 - self.start) // self.echo
        return self.start - self.group_start + before + (step - cycle.start) % math.ceil(len(cycle) / self.echo)


def split_into_phases(plan: TrainingPlan, config: TrainingConfig) -> Sequence[Phase]:
    """Divide all steps among groups and their stages, by the stages' shares, in whole steps.

    Raises:
        InvalidValueError: if a phase would get no step.
    """
    # Cumulative shares are rounded, not the shares: each phase is at most one step off its share, and they add up to
    # ``steps``. Python rounds a half to the even number.
    shares = [stage.share for _ in plan.groups for stage in plan.stages]
    total = math.fsum(shares)
    boundaries = [0, *(round(config.steps * cumulative / total) for cumulative in accumulate(shares))]
    if any(start == stop for start, stop in pairwise(boundaries)):
        raise InvalidValueError(
            f"steps={config.steps} are too few for {config.objective}: {len(plan.groups)} group(s) of pairs with "
            f"{len(plan.stages)} stage(s) each need at least one step a stage. Give it more steps, or fewer pairs."
        )
    stages = len(plan.stages)
    return [
        Phase(
            group=index // stages,
            pairs=plan.groups[index // stages],
            stage=index % stages,
            is_last_stage=index % stages == stages - 1,
            loss=plan.stages[index % stages].loss,
            start=start,
            stop=stop,
            group_start=boundaries[index - index % stages],
            echo=_echo(config, steps=stop - start, pairs=len(plan.groups[index // stages])),
            batch_size=config.batch_size,
            companion=plan.stages[index % stages].companion,
        )
        for index, (start, stop) in enumerate(pairwise(boundaries))
    ]


def _echo(config: TrainingConfig, *, steps: int, pairs: int) -> int:
    """How many steps of a phase use each batch; by default not so many that some pairs are in none."""
    if config.echo is not None:
        return config.echo
    batches_of_all = math.ceil(pairs / config.batch_size)
    return max(1, min(config.objective.recommended_echo, steps // batches_of_all))
