"""artaug teaches a text-to-image model better taste from its own pictures.

A model draws, a critic says what to improve and where, the model redraws with regional prompts, the pairs that got
better are kept, and a LoRA learns the difference. Everything here is light: it loads neither diffusers nor
transformers. The adapters are imported by name: `artaug.diffusion`, `artaug.critics`, `artaug.scorers`,
`artaug.playground`.
"""

from importlib.metadata import version

from artaug.canvas import Canvas
from artaug.critique import Abstention, Critic, Critique, Suggestion
from artaug.errors import (
    ArtAugError,
    ClusterError,
    ContractError,
    CriticError,
    GeometryError,
    GuideError,
    HubError,
    InvalidValueError,
    LoRAError,
    LoRAMismatchError,
    MissingExtraError,
    ModelError,
    NonFiniteError,
    NothingToLearnError,
    PartError,
    PromptError,
    ScoringError,
    StorageError,
    TokensError,
    TrainingDivergedError,
    UndecidedError,
    WorkerDiedError,
)
from artaug.evaluation.comparison import Arm, Comparison, Guardrail, PositionBias, ScoreRow, ScoringFailure, compare
from artaug.evaluation.prompts import PromptSet
from artaug.filtering import (
    BestOf,
    Calibration,
    Floor,
    Gain,
    PairFilter,
    ParetoGain,
    Preferred,
    Similarity,
    TopFraction,
    calibrate,
)
from artaug.geometry import Box, Mask
from artaug.image_files import ImageFile, ImageFolder
from artaug.images.similarity import EmbeddingSimilarity, ImageSimilarity, StructuralSimilarity
from artaug.lora.baking import BakedCheckpoint, BakedFile, BakedLayer, bake
from artaug.lora.formats import Format
from artaug.lora.fusing import CompressedLayer, Compression, ConcatFuser, Fuser, SvdFuser
from artaug.lora.lora import LoRA, LowRank
from artaug.on_canvas import OnCanvas
from artaug.pair_folders import pairs_from_folder, pairs_to_folder
from artaug.pairs import Attempt, Dropped, ImagePair, Kept, Skipped, Verdict
from artaug.pairwise import PairwiseJudge, Preference
from artaug.placement import OneAtATime, Placement, Resident
from artaug.plan import GreedyPlanner, Plan, Region, RegionPlanner
from artaug.regional import AttentionProbe, Guide, Isolation, LatentGuide, OutputMix, RegionalAttention, Together
from artaug.report import write_report
from artaug.review import ManualReview, RecordedDecisions, ReviewProgress
from artaug.run.enhance import enhance
from artaug.run.events import AttemptEvent, ProgressEvent, RoundEvent, RunEvent, StageEvent
from artaug.run.funnel import Funnel, FunnelStep
from artaug.run.improve import improve
from artaug.run.planning.cluster_plan import ChunkPlan, ClusterPlan, ClusterSize
from artaug.run.planning.plan_run import plan_run
from artaug.run.planning.run_plan import CriticPlan, RunPlan, StagePlan
from artaug.run.refine import refine, refine_each
from artaug.run.results import Enhancement, Round
from artaug.run.stop_rule import StopRule
from artaug.run.storage.cached_synthesizer import CachedSynthesizer
from artaug.run.storage.store import Store
from artaug.run.turn_rules import Budget, TurnRule
from artaug.scoring import Scorer
from artaug.stored_runs import Run
from artaug.synthesis import Synthesizer
from artaug.tokens import Tokens
from artaug.training import (
    AdamW,
    AdamW8bit,
    Adapter,
    AttentionObjective,
    BellShaped,
    Bipolar,
    Checkpoints,
    DifferentialLoRATrainer,
    DirectPreference,
    DoRA,
    FullRank,
    LoKr,
    MinSNR,
    NegativeAware,
    Objective,
    Optimizer,
    PairedDifference,
    PairedPreference,
    PlainLoRA,
    Prodigy,
    Schedule,
    ScheduleFree,
    StepEvent,
    SupervisedFineTuning,
    TokenTrainer,
    TokenTrainingResult,
    TrainingPrompt,
    TrainingResult,
    TwoStage,
    Validation,
    ValidationResult,
)
from artaug.trajectories import Thought, Trajectory, Turn

