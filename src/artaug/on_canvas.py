"""The planner whose plans start from the picture before, in place of noise alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
from PIL import Image

from artaug._internal.annotations import checked
from artaug._internal.arguments import check_argument
from artaug.canvas import Canvas
from artaug.critique import Critique
from artaug.errors import InvalidValueError
from artaug.geometry import Box, Mask
from artaug.plan import Plan, Region, RegionPlanner


@checked
@final
@dataclass(frozen=True)
class OnCanvas(RegionPlanner):
    """Puts the picture before on the canvas of another planner's plans, so that it is changed and not drawn anew.

    A plan that changes nothing stays as it is. A plan that has a canvas already keeps it.

    Raises:
        InvalidValueError: if the planner is none, or for a strength that a `Canvas` refuses.

    >>> import artaug as aa
    >>> from PIL import Image
    >>> planner = aa.OnCanvas(aa.GreedyPlanner(), strength=0.6, masked=True)
    >>> critique = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a brightly lit window"),))
    >>> planner.plan_from(Image.new("RGB", (64, 64)), "a kitchen", critique).canvas
    Canvas(64 x 64 pixels b6db7114, mask=Box(left=0.0, top=0.0, right=0.5, bottom=1.0), strength=0.6)
    """

    planner: RegionPlanner
    """Makes the plans."""
    strength: float | None = None
    """See `artaug.Canvas.strength`: needed for all but editing models."""
    masked: bool = False
    """Whether only the plan's regions are drawn anew; a plan without regions then has no canvas."""

    def __post_init__(self) -> None:
        check_argument("OnCanvas", "planner", self.planner, RegionPlanner)
        Canvas(Image.new("RGB", (1, 1)), strength=self.strength)

    @property
    def makes_regions(self) -> bool:
        return self.planner.makes_regions

    def canvas_over(self, image: Image.Image) -> Canvas:
        """The canvas of a plan, with the whole picture as mask where it has one."""
        return Canvas(image, mask=Box(0, 0, 1, 1) if self.masked else None, strength=self.strength)

    def plan(self, prompt: str, critique: Critique) -> Plan:
        """There is no plan without the picture.

        Raises:
            InvalidValueError: always; `plan_from` gets the picture.
        """
        raise InvalidValueError(
            "OnCanvas.plan has no picture to start from. Call plan_from(image, prompt, critique), as a run does."
        )

    def plan_from(self, image: Image.Image, prompt: str, critique: Critique) -> Plan:
        plan = self.planner.plan_from(image, prompt, critique)
        if plan == Plan(prompt) or plan.canvas is not None or (self.masked and not plan.regions):
            return plan
        mask = _union(plan.regions, image.size) if self.masked else None
        return replace(plan, canvas=Canvas(image, mask=mask, strength=self.strength))


def _union(regions: Sequence[Region], size: tuple[int, int]) -> Box | Mask:
    """The area of all regions; their weights and feathers do not count."""
    if len(regions) == 1:
        return regions[0].area
    width, height = size
    weights = np.zeros((height, width), np.float32)
    for region in regions:
        if isinstance(region.area, Box):
            left, top, right, bottom = region.area.to_pixels(size)
            weights[top:bottom, left:right] = 1
        else:
            stretched = Image.fromarray(region.area.to_array()).resize(size, Image.Resampling.BOX)
            weights = np.maximum(weights, np.asarray(stretched))
    return Mask.from_array(weights)
