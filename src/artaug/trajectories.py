"""Trajectories: how a picture came about in turns, each with a thought, a plan, a picture and what a critic said of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug._internal.arguments import argument_error, check_argument, check_finite_number, check_items
from artaug._internal.images import preview_html
from artaug._internal.text import short_html, shorten
from artaug.critique import Abstention, Critique
from artaug.errors import InvalidValueError
from artaug.filtering import PairFilter, judge_pairs
from artaug.image_files import ImageFile, PictureField
from artaug.images.html import contact_sheet
from artaug.pairs import Attempt, Dropped, ImagePair, Kept, Skipped
from artaug.plan import Plan

TurnContrast: TypeAlias = Literal["first-last", "first-best", "each-next"]
"""Which turns of a trajectory make pairs: the first against the last, or against the best, or each against the next."""


@checked
@dataclass(frozen=True, kw_only=True)
class Thought:
    """What is thought of a prompt before its first picture, and the plan that comes of it.

    >>> import artaug as aa
    >>> aa.Thought(text="Night, so the cone has to glow.", plan=aa.Plan("a glowing red cone at night")).plan.prompt
    'a glowing red cone at night'
    """

    text: str
    plan: Plan

    def __post_init__(self) -> None:
        check_argument("Thought", "text", self.text, str)
        check_argument("Thought", "plan", self.plan, Plan)


Think: TypeAlias = Callable[[str], Thought]
"""From a prompt to a thought; such as a language model that is asked for a better prompt, or for a layout."""


@checked
@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """One turn: what was thought, what was planned, what was drawn, and what was said of it.

    Raises:
        InvalidValueError: for a field of another type.
    """

    plan: Plan
    """What the picture was drawn from."""
    image: Image
    """A PIL image, or an `ImageFile`, which is read whenever it is looked at."""
    thought: str = ""
    """What was thought before it was drawn; empty where the critique of the turn before is all."""
    critique: Critique | Abstention | None = None
    """What the critic said of the picture; None if it was not asked."""
    score: float | None = None
    """Of the picture, by the scorer of the `TurnRule`; None without one."""

    if not TYPE_CHECKING:  # to which it is a plain picture
        image = PictureField()

    def __init__(
        self,
        *,
        plan: Plan,
        image: Image | ImageFile,
        thought: str = "",
        critique: Critique | Abstention | None = None,
        score: float | None = None,
    ) -> None:
        check_argument("Turn", "plan", plan, Plan)
        if not isinstance(image, ImageFile):
            check_argument("Turn", "image", image, Image)
        check_argument("Turn", "thought", thought, str)
        if critique is not None and not isinstance(critique, Critique | Abstention):
            raise argument_error(
                "Turn", "critique", critique, expected="an artaug.Critique, an artaug.Abstention or None"
            )
        if score is not None:
            check_finite_number("Turn", "score", score)
        vars(self).update(plan=plan, image=image, thought=thought, critique=critique, score=score)

    @property
    def reference(self) -> Image | ImageFile:
        """The picture as the turn holds it: no file is read."""
        held: Image | ImageFile = vars(self)["image"]
        return held

    def __repr__(self) -> str:
        """The prompt, the number of regions, and the score, on one line. No file is read."""
        score = "" if self.score is None else f", score {self.score:.3g}"
        return f"Turn({shorten(self.plan.prompt, 80)!r}, {len(self.plan.regions)} regions{score})"


@checked
@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """The turns of one prompt, from the first picture on; what `refine` returns.

    A notebook shows it as a strip of its pictures, with what was planned and said below each.

    Raises:
        InvalidValueError: without turns, or for a field of another type.

    >>> import artaug as aa
    >>> from PIL import Image
    >>> grey, red = (aa.Turn(plan=aa.Plan(text), image=Image.new("RGB", (8, 8), text)) for text in ("grey", "red"))
    >>> (pair,) = aa.Trajectory(prompt="a rose", turns=(grey, red)).pairs()
    >>> pair.plan.prompt
    'red'
    """

    prompt: str
    """What was to be drawn."""
    turns: tuple[Turn, ...]
    """At least one, in their order."""
    seed: int | None = None
    """What all of them were drawn with; None if that is not known, as of pictures of others."""
    stop_reason: str = ""
    """Why there was no further turn, in words."""

    def __post_init__(self) -> None:
        check_argument("Trajectory", "prompt", self.prompt, str)
        check_items("Trajectory", "turns", self.turns, Turn)
        check_argument("Trajectory", "seed", self.seed, Integral, optional=True)
        check_argument("Trajectory", "stop_reason", self.stop_reason, str)
        object.__setattr__(self, "turns", tuple(self.turns))  # a list, too
        if not self.turns:
            raise InvalidValueError(f"the Trajectory of {self.prompt!r} has no turns: need the first picture at least.")

    @property
    def best(self) -> Turn:
        """The turn with the highest score, of equals the first; the last turn if not all of them have a score."""
        scores = [turn.score for turn in self.turns if turn.score is not None]
        return self.turns[scores.index(max(scores)) if len(scores) == len(self.turns) else -1]

    @property
    def image(self) -> Image:
        """The picture of the best turn."""
        return self.best.image

    def pairs(self, contrast: TurnContrast = "first-last") -> list[ImagePair]:
        """Pairs to learn from, each with the prompt, the later turn's plan, and the seed.

        Args:
            contrast: ``"first-last"``; ``"first-best"``, which leaves out turns that made it worse; or ``"each-next"``, where
                *before* is what the turn before was drawn as. Two turns make one pair in each.

        Returns:
            No pair of a trajectory of one turn, and none where the best turn is the first one.

        Raises:
            InvalidValueError: for another contrast, or if two pictures differ in size.
        """
        if contrast not in get_args(TurnContrast):
            expected = f"one of {', '.join(map(repr, get_args(TurnContrast)))}"
            raise argument_error("Trajectory.pairs", "contrast", contrast, expected=expected)
        first, last = self.turns[0], self.best if contrast == "first-best" else self.turns[-1]
        steps = list(zip(self.turns, self.turns[1:], strict=False)) if contrast == "each-next" else [(first, last)]
        return [
            ImagePair(prompt=self.prompt, seed=self.seed, before=one.reference, after=other.reference, plan=other.plan)
            for one, other in steps
            if one is not other
        ]

    def attempts(self, keep: PairFilter, contrast: TurnContrast = "first-last") -> list[Attempt]:
        """The pairs, judged, as a run has them: `Kept` or `Dropped`, or one `Skipped` with the reason if there is no pair.

        Args:
            keep: decides which pairs got better. One that compares pairs, such as `TopFraction`, sees those of this trajectory alone.
            contrast: see `pairs`.

        Raises:
            InvalidValueError: as `pairs`; for a trajectory with neither a pair nor a seed.
            ContractError: if the filter returned something that its seam does not allow.
        """
        check_argument("Trajectory.attempts", "keep", keep, PairFilter)
        pairs = self.pairs(contrast)
        if not pairs:
            reason = self.stop_reason or "there is no second turn"
            if len(self.turns) > 1:
                reason = "no turn is better than the first one"
            stage: Literal["critique", "plan"] = "plan" if isinstance(self.turns[0].critique, Critique) else "critique"
            if self.seed is None:
                raise InvalidValueError(
                    f"the Trajectory of {self.prompt!r} has no pair and no seed, and an attempt needs one of them: give it a seed."
                )
            return [Skipped(self.prompt, self.seed, reason, stage)]
        verdicts = judge_pairs(keep, pairs)
        return [(Kept if one.keep else Dropped)(pair, one) for pair, one in zip(pairs, verdicts, strict=True)]

    def strip(self, *, scale: int = 3) -> Image:
        """The pictures side by side, each with the number of its turn and its score.

        Args:
            scale: factor of the enlargement, at least 1.

        Raises:
            InvalidValueError: if the pictures differ in size.
        """
        return contact_sheet([turn.image for turn in self.turns], labels=self._captions(), scale=scale)

    def _captions(self) -> list[str]:
        return [
            f"turn {number}" + ("" if turn.score is None else f", {turn.score:.3g}")
            for number, turn in enumerate(self.turns, start=1)
        ]

    def __repr__(self) -> str:
        """Prompt, seed, number of turns, and why it ended, on one line. No file is read."""
        ended = f", {self.stop_reason!r}" if self.stop_reason else ""
        return (
            f"Trajectory({shorten(self.prompt, 80)!r}, seed={self.seed}, {len(self.turns)} turns{shorten(ended, 120)})"
        )

    def _repr_html_(self) -> str:
        """A strip of pictures, with what was thought, planned and said of each, for notebooks."""
        figures = "".join(
            "<figure style='display:inline-block;vertical-align:top;margin:4px;max-width:256px'>"
            f"{preview_html(turn.image, alt=caption)}"
            f"<figcaption><b>{caption}</b>{' (best)' * (turn is self.best)}{_notes(turn)}</figcaption></figure>"
            for turn, caption in zip(self.turns, self._captions(), strict=True)
        )
        ended = f"<p><small>{short_html(self.stop_reason)}</small></p>" if self.stop_reason else ""
        return f"<p>{short_html(self.prompt)}</p>{figures}{ended}"


def _notes(turn: Turn) -> str:
    """What was thought and planned before a picture, and said of it, in small print."""
    lines: Sequence[tuple[str, str]] = (
        ("thought", turn.thought),
        ("drawn from", "; ".join([turn.plan.prompt, *(region.prompt for region in turn.plan.regions)])),
        ("starts from", "" if turn.plan.canvas is None else f"pictures, {turn.plan.canvas!r}"),
        ("critique", _remarks(turn.critique)),
    )
    return "".join(f"<br><small>{name}: {short_html(text)}</small>" for name, text in lines if text)


def _remarks(critique: Critique | Abstention | None) -> str:
    if isinstance(critique, Abstention):
        return f"abstained, {critique.reason}"
    if critique is None:
        return ""
    return "; ".join([*([critique.summary] if critique.summary else []), *(one.prompt for one in critique.suggestions)])
