"""What `improve` and `enhance` are given, as two values: the parts that draw and judge, and those that learn."""

from collections.abc import Callable
from dataclasses import dataclass, field

from artaug.critique import Critic
from artaug.filtering import BestOf, PairFilter
from artaug.lora.fusing import Fuser
from artaug.placement import Placement, Resident
from artaug.plan import RegionPlanner
from artaug.run.stop_rule import StopRule
from artaug.synthesis import Synthesizer
from artaug.training import Checkpoints, DifferentialLoRATrainer, StepEvent, Validation


@dataclass(frozen=True, kw_only=True)
class LoopParts:
    """The parts that draw pictures, say what to improve, and judge the pairs, and how many they do at a time."""

    synthesizer: Synthesizer
    critic: Critic
    planner: RegionPlanner
    keep: PairFilter
    candidates: BestOf | None
    batch_size: int
    """The most pictures in a call of the synthesizer."""
    chunk_size: int | None
    """Prompts that go through the stages together; None for ``batch_size``."""
    placement: Placement = field(default_factory=Resident)
    """Where the models of these are; `OneAtATime` moves them from stage to stage."""

    @property
    def prompts_per_chunk(self) -> int:
        """The size of a chunk."""
        return self.batch_size if self.chunk_size is None else self.chunk_size

    @property
    def candidate_count(self) -> int:
        """How often every prompt is tried."""
        return 1 if self.candidates is None else self.candidates.count

    def by_name(self) -> dict[str, object]:
        """What computes, by the name of its argument."""
        return {
            "synthesizer": self.synthesizer,
            "critic": self.critic,
            "keep": self.keep,
            "candidates": self.candidates,
        }


@dataclass(frozen=True, kw_only=True)
class LearningParts:
    """The parts that `enhance` has and `improve` has not."""

    trainer: DifferentialLoRATrainer
    fuser: Fuser
    rounds: int
    validation: Validation | None
    stop: StopRule | None
    checkpoints: Checkpoints | None
    on_step: Callable[[StepEvent], None] | None = None

    def by_name(self) -> dict[str, object]:
        """What computes beside the loop's parts, by the name of its argument."""
        return {
            "validation": getattr(self.validation, "scorer", None),
            "stop": getattr(self.stop, "scorer", None),
        }
