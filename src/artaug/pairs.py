"""Pairs of pictures, verdicts on them, and the three ways in which a prompt of a run ends."""

from dataclasses import dataclass
from html import escape
from typing import Annotated, Literal, Self, TypeAlias

from PIL.Image import Image
from pydantic import Field

from artaug._internal.arguments import check_argument
from artaug._internal.digests import digest
from artaug._internal.images import preview_url, rgb_parts
from artaug._internal.text import shorten
from artaug._internal.values import to_json, value
from artaug.errors import InvalidValueError
from artaug.plan import Plan


@dataclass(frozen=True, kw_only=True)
class ImagePair:
    """The pictures of one prompt and seed, before and after a critique.

    Raises:
        InvalidValueError: for a field of another type, or if the two pictures differ in size, since their pixels then do
            not correspond.
    """

    prompt: str
    seed: int
    before: Image
    """Drawn from the prompt alone."""
    after: Image
    """Drawn from the plan, with the same seed."""
    plan: Plan
    """What ``after`` was drawn from."""

    @classmethod
    def unchanged(cls, image: Image, *, prompt: str, seed: int) -> Self:
        """A pair in which nothing changed: among others, it keeps the model's predictions for the prompt as they are.

        In `PairedDifference` such a pair is exactly a prior-preservation term: its target is the prediction of the frozen
        model, which the student already makes at the start, where the loss of the pair is 0. The more of these pairs,
        the stronger the term.

        Args:
            image: what the model draws of the prompt, and should continue to draw.
            prompt: the prompt.
            seed: the seed it was drawn with.

        >>> from PIL import Image
        >>> import artaug as aa
        >>> pair = aa.ImagePair.unchanged(Image.new("RGB", (64, 64)), prompt="a red cone", seed=0)
        >>> pair.before is pair.after, pair.plan.regions
        (True, ())
        """
        return cls(prompt=prompt, seed=seed, before=image, after=image, plan=Plan(prompt))

    def __repr__(self) -> str:
        """Prompt, seed, size and number of regions, on one line."""
        width, height = self.before.size
        return (
            f"ImagePair({shorten(self.prompt, 80)!r}, seed={self.seed}, {width} x {height} pixels, "
            f"{len(self.plan.regions)} regions)"
        )

    def _repr_html_(self) -> str:
        """Both pictures side by side, for notebooks."""
        regions = "; ".join(region.prompt for region in self.plan.regions)
        pictures = "".join(
            f"<figure style='display:inline-block;margin:4px'><img src='{preview_url(image)}' alt='{side}'>"
            f"<figcaption>{side}</figcaption></figure>"
            for side, image in (("before", self.before), ("after", self.after))
        )
        return f"<p>{escape(self.prompt)}<br><small>{escape(regions)}</small></p>{pictures}"

    def __post_init__(self) -> None:
        for name, of in (("prompt", str), ("before", Image), ("after", Image), ("plan", Plan)):
            check_argument("ImagePair", name, getattr(self, name), of)
        if self.before.size != self.after.size:
            raise InvalidValueError(
                f"the two pictures of {self.prompt!r} differ in size: before {self.before.size}, "
                f"after {self.after.size}. A pair needs two pictures of one size."
            )


def pair_digest(pair: ImagePair, *, include_plan: bool = False) -> str:
    """SHA-256 of what a pair shows, as 64 hexadecimal digits: its prompt and the RGB pixels of both pictures.

    The same pictures of the same prompt have the same digest after a round trip through a PNG file, in another run, and
    whatever the seed was.

    Args:
        pair: the pair.
        include_plan: count the plan too, for uses that depend on its regions.

    Raises:
        InvalidValueError: for a picture that has no RGB pixels (32-bit modes ``I`` and ``F``).
    """
    pixels = (*rgb_parts(pair.before), *rgb_parts(pair.after))
    return digest(pair.prompt, *pixels, *([to_json(pair.plan)] if include_plan else []))


@value
class Verdict:
    """Whether a pair is kept, why, and the numbers behind the decision."""

    keep: bool
    reason: str
    scores: dict[str, Annotated[float, Field(allow_inf_nan=False)]]
    """By name, every number that was considered: ``{"Exposure gain": 0.21, ...}``."""


@dataclass(frozen=True)
class Kept:
    """A pair that got better, to train on."""

    pair: ImagePair
    verdict: Verdict

    def _repr_html_(self) -> str:
        return _judged_html("kept", self.pair, self.verdict)


@dataclass(frozen=True)
class Dropped:
    """A pair that the filter did not keep."""

    pair: ImagePair
    verdict: Verdict

    def _repr_html_(self) -> str:
        return _judged_html("dropped", self.pair, self.verdict)


def _judged_html(how: str, pair: ImagePair, verdict: Verdict) -> str:
    """A pair and the verdict on it, for notebooks."""
    return f"{pair._repr_html_()}<p><b>{how}</b>: {escape(verdict.reason)}</p>"


@dataclass(frozen=True)
class Skipped:
    """A prompt without a pair: the critic abstained, or the plan changed nothing."""

    prompt: str
    seed: int
    reason: str
    stage: Literal["draw", "critique", "plan"] = "critique"
    """Where it ended: ``critique`` if the critic abstained, ``plan`` if the plan changes nothing."""
    transient: bool = False
    """Whether the critic may answer later: it, or its server, failed for a while."""


SKIPPING_STAGES: tuple[str, ...] = ("draw", "critique", "plan")
"""The stages a prompt can be skipped at, in their order."""

Attempt: TypeAlias = Kept | Dropped | Skipped
"""How one prompt of a run ended. Every prompt ends as exactly one, with a reason."""
