"""Pairs of pictures, verdicts on them, and the three ways in which a prompt of a run ends."""

from dataclasses import dataclass
from typing import Annotated, Literal, Self, TypeAlias

from PIL.Image import Image
from pydantic import Field

from artaug._internal.digests import digest
from artaug._internal.images import rgb_parts
from artaug._internal.values import to_json, value
from artaug.errors import InvalidValueError
from artaug.plan import Plan


@dataclass(frozen=True, kw_only=True)
class ImagePair:
    """The pictures of one prompt and seed, before and after a critique.

    Raises:
        InvalidValueError: if the two pictures differ in size, since their pixels then do not correspond.
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

    def __post_init__(self) -> None:
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


@dataclass(frozen=True)
class Dropped:
    """A pair that the filter did not keep."""

    pair: ImagePair
    verdict: Verdict


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
