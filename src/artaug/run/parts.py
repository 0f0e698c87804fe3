"""What `improve` and `enhance` are given, as two values: the parts that draw and judge, and those that learn."""

from dataclasses import dataclass

from artaug.critique import Critic
from artaug.filtering import BestOf, PairFilter
from artaug.lora.fusing import Fuser
from artaug.plan import RegionPlanner
from artaug.run.stop_rule import StopRule
from artaug.synthesis import Synthesizer
from artaug.training import Checkpoints, DifferentialLoRATrainer, Validation


@dataclass(frozen=True, kw_only=True)
class LoopParts:
    """The parts that draw pictures, say what to improve, and judge the pairs."""

    synthesizer: Synthesizer
    critic: Critic
    planner: RegionPlanner
    keep: PairFilter
    candidates: BestOf | None


@dataclass(frozen=True, kw_only=True)
class LearningParts:
    """The parts that `enhance` has and `improve` has not."""

    trainer: DifferentialLoRATrainer
    fuser: Fuser
    rounds: int
    validation: Validation | None
    stop: StopRule | None
    checkpoints: Checkpoints | None
