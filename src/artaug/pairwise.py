"""Which of two pictures is better: a `PairwiseJudge` says so in one order, and the library asks it in both."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from PIL.Image import Image
from pydantic import Field

from artaug._internal.annotations import Seam
from artaug._internal.calls import call_part, describe_inputs
from artaug._internal.contracts import check_batch, check_numbers, contract_error
from artaug._internal.memory import FittingBatches
from artaug._internal.values import value
from artaug.critique import Abstention
from artaug.errors import InvalidValueError, ScoringError

_MAX_QUESTIONS_PER_CALL = 128
"""Questions that a judge gets at once, of two pictures each."""
_TOO_LARGE = "Load its model in lower precision or on another device, or free what else is on the device."

if TYPE_CHECKING:
    from torch import nn


@value
class Preference:
    """Which of two pictures a judge prefers, asked in both orders.

    A picture wins only if it is preferred in both; a judge that takes sides by position answers with ties. Numbers are
    probabilities: 1 if the picture that is shown first is better, 0 if the other one is, 0.5 for a tie.

    Raises:
        InvalidValueError: for a number outside [0, 1].

    >>> import artaug as aa
    >>> preference = aa.Preference(forward=0.9, backward=0.2)
    >>> preference.winner, round(preference.score, 3), preference.swapped.winner
    ('first', 0.85, 'second')
    >>> print(aa.Preference(forward=1.0, backward=1.0))
    a tie, as it prefers whichever is shown first (1.00 shown first, 0.00 shown second)
    """

    forward: Annotated[float, Field(ge=0, le=1)]
    """The answer where the first picture is shown first."""
    backward: Annotated[float, Field(ge=0, le=1)]
    """The answer where the second picture is shown first."""

    @property
    def score(self) -> float:
        """How likely it is that the first picture is better, in [0, 1]: the mean over both orders."""
        return (self.forward + (1 - self.backward)) / 2

    @property
    def winner(self) -> Literal["first", "second", "tie"]:
        """The picture that is preferred in both orders."""
        if self.forward > 0.5 > self.backward:
            return "first"
        return "second" if self.forward < 0.5 < self.backward else "tie"

    @property
    def position(self) -> int:
        """Which place is preferred where the two answers do not agree: 1 the first, -1 the second; 0 where they agree."""
        lean = _side(self.forward) + _side(self.backward)
        return (lean > 0) - (lean < 0)

    @property
    def swapped(self) -> "Preference":
        """The same answers with the two pictures exchanged."""
        return Preference(self.backward, self.forward)

    def __str__(self) -> str:
        """The winner in words, and the probability of the first picture in each order."""
        because = {
            1: ", as it prefers whichever is shown first",
            -1: ", as it prefers whichever is shown second",
            0: "",
        }
        what = (
            f"a tie{because[self.position]}" if self.winner == "tie" else f"the {self.winner} is better in both orders"
        )
        return f"{what} ({self.forward:.2f} shown first, {1 - self.backward:.2f} shown second)"


Judgment: TypeAlias = Preference | Abstention
"""What a judge says of two pictures: an `Abstention` if it cannot tell, or its reply cannot be read."""


class PairwiseJudge(Seam):
    """Says which of two pictures answers a prompt better.

    Subclass it and write `prefer`, for one order. It is asked in both, and what follows is computed by the library: ties,
    consistency, position bias. A reply that cannot be read is an `Abstention` with the reason, never a tie. An exception is a
    bug.

    >>> import artaug as aa
    >>> class Wider(aa.PairwiseJudge):
    ...     def prefer(self, first, second, prompt):
    ...         return 0.5 if first.width == second.width else float(first.width > second.width)
    >>> Wider().name
    'Wider'
    """

    @property
    def name(self) -> str:
        """The judge's name in tables and verdicts."""
        return type(self).__name__

    @property
    def depends_on(self) -> frozenset[str]:
        """Names of the scorers and judges that this one is computed from, its own included."""
        return frozenset({self.name})

    @property
    def models(self) -> "Sequence[nn.Module]":
        """What it computes with on a device, for `OneAtATime`, which moves these; whatever is not named stays where it is."""
        return ()

    @abstractmethod
    def prefer(self, first: Image, second: Image, prompt: str) -> float | Abstention:
        """How likely it is that ``first``, which is shown first, answers ``prompt`` better than ``second``.

        Returns:
            A number in [0, 1]: 1 for the first picture, 0 for the second, 0.5 for a tie.
        """

    def prefer_batch(
        self, first: Sequence[Image], second: Sequence[Image], prompts: Sequence[str]
    ) -> list[float | Abstention]:
        """Answer for many pairs of pictures. Override it where a batch is faster than a loop."""
        return [self.prefer(*question) for question in zip(first, second, prompts, strict=True)]


