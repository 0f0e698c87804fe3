"""Differential training: what separates the pictures of pairs, as a LoRA."""

from artaug.training.adapters import Adapter, DoRA, LoKr, Parts, PlainLoRA, Weights
from artaug.training.bipolar import Bipolar
from artaug.training.config import ATTENTION, ATTENTION_AND_MLP, EVERY_LINEAR, Recipe
from artaug.training.distributed import sharded
from artaug.training.model import Conditioning, DiffusionModel, Predictor, Trainable
from artaug.training.noise_schedule import EpsilonPrediction, FlowMatching, Noising, VPrediction
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
from artaug.training.optimizers import AdamW, AdamW8bit, Optimiser, Prodigy, Schedule, ScheduleFree
from artaug.training.preference import DirectPreference
from artaug.training.progress import StepEvent
from artaug.training.state import Checkpoints, TrainingState
from artaug.training.tracking import Tracker, tracked
from artaug.training.trainer import DifferentialLoRATrainer, Training
from artaug.training.validation import HeldOut, Look

__all__ = [
    "ATTENTION",
    "ATTENTION_AND_MLP",
    "EVERY_LINEAR",
    "AdamW",
    "AdamW8bit",
    "Adapter",
    "Bipolar",
    "Checkpoints",
    "Conditioning",
    "Course",
    "DifferentialLoRATrainer",
    "DiffusionModel",
    "DirectPreference",
    "DoRA",
    "EpsilonPrediction",
    "FlowMatching",
    "HeldOut",
    "LoKr",
    "Look",
    "Noising",
    "Objective",
    "Optimiser",
    "PairBatch",
    "PairedDifference",
    "Parts",
    "PlainLoRA",
    "Predictor",
    "Prodigy",
    "Recipe",
    "Schedule",
    "ScheduleFree",
    "Stage",
    "StepEvent",
    "Student",
    "SupervisedFineTuning",
    "Tracker",
    "Trainable",
    "Training",
    "TrainingState",
    "TwoStage",
    "VPrediction",
    "Weights",
    "sharded",
    "tracked",
]
