"""When the turns of `refine` end: by a score that is good enough or no longer rises, and by what they may cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from artaug._internal.annotations import checked
from artaug._internal.arguments import argument_error, check_argument, check_count, check_finite_number
from artaug.plan import Plan
from artaug.scoring import Scorer
from artaug.trajectories import Turn


@checked
@final
@dataclass(frozen=True, kw_only=True)
class TurnRule:
    """Ends the turns of `refine` by the score of each picture.

    The score of one picture is noisy, so a gain of one turn proves nothing; of many prompts, `compare` says whether turns help.

    Raises:
        InvalidValueError: for something else than a scorer, or a number that is not finite or out of its range.

    >>> import artaug as aa
    >>> from artaug.testing import FixedScorer
    >>> aa.TurnRule(scorer=FixedScorer(0.4), enough=0.9).end([0.5, 0.4])
    'turn 2 did not raise the score of 0.5'
    """

    scorer: Scorer
    """Of every picture with its prompt."""
    enough: float | None = None
    """A picture with this score needs no further turn; None to go on as long as the score rises."""
    least_gain: float = 0.0
    """A turn counts as better only if its score is above the best one before it by more than this; at least 0."""
    patience: int = 1
    """So many turns in a row may be no better before it ends; of pictures that are, the best is kept in any case."""

    def __post_init__(self) -> None:
        check_argument("TurnRule", "scorer", self.scorer, Scorer)
        if self.enough is not None:
            check_finite_number("TurnRule", "enough", self.enough)
        check_finite_number("TurnRule", "least_gain", self.least_gain)
        if self.least_gain < 0:
            raise argument_error("TurnRule", "least_gain", self.least_gain, expected="a number of at least 0")
        check_count("TurnRule", "patience", self.patience)

    def end(self, scores: Sequence[float]) -> str:
        """Why there is no further turn after these scores, one for each turn so far; empty if there may be one."""
        if self.enough is not None and scores[-1] >= self.enough:
            return f"turn {len(scores)} is good enough: {scores[-1]:.3g}, at least {self.enough:.3g}"
        best, idle = scores[0], 0
        for score in scores[1:]:
            idle = 0 if score > best + self.least_gain else idle + 1
            best = max(best, score)
        if idle < self.patience:
            return ""
        turns = f"turn {len(scores)}" if idle == 1 else f"turns {len(scores) - idle + 1} to {len(scores)}"
        return f"{turns} did not raise the score of {best:.3g}"


@checked
@final
@dataclass(frozen=True, kw_only=True)
class Budget:
    """A cap on what the turns of one prompt cost, in any unit: seconds, cents, forward passes.

    Prices are arguments, not measured while it draws: what a run draws does not depend on how fast the machine is.

    Raises:
        InvalidValueError: for a price below 0, or one that leaves no room for the first picture.

    >>> import artaug as aa
    >>> aa.Budget(at_most=12, picture=2.5, region=1.0).price(aa.Plan("a hill"))
    2.5
    """

    at_most: float
    """What one prompt may cost."""
    picture: float = 1.0
    """The price of a picture."""
    region: float = 0.0
    """The price of each region of a plan: with `OutputMix`, that of a picture."""
    critique: float = 0.0
    """The price of an answer of the critic."""
    score: float = 0.0
    """The price of a score."""

    def __post_init__(self) -> None:
        for name in ("at_most", "picture", "region", "critique", "score"):
            check_finite_number("Budget", name, getattr(self, name))
            if getattr(self, name) < 0:
                raise argument_error("Budget", name, getattr(self, name), expected="a number of at least 0")
        if self.at_most < self.picture + self.score:
            expected = f"at least {self.picture + self.score:g}, the price of the first picture and its score"
            raise argument_error("Budget", "at_most", self.at_most, expected=expected)

    def price(self, plan: Plan) -> float:
        """Of a picture of this plan, without its score; from a canvas with a strength, that part of it."""
        strength = None if plan.canvas is None else plan.canvas.strength
        return (self.picture + self.region * len(plan.regions)) * (1.0 if strength is None else strength)

    def cost(self, turns: Sequence[Turn]) -> float:
        """What these turns cost.

        >>> import artaug as aa
        >>> from PIL import Image
        >>> turn = aa.Turn(plan=aa.Plan("a rose"), image=Image.new("RGB", (8, 8)), critique=aa.Critique())
        >>> aa.Budget(at_most=10, critique=0.25).cost([turn, turn])
        2.5
        """
        return sum(
            self.price(turn.plan) + self.critique * (turn.critique is not None) + self.score * (turn.score is not None)
            for turn in turns
        )

    def allows(self, cost: float) -> bool:
        """Whether so much may be spent; a sum of prices that rounds above the cap by less than a millionth is allowed."""
        return cost <= self.at_most * (1 + 1e-6)
