"""Prompts and what their pictures have to show, as values; nothing here looks at a picture."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias, final

from PIL.Image import Image
from pydantic import Field

from artaug._internal.values import value
from artaug.errors import InvalidValueError, PromptError
from artaug.evaluation.prompts import PromptSet
from artaug.scoring import Scorer

Relation: TypeAlias = Literal["left of", "right of", "above", "below"]


@value
class Clause:
    """So many things of one kind, perhaps of one colour, perhaps at one side of the things of an earlier clause."""

    label: str
    """The kind, as the detector calls it."""
    count: Annotated[int, Field(gt=0)] = 1
    colour: str | None = None
    """The colour of each of them."""
    position: tuple[Relation, int] | None = None
    """Where each of them is, seen from each thing of the clause of that number, counted from 0."""


@value
class ObjectCheck:
    """What has to be found in a picture (Ghosh et al. 2023, GenEval): all of ``include``, and none of ``exclude``.

    Raises:
        InvalidValueError: for a check of nothing, a position seen from a clause that does not come before, or a colour
            or position in ``exclude``, where the protocol counts only.

    >>> from artaug.evaluation.suites import Clause, ObjectCheck
    >>> two_dogs = ObjectCheck((Clause("dog", 2),), (Clause("dog", 3),), confidence=0.9)
    """

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()
    """Each with the number from which on there are too many."""
    confidence: Annotated[float, Field(ge=0, le=1)] = 0.3
    """A detection has to be surer than that; 0.9 where GenEval counts."""

    def __post_init__(self) -> None:
        if not self.include and not self.exclude:
            raise InvalidValueError("an ObjectCheck of nothing is passed by every picture: need a clause.")
        for place, clause in enumerate(self.include):
            if clause.position is not None and not 0 <= clause.position[1] < place:
                raise InvalidValueError(f"{clause!r} is clause {place}: need a position seen from an earlier one.")
        if any(clause.colour or clause.position for clause in self.exclude):
            raise InvalidValueError(f"{self.exclude!r}: what is excluded has no colour and no position, only a count.")


@value
class Question:
    """One question about a picture, to which yes is right."""

    number: int
    text: str
    parents: tuple[int, ...] = ()
    """Numbers of the questions without whose yes this one makes no sense."""
    category: str = ""


@value
class QuestionCheck:
    """What a picture is asked (Cho et al. 2024, Davidsonian scene graph): its score is the share that counts as right.

    A question counts as wrong if one of its parents is answered with no, since there is no red collar where there is
    no dog.

    Raises:
        InvalidValueError: without questions, for two of one number, or for a parent that is not among them.

    >>> from artaug.evaluation.suites import Question, QuestionCheck
    >>> asked = (Question(1, "Is there a dog?"), Question(2, "Is it red?", (1,)), Question(3, "Is red bright?", (2,)))
    >>> QuestionCheck(asked).counted([False, True, True])
    (False, False, True)
    >>> QuestionCheck(asked, cascade=True).counted([False, True, True])
    (False, False, False)
    """

    questions: tuple[Question, ...]
    cascade: bool = False
    """Whether a question that counts as wrong for its parents' sake makes its own children wrong too, as the program
    of DPG-Bench has it; those of DSG and OneIG look at the answers to the parents alone."""

    def __post_init__(self) -> None:
        numbers = [question.number for question in self.questions]
        if not numbers or len(set(numbers)) < len(numbers):
            raise InvalidValueError(f"a QuestionCheck received questions numbered {numbers}: need different ones.")
        for question in self.questions:
            if not set(question.parents) <= set(numbers) - {question.number}:
                raise InvalidValueError(f"{question!r} rests on questions that are not among {numbers}.")

    def counted(self, answers: Sequence[bool]) -> tuple[bool, ...]:
        """Which questions count as right, of answers in the order of the questions."""
        given = dict(zip((question.number for question in self.questions), answers, strict=True))
        right = dict(given)
        for question in self.questions:
            if not all((right if self.cascade else given)[parent] for parent in question.parents):
                right[question.number] = False
        return tuple(right.values())


@value
class Case:
    """One prompt of a suite, and what its pictures have to show."""

    prompt: str
    check: ObjectCheck | QuestionCheck
    category: str = ""
    """What the prompt tests, where the suite says so."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise PromptError(f"a Case received the prompt {self.prompt!r}: need a text that says what to draw.")


@final
@dataclass(frozen=True)
class Suite:
    """Prompts with checks, as published, and how their scores become one number.

    Raises:
        PromptError: without cases.
    """

    name: str
    cases: tuple[Case, ...]
    mean_over: Literal["prompts", "categories"] = "prompts"
    """The overall score is the mean over all prompts, or, as in GenEval, over the means of the categories."""

    def __post_init__(self) -> None:
        if not self.cases:
            raise PromptError(f"the suite {self.name!r} has no prompts: need at least one case.")

    def __repr__(self) -> str:
        return f"Suite({self.name!r}, {len(self.cases)} prompts)"

    @property
    def prompts(self) -> PromptSet:
        """The prompts with their categories, for `artaug.evaluation.comparison`."""
        return PromptSet(tuple(case.prompt for case in self.cases), tuple(case.category for case in self.cases))

    def case(self, prompt: str) -> Case:
        """The case of a prompt.

        Raises:
            PromptError: if the suite has no such prompt, or asks different things of it in two places.
        """
        found = {case.check: case for case in self.cases if case.prompt == prompt}
        if len(found) != 1:
            told = "does not have it" if not found else f"has {len(found)} cases of it, with different checks"
            raise PromptError(f"{self.name} was asked to judge a picture of {prompt!r} and {told}.")
        return next(iter(found.values()))


@final
@dataclass(frozen=True)
class Outcome:
    """What a check found in one picture."""

    score: float
    """In [0, 1]; 0 or 1 where a check is passed as a whole or not."""
    reasons: tuple[str, ...] = ()
    """What was wrong, in words."""
    parts: tuple[tuple[str, bool], ...] = ()
    """Category by category what is counted there: the picture as a whole, or each of its questions as answered."""


class SuiteScorer(Scorer):
    """Judges pictures of a suite's prompts. It is a `Scorer` of these prompts, so `artaug.evaluation.comparison` takes it."""

    suite: Suite

    @abstractmethod
    def outcomes(self, images: Sequence[Image], cases: Sequence[Case]) -> list[Outcome]:
        """Judge pictures, each by its case."""

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """Score pictures by the cases of their prompts.

        Raises:
            PromptError: for a prompt that is not of this suite.
        """
        return [outcome.score for outcome in self.outcomes(images, [self.suite.case(prompt) for prompt in prompts])]
