"""What is learned from: pairs of pictures, and prompts without pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TypeAlias

from artaug._internal.annotations import checked
from artaug._internal.arguments import argument_error, check_argument
from artaug._internal.digests import digest
from artaug._internal.text import short_repr
from artaug._internal.values import to_json
from artaug.errors import InvalidValueError
from artaug.pairs import ImagePair, pair_digest
from artaug.plan import Plan
from artaug.training.objectives import Objective


@checked
@dataclass(frozen=True, kw_only=True)
class TrainingPrompt:
    """A prompt to learn from without pictures, by an objective that reads none, as `AttentionObjective`.

    Raises:
        InvalidValueError: for a field of another type, or a size below 1 pixel.

    >>> from artaug.training import TrainingPrompt
    >>> TrainingPrompt(prompt="a red cone and a blue ball", size=(512, 512), seed=0)
    TrainingPrompt(prompt='a red cone and a blue ball', size=(512, 512), seed=0)
    """

    prompt: str
    size: tuple[int, int]
    """Width and height in pixels of the pictures that it stands for."""
    seed: int | None = None
    """What a picture of it would be drawn with; only its own noise follows from it."""
    plan: Plan | None = None
    """Whose regions say what is to be where; None for no regions."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_argument("TrainingPrompt", "prompt", self.prompt, str)
        check_argument("TrainingPrompt", "seed", self.seed, Integral, optional=True)
        check_argument("TrainingPrompt", "plan", self.plan, Plan, optional=True)
        size: object = self.size
        if not isinstance(size, Sequence) or [isinstance(side, int) and side > 0 for side in size] != [True, True]:
            raise argument_error(
                "TrainingPrompt", "size", size, expected="width and height in pixels, such as (512, 512)"
            )
        object.__setattr__(self, "size", (self.size[0], self.size[1]))  # a list, too


TrainingSample: TypeAlias = ImagePair | TrainingPrompt
"""What `artaug.DifferentialLoRATrainer.train` learns from."""


def shown_plan(prompt: str, plan: Plan | None) -> Plan:
    """What a sample shows: its prompt, which the student reads, with the regions of its plan, whose own prompt may be another."""
    return Plan(prompt, () if plan is None else plan.regions)


def sample_digest(sample: TrainingSample) -> str:
    """SHA-256 of all that is learned from, but for its seed."""
    if isinstance(sample, ImagePair):
        return pair_digest(sample, include_plan=True, include_rewards=True)
    return digest("no pictures", sample.prompt, repr(sample.size), to_json(shown_plan(sample.prompt, sample.plan)))


def check_samples(samples: object) -> None:
    """Refuse what is no list of pairs and prompts.

    Raises:
        InvalidValueError: naming the first item that is neither.
    """
    if isinstance(samples, str | bytes) or not isinstance(samples, Sequence):
        raise argument_error(
            "train", "pairs", samples, expected="a list of artaug.ImagePair", advice="Put it in a list."
        )
    for index, sample in enumerate(samples):
        if not isinstance(sample, ImagePair | TrainingPrompt):
            raise argument_error(
                "train",
                f"pairs[{index}]",
                sample,
                expected="an instance of artaug.ImagePair or artaug.TrainingPrompt",
                advice="The pair of an attempt is attempt.pair, and a Skipped has none.",
            )


def check_needs(samples: Sequence[TrainingSample], objective: Objective, *, own_noise: bool) -> None:
    """Refuse samples that lack what is read of them.

    Args:
        samples: pairs and prompts.
        objective: what reads them.
        own_noise: whether each is noised with what it was drawn from.

    Raises:
        InvalidValueError: naming the first sample without pictures that are read, without a seed where its own noise is, or with
            a seed that no generator of torch takes.
    """
    name = type(objective).__name__
    reader = "own_noise=True" if own_noise else f"objective={name}"
    for index, sample in enumerate(samples):
        if isinstance(sample, TrainingPrompt) and objective.reads_pictures:
            raise InvalidValueError(
                f"{name} reads pictures, and pairs[{index}], {sample!r}, has none. Expected an artaug.ImagePair, or an objective "
                "that reads none, as AttentionObjective."
            )
        is_usable = sample.seed is not None and -(2**63) <= sample.seed < 2**64
        if not is_usable and (own_noise or objective.reads_own_noise):
            raise InvalidValueError(
                f"{reader} draws each pair's noise again from its seed, and pairs[{index}], {sample!r}, has "
                f"{'none' if sample.seed is None else 'one that torch.Generator does not take'}. Give it the seed that its "
                f"pictures were drawn with, or leave {reader} out."
            )
