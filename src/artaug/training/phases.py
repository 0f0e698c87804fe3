"""A course as a row of legs: each one run of the optimizer, over one group of pairs, for so many steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from artaug.errors import InvalidValueError
from artaug.training.objectives import Loss, Objective, TrainingPlan


@dataclass(frozen=True)
class Phase:
    """One stage of one group of pairs."""

    group: int
    members: tuple[int, ...]
    """Numbers of the pairs."""
    stage: int
    last: bool
    """Whether it is the group's last stage, whose LoRA is the group's result."""
    loss: Loss
    begins: int
    """Steps of the whole training before it."""
    ends: int
    group_begins: int
    """Steps of the whole training before its group's first leg."""

    @property
    def steps(self) -> int:
        """How many it has."""
        return self.ends - self.begins

    def batch_at(self, step: int, *, echo: int) -> int:
        """Number of the batch that a step sees, counted from the group's first; each comes ``echo`` times, in rounds."""
        distinct = math.ceil(self.steps / echo)
        return self.begins - self.group_begins + (step - 1 - self.begins) % distinct


def split_into_phases(training_plan: TrainingPlan, steps: int, objective: Objective) -> Sequence[Phase]:
    """Share all steps among groups and their stages, whole steps each; they add up to ``steps``.

    Raises:
        InvalidValueError: if someone would get none.
    """
    shares = [stage.share for _ in training_plan.groups for stage in training_plan.stages]
    whole = math.fsum(shares)
    marks = [0, *(round(steps * end / whole) for end in accumulate(shares))]
    if any(begin == end for begin, end in pairwise(marks)):
        raise InvalidValueError(
            f"steps={steps} are too few for {objective}: {len(training_plan.groups)} group(s) of pairs with "
            f"{len(training_plan.stages)} stage(s) each need at least one step a stage. Give it more steps, or fewer pairs."
        )
    width = len(training_plan.stages)
    return [
        Phase(
            group=place // width,
            members=training_plan.groups[place // width],
            stage=place % width,
            last=place % width == width - 1,
            loss=training_plan.stages[place % width].loss,
            begins=begin,
            ends=end,
            group_begins=marks[place - place % width],
        )
        for place, (begin, end) in enumerate(pairwise(marks))
    ]
