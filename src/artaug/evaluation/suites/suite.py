"""Suites as values: prompts, the checks that their pictures have to pass, and the outcomes of those checks."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias, final

from PIL.Image import Image
from pydantic import Field

from artaug._internal.annotations import checked
from artaug._internal.values import value
from artaug.errors import InvalidValueError, PromptError
from artaug.evaluation.prompts import PromptSet
from artaug.scoring import Scorer

Relation: TypeAlias = Literal["left of", "right of", "above", "below"]


@value
class Clause:
    """A number of objects of one class, optionally of one color, optionally on one side of an earlier clause's objects."""

    label: str
    """The class, as the detector names it."""
    count: Annotated[int, Field(gt=0)] = 1
    color: str | None = None
    """The colour of each of them."""
    position: tuple[Relation, int] | None = None
    """Where each of them is, relative to each object of the clause of that index, counted from 0."""


@value
class ObjectCheck:
    """What has to be found in a picture (Ghosh et al. 2023, GenEval): all of ``include``, and none of ``exclude``.

    Raises:
        InvalidValueError: for a check without clauses, a position relative to a clause that does not come before, or a
            colour or position in ``exclude``, where the protocol only counts.

    >>> from artaug.evaluation.suites import Clause, ObjectCheck
    >>> two_dogs = ObjectCheck((Clause("dog", 2),), (Clause("dog", 3),), confidence=0.9)
    """

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()
    """Each with the smallest number that is too many."""
    confidence: Annotated[float, Field(ge=0, le=1)] = 0.3
    """A detection counts if its confidence is above this; 0.9 where GenEval counts objects."""

    def __post_init__(self) -> None:
        if not self.include and not self.exclude:
            raise InvalidValueError(
                "an ObjectCheck without clauses is passed by every picture: need at least one clause."
            )
        for index, clause in enumerate(self.include):
            if clause.position is not None and not 0 <= clause.position[1] < index:
                raise InvalidValueError(f"{clause!r} is clause {index}: need a position relative to an earlier clause.")
        if any(clause.color or clause.position for clause in self.exclude):
            raise InvalidValueError(f"{self.exclude!r}: an excluded clause has no color and no position, only a count.")


@value
class Question:
    """One yes-or-no question about a picture; yes is the right answer."""

    number: int
    text: str
    parents: tuple[int, ...] = ()
    """Numbers of the questions that have to be answered with yes for this one to make sense."""
    category: str = ""


@value
class QuestionCheck:
    """Questions about a picture (Cho et al. 2024, Davidsonian scene graph); the score is the share that counts as right.

    A question counts as wrong if one of its parents is answered with no: without a dog there is no red collar.

    Raises:
        InvalidValueError: without questions, for two of one number, or for a parent that is not among them.

    >>> from artaug.evaluation.suites import Question, QuestionCheck
    >>> questions = (Question(1, "A dog?"), Question(2, "Is the dog red?", (1,)), Question(3, "A bright red?", (2,)))
    >>> QuestionCheck(questions).apply_dependencies([False, True, True])
    (False, False, True)
    >>> QuestionCheck(questions, cascade=True).apply_dependencies([False, True, True])
    (False, False, False)
    """

    questions: tuple[Question, ...]
    cascade: bool = False
    """Whether a question that counts as wrong because of its parents makes its own children wrong too, as in the program
    of DPG-Bench; those of DSG and OneIG use the answers to the parents as given."""

    def __post_init__(self) -> None:
        numbers = [question.number for question in self.questions]
        if not numbers or len(set(numbers)) < len(numbers):
            raise InvalidValueError(f"a QuestionCheck received questions numbered {numbers}: need different ones.")
        known = set(numbers)
        for question in self.questions:
            if question.number in question.parents or not known.issuperset(question.parents):
                raise InvalidValueError(f"{question!r} has parents that are not among the other questions, {numbers}.")

    def apply_dependencies(self, answers: Sequence[bool]) -> tuple[bool, ...]:
        """Which questions count as right, given the answers in the order of the questions."""
        answered = dict(zip((question.number for question in self.questions), answers, strict=True))
        right = dict(answered)
        for question in self.questions:
            # As published, with cascade a parent passes its own failure on only if it precedes the child in the list.
            if not all((right if self.cascade else answered)[parent] for parent in question.parents):
                right[question.number] = False
        return tuple(right.values())


@value
class Case:
    """One prompt of a suite, and the check that its pictures have to pass."""

    prompt: str
    check: ObjectCheck | QuestionCheck
    category: str = ""
    """What the prompt tests; empty if the suite does not say."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise PromptError(f"a Case received the prompt {self.prompt!r}: need a text that says what to draw.")


@checked
@final
@dataclass(frozen=True)
class Suite:
    """Prompts with checks, as published, and the rule that makes one overall score of them.

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
        """The prompts with their categories, for `artaug.compare`."""
        return PromptSet(tuple(case.prompt for case in self.cases), tuple(case.category for case in self.cases))

    def case(self, prompt: str) -> Case:
        """The case of a prompt.

        Raises:
            PromptError: if the suite has no such prompt, or has it twice with different checks.
        """
        by_check = {case.check: case for case in self.cases if case.prompt == prompt}
        if len(by_check) != 1:
            problem = f"has {len(by_check)} cases of it, with different checks" if by_check else "does not have it"
            raise PromptError(f"{self.name} cannot score a picture of {prompt!r}: it {problem}.")
        return next(iter(by_check.values()))


@checked
@final
@dataclass(frozen=True)
class Outcome:
    """The outcome of one case's check on one picture."""

    score: float
    """In [0, 1]; 0 or 1 for an `ObjectCheck`, the share of questions for a `QuestionCheck`."""
    reasons: tuple[str, ...] = ()
    """What was wrong, in words."""
    category_results: tuple[tuple[str, bool], ...] = ()
    """Pairs of a category and whether it was right: one for the whole picture, or one for each question as answered."""


@checked
class SuiteScorer(Scorer):
    """Checks pictures of a suite's prompts. It is a `Scorer` of these prompts, so `artaug.compare` takes it."""

    suite: Suite

    @abstractmethod
    def check_images(self, images: Sequence[Image], cases: Sequence[Case]) -> list[Outcome]:
        """Check pictures, each by its case."""

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """Score pictures by the cases of their prompts.

        Raises:
            PromptError: for a prompt that is not of this suite.
        """
        cases = [self.suite.case(prompt) for prompt in prompts]
        return [outcome.score for outcome in self.check_images(images, cases)]