def judge_images(
    judge: PairwiseJudge, first: Sequence[Image], second: Sequence[Image], prompts: Sequence[str]
) -> list[Judgment]:
    """Ask a judge about each pair of pictures in both orders, and check what it returned.

    Every call of a judge goes through this function. A judge without a `PairwiseJudge.prefer_batch` of its own is asked one
    question at a time, another one at most 128, the two orders of a pair together. Where memory runs out, the batch is
    halved. What passes by itself, such as a timeout, is tried again for ten minutes. Without pairs, it is not called.

    Args:
        judge: asked twice a pair.
        first: one picture a prompt; loaded as the judge comes to them.
        second: likewise.
        prompts: what both pictures were drawn from.

    Returns:
        One `Preference` a pair, or an `Abstention` if the judge had no answer in one of the orders.

    Raises:
        InvalidValueError: if there are not two pictures for each prompt.
        ScoringError: if the judge raised; an `ArtAugError` of its own is raised as it is, with a note.
        ContractError: if it returned another number of answers, or something that is neither a number in [0, 1] nor an
            `Abstention`.
        NonFiniteError: if an answer is NaN or infinite, naming the prompt.
        MemoryError, RuntimeError: the judge's own, if not even one question fits into memory.
    """
    owner = f"the judge {judge.name!r}"
    if not len(first) == len(second) == len(prompts):
        raise InvalidValueError(
            f"received {len(first)} and {len(second)} pictures for {len(prompts)} prompt(s), so {owner} was not called: need "
            "two pictures for each prompt."
        )

    def call(questions: Sequence[int]) -> list[float | Abstention]:
        shown, other, texts = [], [], []
        for question in questions:  # 2 i asks about pair i in its order, 2 i + 1 in the other one
            pair, is_swapped = divmod(question, 2)
            pictures = first[pair], second[pair]
            shown.append(pictures[is_swapped])
            other.append(pictures[1 - is_swapped])
            texts.append(prompts[pair])
        answers = call_part(
            lambda: judge.prefer_batch(shown, other, texts),
            owner=owner,
            inputs=describe_inputs("pair", texts),
            error_class=ScoringError,
        )
        return _check_answers(judge.name, answers, texts)

    batches = FittingBatches(1 if type(judge).prefer_batch is PairwiseJudge.prefer_batch else _MAX_QUESTIONS_PER_CALL)
    parts = batches.run(call, range(2 * len(prompts)), owner=owner, item="question", remedy=_TOO_LARGE)
    answers = [answer for _, part in parts for answer in part]
    return [_combine(*both) for both in zip(answers[::2], answers[1::2], strict=True)]


def _check_answers(name: str, answers: object, prompts: Sequence[str]) -> list[float | Abstention]:
    items: list[object] = check_batch(name, "prefer_batch", answers, of=object, count=len(prompts), per="question")
    checked: list[float | Abstention] = []
    for item, prompt in zip(items, prompts, strict=True):
        if isinstance(item, Abstention):
            checked.append(item)
            continue
        (number,) = check_numbers(name, "prefer_batch", [item], count=1, per="pair", prompts=[prompt])
        if not 0 <= number <= 1:
            expected = "a number in [0, 1], how likely the picture shown first is better, or an artaug.Abstention"
            raise contract_error(name, "prefer_batch", received=f"{number}", inputs=repr(prompt), expected=expected)
        checked.append(number)
    return checked


def _combine(forward: float | Abstention, backward: float | Abstention) -> Judgment:
    missing = [answer for answer in (forward, backward) if isinstance(answer, Abstention)]
    if isinstance(forward, Abstention) or isinstance(backward, Abstention):
        return Abstention(missing[0].reason, any(answer.transient for answer in missing))
    return Preference(forward, backward)


def _side(answer: float) -> int:
    """1 for the picture shown first, -1 for the other one, 0 for neither."""
    return (answer > 0.5) - (answer < 0.5)
