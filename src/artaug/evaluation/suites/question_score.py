"""Checks by questions as DSG, DPG-Bench and OneIG make them: to how many does a picture answer yes?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from PIL.Image import Image

from artaug.errors import InvalidValueError
from artaug.evaluation.suites.suite import Case, Outcome, QuestionCheck, Suite, SuiteScorer
from artaug.scoring import Scorer, score_images


@final
@dataclass(frozen=True, kw_only=True)
class QuestionScore(SuiteScorer):
    """The share of its questions to which a picture answers yes, in [0, 1], less those whose parents are answered no.

    Raises:
        InvalidValueError: for a suite that asks for objects, or a threshold that is not finite.
    """

    suite: Suite
    """Its cases have a `QuestionCheck`."""
    answers: Scorer
    """Gives a picture and a question, in the place of a prompt, the probability of yes: `artaug.scorers.VQAScore` with
    ``question="{prompt} Answer Yes or No."``, or a `FunctionScorer`."""
    yes_from: float = 0.5
    """An answer is yes from here on."""

    def __post_init__(self) -> None:
        if not all(isinstance(case.check, QuestionCheck) for case in self.suite.cases):
            raise InvalidValueError(f"{self.suite!r} asks for objects, not questions. Use ObjectScore.")
        if not 0 < self.yes_from <= 1:
            raise InvalidValueError(f"QuestionScore(yes_from={self.yes_from}): need a probability in (0, 1].")

    @property
    def name(self) -> str:
        return f"{self.suite.name} ({self.answers.name})"

    @property
    def depends_on(self) -> frozenset[str]:
        return frozenset({self.name}) | self.answers.depends_on

    def outcomes(self, images: Sequence[Image], cases: Sequence[Case]) -> list[Outcome]:
        checks = [_questions(case) for case in cases]
        pictures = [image for image, check in zip(images, checks, strict=True) for _ in check.questions]
        asked = [question.text for check in checks for question in check.questions]
        said = iter(score_images(self.answers, pictures, asked) if asked else ())
        return [self._outcome(check, [next(said) >= self.yes_from for _ in check.questions]) for check in checks]

    def _outcome(self, check: QuestionCheck, answers: Sequence[bool]) -> Outcome:
        right = check.counted(answers)
        reasons = [
            f"no to {question.text!r}" if not answer else f"no use in yes to {question.text!r}"
            for question, answer, counts in zip(check.questions, answers, right, strict=True)
            if not counts
        ]
        parts = tuple((question.category, answer) for question, answer in zip(check.questions, answers, strict=True))
        return Outcome(sum(right) / len(right), tuple(reasons), parts)


def _questions(case: Case) -> QuestionCheck:
    if not isinstance(case.check, QuestionCheck):
        raise InvalidValueError(f"the case of {case.prompt!r} asks for objects. Use ObjectScore.")
    return case.check
