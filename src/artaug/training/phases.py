"""Phases: a training plan laid out over the steps, one run of the optimizer after the other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from artaug.errors import InvalidValueError
from artaug.training.objectives import Loss, Objective, TrainingPlan


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

    @property
    def steps(self) -> int:
        """How many it has."""
        return self.stop - self.start

    def batch_index(self, step: int, *, echo: int) -> int:
        """Index of the batch that a step uses, counted from the group's first.

        With data echoing, the phase draws ``ceil(steps / echo)`` batches and goes through all of them before any comes
        again. Every stage has new batches, so indices of stages do not overlap.
        """
        distinct = math.ceil(self.steps / echo)
        return self.start - self.group_start + (step - 1 - self.start) % distinct


def split_into_phases(plan: TrainingPlan, steps: int, objective: Objective) -> Sequence[Phase]:
    """Divide all steps among groups and their stages, by the stages' shares, in whole steps.

    Raises:
        InvalidValueError: if a phase would get no step.
    """
    # Cumulative shares are rounded, not the shares: each phase is at most one step off its share, and they add up to
    # ``steps``. Python rounds a half to the even number.
    shares = [stage.share for _ in plan.groups for stage in plan.stages]
    total = math.fsum(shares)
    boundaries = [0, *(round(steps * cumulative / total) for cumulative in accumulate(shares))]
    if any(start == stop for start, stop in pairwise(boundaries)):
        raise InvalidValueError(
            f"steps={steps} are too few for {objective}: {len(plan.groups)} group(s) of pairs with "
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
        )
        for index, (start, stop) in enumerate(pairwise(boundaries))
    ]