__version__ = version("artaug")

__all__ = [
    "Abstention",
    "AdamW",
    "AdamW8bit",
    "Adapter",
    "Arm",
    "ArtAugError",
    "Attempt",
    "AttemptEvent",
    "AttentionObjective",
    "AttentionProbe",
    "BakedCheckpoint",
    "BakedFile",
    "BakedLayer",
    "BellShaped",
    "BestOf",
    "Bipolar",
    "Box",
    "Budget",
    "CachedSynthesizer",
    "Calibration",
    "Canvas",
    "Checkpoints",
    "ChunkPlan",
    "ClusterError",
    "ClusterPlan",
    "ClusterSize",
    "Comparison",
    "CompressedLayer",
    "Compression",
    "ConcatFuser",
    "ContractError",
    "Critic",
    "CriticError",
    "CriticPlan",
    "Critique",
    "DifferentialLoRATrainer",
    "DirectPreference",
    "DoRA",
    "Dropped",
    "EmbeddingSimilarity",
    "Enhancement",
    "Floor",
    "Format",
    "FullRank",
    "Funnel",
    "FunnelStep",
    "Fuser",
    "Gain",
    "GeometryError",
    "GreedyPlanner",
    "Guardrail",
    "Guide",
    "GuideError",
    "HubError",
    "ImageFile",
    "ImageFolder",
    "ImagePair",
    "ImageSimilarity",
    "InvalidValueError",
    "Isolation",
    "Kept",
    "LatentGuide",
    "LoKr",
    "LoRA",
    "LoRAError",
    "LoRAMismatchError",
    "LowRank",
    "ManualReview",
    "Mask",
    "MinSNR",
    "MissingExtraError",
    "ModelError",
    "NegativeAware",
    "NonFiniteError",
    "NothingToLearnError",
    "Objective",
    "OnCanvas",
    "OneAtATime",
    "Optimizer",
    "OutputMix",
    "PairFilter",
    "PairedDifference",
    "PairedPreference",
    "PairwiseJudge",
    "ParetoGain",
    "PartError",
    "Placement",
    "PlainLoRA",
    "Plan",
    "PositionBias",
    "Preference",
    "Preferred",
    "Prodigy",
    "ProgressEvent",
    "PromptError",
    "PromptSet",
    "RecordedDecisions",
    "Region",
    "RegionPlanner",
    "RegionalAttention",
    "Resident",
    "ReviewProgress",
    "Round",
    "RoundEvent",
    "Run",
    "RunEvent",
    "RunPlan",
    "Schedule",
    "ScheduleFree",
    "ScoreRow",
    "Scorer",
    "ScoringError",
    "ScoringFailure",
    "Similarity",
    "Skipped",
    "StageEvent",
    "StagePlan",
    "StepEvent",
    "StopRule",
    "StorageError",
    "Store",
    "StructuralSimilarity",
    "Suggestion",
    "SupervisedFineTuning",
    "SvdFuser",
    "Synthesizer",
    "Thought",
    "Together",
    "TokenTrainer",
    "TokenTrainingResult",
    "Tokens",
    "TokensError",
    "TopFraction",
    "TrainingDivergedError",
    "TrainingPrompt",
    "TrainingResult",
    "Trajectory",
    "Turn",
    "TurnRule",
    "TwoStage",
    "UndecidedError",
    "Validation",
    "ValidationResult",
    "Verdict",
    "WorkerDiedError",
    "bake",
    "calibrate",
    "compare",
    "enhance",
    "improve",
    "pairs_from_folder",
    "pairs_to_folder",
    "plan_run",
    "refine",
    "refine_each",
    "write_report",
]

for _exported in filter(callable, map(globals().__getitem__, __all__)):
    _exported.__module__ = "artaug"  # tracebacks, reprs and the reference say where people import it from
