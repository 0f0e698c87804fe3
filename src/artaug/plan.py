"""What to draw: a prompt, the regions that have prompts of their own, and how critiques become plans."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from artaug.critique import Critique, Suggestion
from artaug.errors import InvalidValueError
from artaug.geometry import Box, Mask
from artaug.values import value


@value
class Region:
    """A part of the picture that has a prompt of its own.

    Raises:
        InvalidValueError: if the prompt is blank, the weight not positive or the feather outside [0, 1].

    >>> import artaug as aa
    >>> aa.Region(aa.Box(0, 0, 0.5, 1), "a brightly lit window", feather=0.05).weight
    1.0
    """

    area: Box | Mask
    """The part of the picture."""
    prompt: str
    """What is to be seen in it."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """How strongly the region's prompt counts against the plan's own, which has weight 1."""
    feather: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Softness of the edge: standard deviation of a Gaussian, as a fraction of the picture's shorter side."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InvalidValueError(f"a Region needs a prompt that says what is in it, received {self!r}.")


@value
class Plan:
    """Everything needed to draw one picture. A plan without regions is a plain picture.

    >>> import artaug as aa
    >>> aa.Plan("a harbour at dawn")
    Plan(prompt='a harbour at dawn', regions=())
    """

    prompt: str
    """Governs the whole picture."""
    regions: tuple[Region, ...] = ()
    """Parts with prompts of their own."""


class RegionPlanner(ABC):
    """Turns a critique into a plan. A prompt rewriter is a planner whose plans have no regions."""

    @abstractmethod
    def plan(self, prompt: str, critique: Critique) -> Plan:
        """Make the plan for drawing ``prompt`` again. A plan that changes nothing means: leave this picture alone."""


@dataclass(frozen=True, kw_only=True)
class GreedyPlanner(RegionPlanner):
    """Takes suggestions in the critic's order, leaving out those that repeat a place already taken.

    >>> import artaug as aa
    >>> left, right = aa.Box(0, 0, 0.5, 1), aa.Box(0.5, 0, 1, 1)
    >>> critique = aa.Critique((aa.Suggestion(left, "a"), aa.Suggestion(left, "b"), aa.Suggestion(right, "c")))
    >>> [region.prompt for region in aa.GreedyPlanner(max_regions=2).plan("two doors", critique).regions]
    ['a', 'c']
    """

    max_regions: int = 4
    """At most this many regions, since each costs time (with `OutputMix` a whole forward pass a step)."""
    max_iou: float = 0.5
    """A suggestion is left out if its box overlaps one already taken by more than this, in [0, 1]."""
    min_area: float = 0.01
    """A suggestion is left out if its box is a smaller fraction of the picture than this."""
    weight: float = 1.0
    """Weight of every region."""
    feather: float = 0.0
    """Feather of every region."""

    def __post_init__(self) -> None:
        if self.max_regions < 1:
            raise InvalidValueError(
                f"GreedyPlanner(max_regions={self.max_regions}) could plan nothing: need at least 1."
            )
        if self.weight <= 0 or not all(0 <= share <= 1 for share in (self.max_iou, self.min_area, self.feather)):
            raise InvalidValueError(
                f"{self!r} could plan no region: need weight > 0, and max_iou, min_area and feather in [0, 1]."
            )

    def plan(self, prompt: str, critique: Critique) -> Plan:
        taken: list[Suggestion] = []
        for suggestion in critique.suggestions:
            fresh = all(suggestion.box.iou(earlier.box) <= self.max_iou for earlier in taken)
            if fresh and suggestion.box.area >= self.min_area and len(taken) < self.max_regions:
                taken.append(suggestion)
        regions = (Region(one.box, one.prompt, weight=self.weight, feather=self.feather) for one in taken)
        return Plan(prompt, tuple(regions))
