"""What workers do: small values that are sent to a replica and called there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
from PIL.Image import Image

from artaug.critique import Answer, Critic, run_critic
from artaug.errors import ContractError
from artaug.image_files import ImageFile, ImageFolder
from artaug.plan import Plan
from artaug.scale.pictures import Pixels, Sent, receive_pictures
from artaug.scale.replica import Replica
from artaug.scoring import Scorer
from artaug.synthesis import Synthesizer, Undrawn, draw_call

_MAX_VARIANTS = 4
"""LoRAs that a replica holds beside its model: those of two rounds, and some."""

Report = Callable[[object], None]


class SentLoRA(NamedTuple):
    """A LoRA that was sent to the cluster once, and is fetched by each worker that draws with it."""

    digest: str
    scale: float
    reference: Any
    """Of Ray, to the `LoRA`."""


def tuned(replica: Replica, loras: Sequence[SentLoRA]) -> Synthesizer:
    """The replica's synthesizer with LoRAs, which share its weights."""
    key = " ".join(f"{lora.digest}*{lora.scale!r}" for lora in loras)
    if key not in replica.variants:
        synthesizer: Synthesizer = replica.part
        for lora in loras:
            synthesizer = synthesizer.with_lora(ray.get(lora.reference), scale=lora.scale)
        replica.variants[key] = synthesizer
        for old in list(replica.variants)[:-_MAX_VARIANTS]:
            del replica.variants[old]
    made: Synthesizer = replica.variants[key]
    return made


@dataclass(frozen=True)
class Draw:
    """One call of a synthesizer, into a folder if there is one."""

    loras: tuple[SentLoRA, ...]
    plans: Sequence[Plan]
    seeds: Sequence[int]
    folder: ImageFolder | None

    def __call__(self, replica: Replica, report: Report) -> list[ImageFile | Pixels | Undrawn]:
        drawn = draw_call(tuned(replica, self.loras), self.plans, self.seeds, self.folder)
        return [Pixels.of(picture) if isinstance(picture, Image) else picture for picture in drawn]


@dataclass(frozen=True)
class Criticise:
    """One call of a critic."""

    pictures: Sequence[Sent]
    prompts: Sequence[str]

    def __call__(self, replica: Replica, report: Report) -> list[Answer]:
        return run_critic(replica.part, receive_pictures(self.pictures), self.prompts)


@dataclass(frozen=True)
class Score:
    """One call of a scorer."""

    pictures: Sequence[Sent]
    prompts: Sequence[str]

    def __call__(self, replica: Replica, report: Report) -> list[float]:
        return list(replica.part.score_batch(receive_pictures(self.pictures), self.prompts))


@dataclass(frozen=True)
class UseSynthesizer:
    """A call of a function of a synthesizer and of a function that reports events."""

    loras: tuple[SentLoRA, ...]
    function: Callable[[Any, Report], Any]

    def __call__(self, replica: Replica, report: Report) -> Any:  # noqa: ANN401 - of the function
        return self.function(tuned(replica, self.loras), report)


def synthesizer_facts(part: object) -> dict[str, Any]:
    """What a cluster's synthesizer says of itself.

    Raises:
        ContractError: for something else than a synthesizer.
    """
    made = _of(part, Synthesizer)
    return {"name": type(made).__name__, "draws_regions": made.draws_regions, "picture_size": made.picture_size}


def critic_facts(part: object) -> dict[str, Any]:
    """What a cluster's critic says of itself.

    Raises:
        ContractError: for something else than a critic.
    """
    return {"name": type(_of(part, Critic)).__name__}


def scorer_facts(part: object) -> dict[str, Any]:
    """What a cluster's scorer says of itself.

    Raises:
        ContractError: for something else than a scorer.
    """
    made = _of(part, Scorer)
    return {"name": made.name, "depends_on": made.depends_on}


def _of(part: object, kind: type) -> Any:  # noqa: ANN401 - an object of ``kind``, which may be abstract
    if not isinstance(part, kind):
        raise ContractError(
            f"the function returned {type(part).__name__} {part!r:.120}. Expected an artaug.{kind.__name__}, made there."
        )
    return part
