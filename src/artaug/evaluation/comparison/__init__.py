"""Comparisons: synthesizers draw the same prompts with the same seeds, and their scores are compared in pairs."""

from artaug.evaluation.comparison.comparison import Arm, Comparison
from artaug.evaluation.comparison.evaluator import HasScorers, compare
from artaug.evaluation.comparison.position_bias import PositionBias
from artaug.evaluation.comparison.rows import Guardrail, ScoreRow, ScoringFailure

__all__ = ["Arm", "Comparison", "Guardrail", "HasScorers", "PositionBias", "ScoreRow", "ScoringFailure", "compare"]
