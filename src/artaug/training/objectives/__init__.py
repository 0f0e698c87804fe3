"""Training objectives, one file each: what a training minimizes.

Throughout, ``x_b`` and ``x_a`` are the clean latents before and after, ``d = x_a - x_b``, ``n`` the noise and ``s`` its level
(both shared by the two pictures of a pair), ``z_b`` and ``z_a`` the noisy latents, and ``alpha = sqrt(1 - s^2)``.
"""

from artaug.training.objectives.attention import AttentionLoss, AttentionObjective
from artaug.training.objectives.base import (
    Companion,
    Loss,
    Objective,
    PairBatch,
    PromptBatch,
    Stage,
    Student,
    TrainingPlan,
    compute_loss,
)
from artaug.training.objectives.bipolar import Bipolar
from artaug.training.objectives.direct_preference import DirectPreference
from artaug.training.objectives.fine_tuning import SupervisedFineTuning
from artaug.training.objectives.negative_aware import NegativeAware
from artaug.training.objectives.paired_difference import PairedDifference
from artaug.training.objectives.paired_preference import PairedPreference
from artaug.training.objectives.two_stage import TwoStage

__all__ = [
    "AttentionLoss",
    "AttentionObjective",
    "Bipolar",
    "Companion",
    "DirectPreference",
    "Loss",
    "NegativeAware",
    "Objective",
    "PairBatch",
    "PairedDifference",
    "PairedPreference",
    "PromptBatch",
    "Stage",
    "Student",
    "SupervisedFineTuning",
    "TrainingPlan",
    "TwoStage",
    "compute_loss",
]
