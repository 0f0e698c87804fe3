"""What to draw: a prompt and regions with prompts of their own; and planners, which make plans of critiques."""

import io
from abc import abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Annotated, Self, final

from PIL import Image
from pydantic import Field

from artaug._internal.annotations import Seam, checked
from artaug._internal.arguments import check_count, check_finite_number
from artaug._internal.calls import call_part
from artaug._internal.contracts import check_result
from artaug._internal.digests import digest
from artaug._internal.images import as_rgb
from artaug._internal.text import short_repr
from artaug._internal.values import to_json, value
from artaug.canvas import Canvas
from artaug.critique import Critique, Suggestion
from artaug.drawing import Area, draw_areas
from artaug.errors import InvalidValueError
from artaug.geometry import Box, Mask
from artaug.identity import identity_of
from artaug.image_files import ImageFile, ImageFolder

_PREVIEW_PX = 512
_GREY, _GREY_PX = "#808080", 320


@value
class Region:
    """A part of the picture that has a prompt of its own.

    Raises:
        InvalidValueError: if the prompt is blank, the weight not positive or the feather outside [0, 1].

    >>> import artaug as aa
    >>> aa.Region(aa.Box(0, 0, 0.5, 1), "a brightly lit window", feather=0.05).weight
    1.0
    """

    area: Annotated[Box | Mask, Field(union_mode="left_to_right")]
    """The part of the picture."""
    prompt: str
    """What is in it."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """How strongly the region's prompt counts against the plan's own, which has weight 1."""
    feather: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Softness of the edge: standard deviation of a Gaussian, as a fraction of the picture's shorter side."""
    negative_prompt: str | None = None
    """What is not to be in it; needs a synthesizer that draws with classifier-free guidance."""
    lora: str | None = None
    """A LoRA that applies in it alone, by its name in ``loras`` of `OutputMix` or `RegionalAttention`."""
    reference: Annotated[int, Field(ge=0)] | None = None
    """A reference of the plan's canvas that shows in it, and not elsewhere: its number, from 0. Regions may share one."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InvalidValueError(f"a Region needs a prompt that says what is in it, received {self!r}.")


@value
class Plan:
    """Everything needed to draw one picture. A plan without regions is a plain picture.

    >>> import artaug as aa
    >>> aa.Plan("a harbour at dawn")
    Plan(prompt='a harbour at dawn')
    """

    prompt: str
    """Of the whole picture."""
    regions: tuple[Region, ...] = ()
    """Parts with prompts of their own."""
    canvas: Canvas | None = None
    """Pictures that it is drawn from; None for noise alone."""

    def __post_init__(self) -> None:
        count = 0 if self.canvas is None else len(self.canvas.references)
        for region in self.regions:
            if region.reference is not None and region.reference >= count:
                raise InvalidValueError(
                    f"{region!r} names reference {region.reference}, and the canvas of the plan of {self.prompt!r} has {count}. "
                    "References count from 0: Plan(..., canvas=artaug.Canvas(references=[picture]))."
                )

    __repr__ = short_repr

    def stored_in(self, folder: ImageFolder) -> Self:
        """This plan, with the pictures of its canvas in the folder and no longer in memory; see `Canvas.stored_in`.

        Raises:
            StorageError: if they cannot be written.
            InvalidValueError: for a subclass with fields of its own, which no file keeps.
        """
        check_storable(self)
        return self if self.canvas is None else replace(self, canvas=self.canvas.stored_in(folder))

    def found_in(self, folder: ImageFolder) -> Self:
        """This plan, as it was read from JSON, with the pictures of its canvas where they are; see `Canvas.found_in`."""
        return self if self.canvas is None else replace(self, canvas=self.canvas.found_in(folder))

    def preview(self, image: Image.Image | None = None, *, size: tuple[int, int] | None = None) -> Image.Image:
        """Draw the regions, numbered, over a copy of a picture, and their prompts below it.

        A box has a frame. A mask, or a box's feathered edge, has a tint whose opacity follows the weight there.

        Args:
            image: what to draw over; None for the plan's canvas, or grey if it has none.
            size: width and height in pixels of what is drawn over; None for the picture's own, times a whole number if small.

        Raises:
            InvalidValueError: if the size is not positive.

        >>> import artaug as aa
        >>> plan = aa.Plan("a kitchen", (aa.Region(aa.Box(0, 0, 0.5, 1), "a brightly lit window"),))
        >>> plan.preview(size=(320, 200)).width
        320
        """
        if size is not None and min(size) < 1:
            raise InvalidValueError(
                f"Plan.preview(size={size}) leaves nothing to see: need at least 1 pixel in width and height."
            )
        if image is None and self.canvas is not None:
            image = self.canvas.image
        below = as_rgb(image) if image else Image.new("RGB", size or (_GREY_PX, _GREY_PX), _GREY)
        scale = max(_PREVIEW_PX // max(below.size), 1)
        enlarged = below.resize(size or (below.width * scale, below.height * scale), Image.Resampling.BICUBIC)
        areas = [Area(shape=region.area, text=_caption(region), feather=region.feather) for region in self.regions]
        if self.canvas is not None and self.canvas.mask is not None:
            areas.append(Area(shape=self.canvas.mask, text=f"drawn anew{_strength(self.canvas)}"))
        return draw_areas(enlarged, areas, heading=self.prompt)

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows; a plan without regions and canvas is shown as text."""
        if not self.regions and self.canvas is None:
            return None
        png = io.BytesIO()
        self.preview().save(png, "png")
        return png.getvalue()


