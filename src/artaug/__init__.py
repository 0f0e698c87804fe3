"""artaug teaches a text-to-image model better taste from its own pictures.

A model draws, a critic says what to improve and where, the model redraws with regional prompts, the pairs that got
better are kept, and a LoRA learns the difference. Everything here is light: it loads neither diffusers nor
transformers. The adapters are imported by name: `artaug.diffusion`, `artaug.critics`, `artaug.scorers`,
`artaug.playground`.
"""

from importlib.metadata import version

from artaug.compare import Arm, Comparison, ScoreRow, compare
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
from artaug.filtering import Floor, Gain, PairFilter, TopFraction
from artaug.fusing import ConcatFuser, Fuser, SvdFuser
from artaug.geometry import Box, Mask
from artaug.loop import StageEvent, improve
from artaug.lora import LoRA, LowRank
from artaug.pairs import Attempt, Dropped, ImagePair, Kept, Skipped, Verdict
from artaug.plan import GreedyPlanner, Plan, Region, RegionPlanner
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
    "Box",
    "Comparison",
    "ConcatFuser",
    "Critic",
    "CriticError",
    "Critique",
    "DifferentialLoRATrainer",
    "Dropped",
    "Enhancement",
    "Floor",
    "Fuser",
    "Gain",
    "GeometryError",
    "GreedyPlanner",
    "Guide",
    "GuideError",
    "ImagePair",
    "InvalidValueError",
    "Isolation",
    "Kept",
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
    "Plan",
    "PromptError",
    "Region",
    "RegionPlanner",
    "RegionalAttention",
    "Round",
    "ScoreRow",
    "Scorer",
    "SeamError",
    "Skipped",
    "StageEvent",
    "StepEvent",
    "StopRule",
    "Suggestion",
    "SupervisedFineTuning",
    "SvdFuser",
    "Synthesizer",
    "TopFraction",
    "Training",
    "TrainingDivergedError",
    "TwoStage",
    "Verdict",
    "compare",
    "enhance",
    "improve",
    "write_report",
]

for _exported in filter(callable, map(globals().__getitem__, __all__)):
    _exported.__module__ = "artaug"  # tracebacks, reprs and the reference say where people import it from
