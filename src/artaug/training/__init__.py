"""Differential training: what separates the pictures of pairs, as a LoRA."""

from artaug.training.model import Conditioning, DiffusionModel, Trainable
from artaug.training.noising import EpsilonPrediction, FlowMatching, Noising, VPrediction
from artaug.training.objectives import (
    Course,
    Objective,
    PairBatch,
    PairedDifference,
    Stage,
    Student,
    SupervisedFineTuning,
    TwoStage,
)
from artaug.training.trainer import DifferentialLoRATrainer, StepEvent, Training

__all__ = [
    "Conditioning",
    "Course",
    "DifferentialLoRATrainer",
    "DiffusionModel",
    "EpsilonPrediction",
    "FlowMatching",
    "Noising",
    "Objective",
    "PairBatch",
    "PairedDifference",
    "Stage",
    "StepEvent",
    "Student",
    "SupervisedFineTuning",
    "Trainable",
    "Training",
    "TwoStage",
    "VPrediction",
]
