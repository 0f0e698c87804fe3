"""Pairs of pictures, verdicts on them, and the three ways in which a prompt of a run ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeAlias

from PIL.Image import Image
from pydantic import Field

from artaug._internal.annotations import checked
from artaug._internal.arguments import argument_error, check_argument
from artaug._internal.digests import digest
from artaug._internal.images import preview_html
from artaug._internal.text import short_html, short_repr, shorten
from artaug._internal.values import value
from artaug.errors import InvalidValueError
from artaug.image_files import ImageFile, ImageFolder, PictureField, image_digest
from artaug.plan import Plan, plan_digest


@checked
@dataclass(frozen=True, kw_only=True, eq=False)
class ImagePair:
    """Two pictures of one prompt, before and after a critique, or a better and a worse one of any origin.

    Each is a PIL image, or an `ImageFile`: then the attribute reads the file whenever it is looked at, and keeps nothing,
    so that many pairs fit into memory. ``dataclasses.replace`` looks at both.

    Raises:
        InvalidValueError: for a field of another type, a reward outside [0, 1], or if the two pictures differ in size, since
            their pixels then do not correspond.
    """

    prompt: str
    seed: int | None = None
    """What the pictures were drawn with; None if that is not known, as of pictures of others."""
    before: Image
    """Drawn from the prompt alone."""
    after: Image
    """Drawn from the plan, with the same seed."""
    plan: Plan
    """What ``after`` was drawn from. Without one, ``Plan(prompt)``, which has no regions."""
    rewards: tuple[float, float] | None = None
    """How good before and after are, in [0, 1], if that is known. `NegativeAware` learns from it, and *after* need not be the
    better one then. To an objective that reads rewards, a pair without any is ``(0, 1)``."""

    if not TYPE_CHECKING:  # to which the two are plain pictures
        before, after = PictureField(), PictureField()

    def __init__(
        self,
        *,
        prompt: str,
        before: Image | ImageFile,
        after: Image | ImageFile,
        seed: int | None = None,
        plan: Plan | None = None,
        rewards: tuple[float, float] | None = None,
    ) -> None:
        check_argument("ImagePair", "prompt", prompt, str)
        check_argument("ImagePair", "seed", seed, Integral, optional=True)
        check_argument("ImagePair", "plan", plan, Plan, optional=True)
        for name, picture in (("before", before), ("after", after)):
            if not isinstance(picture, ImageFile):
                check_argument("ImagePair", name, picture, Image)
        if before.size != after.size:
            raise InvalidValueError(
                f"the two pictures of {prompt!r} differ in size: before {before.size}, "
                f"after {after.size}. A pair needs two pictures of one size."
            )
        vars(self).update(
            prompt=prompt,
            seed=seed,
            before=before,
            after=after,
            plan=Plan(prompt) if plan is None else plan,
            rewards=_checked_rewards(rewards),
        )

    @classmethod
    def unchanged(cls, image: Image | ImageFile, *, prompt: str, seed: int | None = None) -> Self:
        """A pair in which nothing changed: among others, it keeps the model's predictions for the prompt as they are.

        In `PairedDifference` such a pair is exactly a prior-preservation term: its target is the prediction of the frozen
        model, which the student already makes at the start, where the loss of the pair is 0. The more of these pairs,
        the stronger the term.

        Args:
            image: what the model draws of the prompt, and should continue to draw.
            prompt: the prompt.
            seed: the seed it was drawn with, if it is known.

        >>> from PIL import Image
        >>> import artaug as aa
        >>> pair = aa.ImagePair.unchanged(Image.new("RGB", (64, 64)), prompt="a red cone", seed=0)
        >>> pair.before is pair.after, pair.plan.regions
        (True, ())
        """
        return cls(prompt=prompt, seed=seed, before=image, after=image)

    @property
    def references(self) -> tuple[Image | ImageFile, Image | ImageFile]:
        """Before and after as the pair holds them: no file is read."""
        held = vars(self)
        return held["before"], held["after"]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of both pictures, in pixels. No file is read."""
        return self.references[0].size

    def stored_in(self, folder: ImageFolder) -> Self:
        """This pair, with both pictures in the folder and no longer in memory; see `ImageFolder.add_all`.

        Raises:
            StorageError: if they cannot be written.

        >>> import tempfile
        >>> from PIL import Image
        >>> import artaug as aa
        >>> pair = aa.ImagePair.unchanged(Image.new("RGB", (64, 64)), prompt="a red cone", seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     stored = pair.stored_in(aa.ImageFolder(folder))
        ...     stored == pair, [type(picture).__name__ for picture in stored.references]
        (True, ['ImageFile', 'ImageFile'])
        """
        return self.holding(*folder.add_all(self.references))

    def holding(self, before: Image | ImageFile, after: Image | ImageFile) -> Self:
        """This pair with other pictures; unlike ``dataclasses.replace``, it reads no file.

        Raises:
            InvalidValueError: for what are no pictures of one size.
        """
        return type(self)(
            prompt=self.prompt, seed=self.seed, before=before, after=after, plan=self.plan, rewards=self.rewards
        )

    def __eq__(self, other: object) -> bool:
        """Whether prompt, seed, plan, rewards and the pixels are the same; of files whose digests are known, none is read."""
        if not isinstance(other, ImagePair):
            return NotImplemented
        if (self.prompt, self.seed, self.plan, self.rewards) != (other.prompt, other.seed, other.plan, other.rewards):
            return False
        return pair_digest(self) == pair_digest(other)

    def __hash__(self) -> int:
        return hash((self.prompt, self.seed))

    def __repr__(self) -> str:
        """Prompt, seed, size, number of regions and rewards, if there are any, on one line. No file is read."""
        width, height = self.size
        rewards = "" if self.rewards is None else ", rewards {:.3g} and {:.3g}".format(*self.rewards)
        return (
            f"ImagePair({shorten(self.prompt, 80)!r}, seed={self.seed}, {width} x {height} pixels, "
            f"{len(self.plan.regions)} regions{', from a canvas' if self.plan.canvas else ''}{rewards})"
        )

    def _repr_html_(self) -> str:
        """Both pictures side by side, for notebooks."""
        texts = [region.prompt for region in self.plan.regions]
        texts += [] if self.plan.canvas is None else [f"from {self.plan.canvas!r}"]
        regions = short_html("; ".join(texts))
        rewards = ("", "") if self.rewards is None else [f", reward {reward:.3g}" for reward in self.rewards]
        pictures = "".join(
            f"<figure style='display:inline-block;margin:4px'>{preview_html(image, alt=side)}"
            f"<figcaption>{side}{reward}</figcaption></figure>"
            for side, image, reward in zip(("before", "after"), (self.before, self.after), rewards, strict=True)
        )
        return f"<p>{short_html(self.prompt)}<br><small>{regions}</small></p>{pictures}"


