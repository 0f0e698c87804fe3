"""Question checks as in DSG, DPG-Bench and OneIG: the share of a prompt's questions that a model answers with yes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug.errors import InvalidValueError
from artaug.evaluation.suites.suite import Case, Outcome, QuestionCheck, Suite, SuiteScorer
from artaug.scoring import Scorer, score_images

if TYPE_CHECKING:
    from torch import nn


@checked
@final
@dataclass(frozen=True, kw_only=True)
class QuestionScore(SuiteScorer):
    """The share of a picture's questions that are answered with yes, in [0, 1], without those whose parents are not.

    Raises:
        InvalidValueError: for a suite of object checks, or a threshold outside (0, 1].
    """

    suite: Suite
    """Its cases have a `QuestionCheck`."""
    vqa: Scorer
    """Answers: its score of a picture and a question, in the place of a prompt, is the probability of yes.
    `artaug.scorers.VQAScore` with ``question="{prompt} Answer Yes or No."``, or `artaug.scorers.OpenAIVQAScore`."""
    threshold: float = 0.5
    """An answer is yes if its probability is at least this."""

    def __post_init__(self) -> None:
        if not all(isinstance(case.check, QuestionCheck) for case in self.suite.cases):
            raise InvalidValueError(f"{self.suite!r} has object checks, not questions. Use ObjectScore.")
        if not 0 < self.threshold <= 1:
            raise InvalidValueError(f"QuestionScore(threshold={self.threshold}): need a probability in (0, 1].")

    @property
    def name(self) -> str:
        return f"{self.suite.name} ({self.vqa.name})"

    @property
    def depends_on(self) -> frozenset[str]:
        return frozenset({self.name}) | self.vqa.depends_on

    @property
    def models(self) -> "Sequence[nn.Module]":
        return self.vqa.models

    def check_images(self, images: Sequence[Image], cases: Sequence[Case]) -> list[Outcome]:
        checks = [_question_check(case) for case in cases]
        # One batch of all questions of all pictures, a picture repeated for each of its questions.
        repeated = [image for image, check in zip(images, checks, strict=True) for _ in check.questions]
        texts = [question.text for check in checks for question in check.questions]
        probabilities = iter(score_images(self.vqa, repeated, texts) if texts else ())
        return [
            self._outcome(check, [next(probabilities) >= self.threshold for _ in check.questions]) for check in checks
        ]

    def _outcome(self, check: QuestionCheck, answers: Sequence[bool]) -> Outcome:
        right = check.apply_dependencies(answers)
        reasons = [
            f"yes to {question.text!r} does not count: a parent is no" if answer else f"no to {question.text!r}"
            for question, answer, counts in zip(check.questions, answers, right, strict=True)
            if not counts
        ]
        categories = (question.category for question in check.questions)
        return Outcome(sum(right) / len(right), tuple(reasons), tuple(zip(categories, answers, strict=True)))


def _question_check(case: Case) -> QuestionCheck:
    if not isinstance(case.check, QuestionCheck):
        raise InvalidValueError(f"the case of {case.prompt!r} has an object check. Use ObjectScore.")
    return case.check
