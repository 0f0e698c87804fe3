"""Differential training: a LoRA learns what separates the pictures of pairs."""

from artaug.training.adapters import Adapter, AdapterTensors, DoRA, FullRank, LayerWeights, LoKr, PlainLoRA
from artaug.training.config import ATTENTION, ATTENTION_AND_MLP, EVERY_LINEAR, TrainingConfig
from artaug.training.distributed import shard
from artaug.training.loss_scale import LossScale
from artaug.training.model import (
    Decoder,
    DiffusionModel,
    KeepsLatents,
    Predictor,
    ReadsTokens,
    RemotelyTrainable,
    Steerable,
    Trainable,
)
from artaug.training.noise_schedule import EpsilonPrediction, FlowMatching, NoiseSchedule, VPrediction
from artaug.training.objectives import (
    AttentionLoss,
    AttentionObjective,
    Bipolar,
    Companion,
    DirectPreference,
    NegativeAware,
    Objective,
    PairBatch,
    PairedDifference,
    PairedPreference,
    PromptBatch,
    Stage,
    Student,
    SupervisedFineTuning,
    TrainingPlan,
    TwoStage,
)
from artaug.training.optimizers import AdamW, AdamW8bit, Optimizer, Prodigy, Schedule, ScheduleFree
from artaug.training.progress import StepEvent
from artaug.training.sampled_latents import SampledLatents
from artaug.training.samples import TrainingPrompt, TrainingSample
from artaug.training.state import Checkpoints, CompanionState, TrainingState
from artaug.training.token_trainer import TokenTrainer, TokenTrainingResult
from artaug.training.tracking import Tracker, open_tracker
from artaug.training.trainer import DifferentialLoRATrainer, TrainingResult
from artaug.training.validation import Validation, ValidationResult
from artaug.training.weighting import BellShaped, LossWeighting, MinSNR

__all__ = [
    "ATTENTION",
    "ATTENTION_AND_MLP",
    "EVERY_LINEAR",
    "AdamW",
    "AdamW8bit",
    "Adapter",
    "AdapterTensors",
    "AttentionLoss",
    "AttentionObjective",
    "BellShaped",
    "Bipolar",
    "Checkpoints",
    "Companion",
    "CompanionState",
    "Decoder",
    "DifferentialLoRATrainer",
    "DiffusionModel",
    "DirectPreference",
    "DoRA",
    "EpsilonPrediction",
    "FlowMatching",
    "FullRank",
    "KeepsLatents",
    "LayerWeights",
    "LoKr",
    "LossScale",
    "LossWeighting",
    "MinSNR",
    "NegativeAware",
    "NoiseSchedule",
    "Objective",
    "Optimizer",
    "PairBatch",
    "PairedDifference",
    "PairedPreference",
    "PlainLoRA",
    "Predictor",
    "Prodigy",
    "PromptBatch",
    "ReadsTokens",
    "RemotelyTrainable",
    "SampledLatents",
    "Schedule",
    "ScheduleFree",
    "Stage",
    "Steerable",
    "StepEvent",
    "Student",
    "SupervisedFineTuning",
    "TokenTrainer",
    "TokenTrainingResult",
    "Tracker",
    "Trainable",
    "TrainingConfig",
    "TrainingPlan",
    "TrainingPrompt",
    "TrainingResult",
    "TrainingSample",
    "TrainingState",
    "TwoStage",
    "VPrediction",
    "Validation",
    "ValidationResult",
    "open_tracker",
    "shard",
]