def plan_digest(plan: Plan) -> str:
    """SHA-256 of all that a plan says, as 64 hexadecimal digits: the pixels of its canvas, and a subclass's own fields, too."""
    if not _own_fields(plan):
        return digest(to_json(plan))
    return digest(*(f"{name}={text}" for name, text in sorted(identity_of(plan, "plan").items())))


def check_storable(plan: Plan) -> None:
    """Refuse a plan of a subclass with fields of its own: a file would lose them without a word.

    Raises:
        InvalidValueError: naming the fields.
    """
    if lost := _own_fields(plan):
        raise InvalidValueError(
            f"the plan of {plan.prompt!r} is a {type(plan).__name__} with {', '.join(lost)}, and files keep what an artaug.Plan "
            "has. A picture to start from is its canvas, artaug.Plan(prompt, canvas=artaug.Canvas(image)); or leave the store out."
        )


def _own_fields(plan: Plan) -> list[str]:
    """The names of the fields that a subclass has and `Plan` has not."""
    shared = {field.name for field in fields(Plan)}
    return [field.name for field in fields(plan) if field.name not in shared]


def _strength(canvas: Canvas) -> str:
    return "" if canvas.strength is None else f", strength {canvas.strength:g}"


def _caption(region: Region) -> str:
    """Everything about a region but its area."""
    weight = "" if region.weight == 1 else f" (weight {region.weight:g})"
    negative = "" if region.negative_prompt is None else f"; not {region.negative_prompt}"
    lora = "" if region.lora is None else f"; LoRA {region.lora}"
    return f"{region.prompt}{weight}{negative}{lora}"


class RegionPlanner(Seam):
    """Turns a critique into a plan. A prompt rewriter is a planner whose plans have another prompt and no regions."""

    @property
    def makes_regions(self) -> bool:
        """Whether its plans may have regions, so that a run asks for a guide before it begins; False unless overridden."""
        return False

    def canvas_over(self, image: Image.Image) -> Canvas | None:
        """What its plans start from where ``image`` is the picture before, so that a run asks the synthesizer before it begins.

        None, unless overridden: its plans start from noise alone.
        """
        return None

    @abstractmethod
    def plan(self, prompt: str, critique: Critique) -> Plan:
        """Make the plan for drawing ``prompt`` again. For a plan that changes nothing, the prompt is skipped."""

    def plan_from(self, image: Image.Image, prompt: str, critique: Critique) -> Plan:
        """Make the plan where the picture before is at hand, as it is in a run.

        Override it in a planner that looks at the picture, or lets it be changed rather than drawn anew: see `Canvas`.
        """
        return self.plan(prompt, critique)


