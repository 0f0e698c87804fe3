"""How a plan's regions steer sampling, without knowing whose model it is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from artaug.plan import Region
from artaug.regional.denoiser import Denoiser, EncodedPrompt


@dataclass(frozen=True)
class EncodedRegion:
    """A region and its encoded prompts."""

    region: Region
    prompt: EncodedPrompt
    """Its prompt."""
    negative_prompt: EncodedPrompt | None = None
    """Its negative prompt, if it has one."""


class Guide(ABC):
    """Makes regions count while a denoiser samples; installed for one run, leaving no trace after it."""

    @abstractmethod
    def steering(self, denoiser: Denoiser, regions: Sequence[Sequence[EncodedRegion]]) -> AbstractContextManager[None]:
        """Steer ``denoiser`` inside a ``with`` block; ``regions`` holds those of each picture of the batch."""
