"""Published suites of prompts with checks: what has to be in a picture, or which questions it has to answer with yes."""

from artaug.evaluation.suites.object_score import Detection, Detector, ObjectScore
from artaug.evaluation.suites.question_score import QuestionScore
from artaug.evaluation.suites.readers import read_dpg, read_geneval, read_oneig
from artaug.evaluation.suites.results import CategoryScore, SuiteResult, by_category, evaluate
from artaug.evaluation.suites.suite import (
    Case,
    Clause,
    ObjectCheck,
    Outcome,
    Question,
    QuestionCheck,
    Suite,
    SuiteScorer,
)

__all__ = [
    "Case",
    "CategoryScore",
    "Clause",
    "Detection",
    "Detector",
    "ObjectCheck",
    "ObjectScore",
    "Outcome",
    "Question",
    "QuestionCheck",
    "QuestionScore",
    "Suite",
    "SuiteResult",
    "SuiteScorer",
    "by_category",
    "evaluate",
    "read_dpg",
    "read_geneval",
    "read_oneig",
]