def _checked_rewards(rewards: object) -> tuple[float, float] | None:
    """Rewards as two plain numbers."""
    if rewards is None:
        return None
    numbers = list(rewards) if isinstance(rewards, Sequence) and not isinstance(rewards, str | bytes) else []
    are_numbers = all(isinstance(number, Real) and not isinstance(number, bool) for number in numbers)
    if len(numbers) != 2 or not are_numbers or not all(0 <= float(number) <= 1 for number in numbers):
        expected = "two numbers in [0, 1], how good before and after are"
        raise argument_error("ImagePair", "rewards", rewards, expected=expected, advice="Such as (0.2, 0.9).")
    return float(numbers[0]), float(numbers[1])


def pair_digest(pair: ImagePair, *, include_plan: bool = False, include_rewards: bool = False) -> str:
    """SHA-256 of what a pair shows, as 64 hexadecimal digits: its prompt and the RGB pixels of both pictures.

    The same pictures of the same prompt have the same digest after a round trip through a file without loss, in another
    run, and whatever the seed was. A file whose digest is known is not read.

    Args:
        pair: the pair.
        include_plan: count the plan too, for uses that depend on its regions or its canvas.
        include_rewards: count the rewards too, if there are any, for uses that learn from them.

    Raises:
        InvalidValueError: for a picture that has no RGB pixels (32-bit modes ``I`` and ``F``).
    """
    before, after = pair.references
    first = image_digest(before)
    second = first if after is before else image_digest(after)
    rewards = [] if pair.rewards is None else [f"rewards {pair.rewards}"]
    return digest(
        pair.prompt,
        first,
        second,
        *([plan_digest(pair.plan)] if include_plan else []),
        *(rewards if include_rewards else []),
    )


@value
class Verdict:
    """Whether a pair is kept, why, and the numbers behind the decision."""

    keep: bool
    reason: str
    scores: dict[str, Annotated[float, Field(allow_inf_nan=False)]]
    """By name, every number that was considered: ``{"Exposure gain": 0.21, ...}``."""

    __repr__ = short_repr


@checked
@dataclass(frozen=True)
class Kept:
    """A pair that got better, to train on."""

    pair: ImagePair
    verdict: Verdict

    __repr__ = short_repr

    def _repr_html_(self) -> str:
        return _judged_html("kept", self.pair, self.verdict)


@checked
@dataclass(frozen=True)
class Dropped:
    """A pair that the filter did not keep."""

    pair: ImagePair
    verdict: Verdict

    __repr__ = short_repr

    def _repr_html_(self) -> str:
        return _judged_html("dropped", self.pair, self.verdict)


def _judged_html(how: str, pair: ImagePair, verdict: Verdict) -> str:
    """A pair and the verdict on it, for notebooks."""
    return f"{pair._repr_html_()}<p><b>{how}</b>: {short_html(verdict.reason)}</p>"


@checked
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

    __repr__ = short_repr


SKIPPING_STAGES: tuple[str, ...] = ("draw", "critique", "plan")
"""The stages a prompt can be skipped at, in their order."""

Attempt: TypeAlias = Kept | Dropped | Skipped
"""How one prompt of a run ended. Every prompt ends as exactly one, with a reason."""
