"""artaug teaches a text-to-image model better taste from its own pictures.

A model draws, a critic says what to improve and where, the model redraws with regional prompts, the pairs that got
better are kept, and a LoRA learns the difference. Everything here is light: it loads neither diffusers nor
transformers. The adapters are imported by name: `artaug.diffusion`, `artaug.critics`, `artaug.scorers`,
`artaug.playground`.
"""

from importlib.metadata import version

from artaug.compare import Arm, Comparison, Guardrail, ScoreRow, compare
from artaug.critique import Abstention, Critic, Critique, Suggestion
from artaug.errors import (
    ArtAugError,
    CriticError,
    GeometryError,
    GuideError,
    InvalidValueError,
    LoRAError,
    LoRAMismatchError,
    MissingExtraError,
    ModelError,
    NonFiniteError,
    NothingToLearnError,
    PromptError,
    SeamError,
    TrainingDivergedError,
)
from artaug.filtering import (
    BestOf,
    Calibration,
    Floor,
    Gain,
    PairFilter,
    ParetoGain,
    Similarity,
    TopFraction,
    calibrate,
)
from artaug.formats import Format
from artaug.funnel import Funnel, FunnelStep
from artaug.fusing import ConcatFuser, Fuser, SvdFuser
from artaug.geometry import Box, Mask
from artaug.likeness import EmbeddedLikeness, Likeness, StructuralSimilarity
from artaug.loop import StageEvent, improve
from artaug.lora import LoRA, LowRank
from artaug.pairs import Attempt, Dropped, ImagePair, Kept, Skipped, Verdict
from artaug.plan import GreedyPlanner, Plan, Region, RegionPlanner
from artaug.promptsets import PromptSet
from artaug.regional import Guide, Isolation, OutputMix, RegionalAttention
from artaug.report import write_report
from artaug.rounds import Enhancement, Round, StopRule, enhance
from artaug.scoring import Scorer
from artaug.synthesis import Synthesizer
from artaug.training import (
    DifferentialLoRATrainer,
    Objective,
    PairedDifference,
    StepEvent,
    SupervisedFineTuning,
    Training,
    TwoStage,
)

__version__ = version("artaug")

__all__ = [
    "Abstention",
    "Arm",
    "ArtAugError",
    "Attempt",
    "BestOf",
    "Box",
    "Calibration",
    "Comparison",
    "ConcatFuser",
    "Critic",
    "CriticError",
    "Critique",
    "DifferentialLoRATrainer",
    "Dropped",
    "EmbeddedLikeness",
    "Enhancement",
    "Floor",
    "Format",
    "Funnel",
    "FunnelStep",
    "Fuser",
    "Gain",
    "GeometryError",
    "GreedyPlanner",
    "Guardrail",
    "Guide",
    "GuideError",
    "ImagePair",
    "InvalidValueError",
    "Isolation",
    "Kept",
    "Likeness",
    "LoRA",
    "LoRAError",
    "LoRAMismatchError",
    "LowRank",
    "Mask",
    "MissingExtraError",
    "ModelError",
    "NonFiniteError",
    "NothingToLearnError",
    "Objective",
    "OutputMix",
    "PairFilter",
    "PairedDifference",
    "ParetoGain",
    "Plan",
    "PromptError",
    "PromptSet",
    "Region",
    "RegionPlanner",
    "RegionalAttention",
    "Round",
    "ScoreRow",
    "Scorer",
    "SeamError",
    "Similarity",
    "Skipped",
    "StageEvent",
    "StepEvent",
    "StopRule",
    "StructuralSimilarity",
    "Suggestion",
    "SupervisedFineTuning",
    "SvdFuser",
    "Synthesizer",
    "TopFraction",
    "Training",
    "TrainingDivergedError",
    "TwoStage",
    "Verdict",
    "calibrate",
    "compare",
    "enhance",
    "improve",
    "write_report",
]

for _exported in filter(callable, map(globals().__getitem__, __all__)):
    _exported.__module__ = "artaug"  # tracebacks, reprs and the reference say where people import it from