def run_planner(
    planner: RegionPlanner, prompt: str, critique: Critique, *, image: Image.Image | ImageFile | None = None
) -> Plan:
    """Make a plan and check that it is one.

    What passes by itself, such as a timeout, is tried again for ten minutes.

    Args:
        planner: whose `RegionPlanner.plan_from` is called if there is a picture, else `RegionPlanner.plan`.
        prompt: of the picture.
        critique: of it.
        image: the picture before. A file is read only if the planner overrides ``plan_from``.

    Raises:
        PartError: if the planner raised; an `ArtAugError` of its own is raised as it is, with a note.
        ContractError: if it returned something that is not a `Plan`.
    """
    owner = type(planner).__name__
    looks = image is not None and type(planner).plan_from is not RegionPlanner.plan_from

    def make() -> Plan:
        if image is None or not looks:
            return planner.plan(prompt, critique)
        return planner.plan_from(image.load() if isinstance(image, ImageFile) else image, prompt, critique)

    plan = call_part(make, owner=owner, inputs=f"the prompt {prompt!r}")
    return check_result(owner, "plan_from" if looks else "plan", plan, of=Plan, inputs=repr(prompt))


@checked
@final
@dataclass(frozen=True, kw_only=True)
class GreedyPlanner(RegionPlanner):
    """Takes suggestions in the critic's order and leaves out those that overlap one already taken.

    >>> import artaug as aa
    >>> left, right = aa.Box(0, 0, 0.5, 1), aa.Box(0.5, 0, 1, 1)
    >>> critique = aa.Critique((aa.Suggestion(left, "a"), aa.Suggestion(left, "b"), aa.Suggestion(right, "c")))
    >>> [region.prompt for region in aa.GreedyPlanner(max_regions=2).plan("two doors", critique).regions]
    ['a', 'c']
    """

    max_regions: int = 4
    """At most this many regions, since each costs time (with `OutputMix` a whole forward pass a step)."""
    max_iou: float = 0.5
    """A suggestion is left out if the IoU of its box with one already taken is above this, in [0, 1]."""
    min_area: float = 0.01
    """A suggestion is left out if its box is less than this fraction of the picture; a box of exactly this is taken."""
    weight: float = 1.0
    """Weight of every region."""
    feather: float = 0.0
    """Feather of every region."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_count("GreedyPlanner", "max_regions", self.max_regions)
        for name in ("max_iou", "min_area", "weight", "feather"):
            check_finite_number("GreedyPlanner", name, getattr(self, name))
        if self.weight <= 0 or not all(0 <= fraction <= 1 for fraction in (self.max_iou, self.min_area, self.feather)):
            raise InvalidValueError(
                f"{self!r} could plan no region: need weight > 0, and max_iou, min_area and feather in [0, 1]."
            )

    @property
    def makes_regions(self) -> bool:
        return True

    def plan(self, prompt: str, critique: Critique) -> Plan:
        selected: list[Suggestion] = []
        for suggestion in critique.suggestions:
            # Both limits are inclusive: a box of exactly min_area is taken, and so is one at exactly max_iou.
            overlaps = any(suggestion.box.iou(earlier.box) > self.max_iou for earlier in selected)
            if not overlaps and suggestion.box.area >= self.min_area and len(selected) < self.max_regions:
                selected.append(suggestion)
        regions = (
            Region(suggestion.box, suggestion.prompt, weight=self.weight, feather=self.feather)
            for suggestion in selected
        )
        return Plan(prompt, tuple(regions))
