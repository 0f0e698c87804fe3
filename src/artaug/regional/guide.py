"""The seam between a plan's regions and a denoiser: what a guide is, and the rule of one guide per denoiser."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from artaug.errors import GuideError
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
    """Makes regions take effect while a denoiser samples. It is installed for one run and leaves no trace."""

    @abstractmethod
    def steering(self, denoiser: Denoiser, regions: Sequence[Sequence[EncodedRegion]]) -> AbstractContextManager[None]:
        """Steer ``denoiser`` inside a ``with`` block; ``regions`` holds those of each picture of the batch."""


_ACTIVE_GUIDES: WeakKeyDictionary[nn.Module, Guide] = WeakKeyDictionary()


@contextmanager
def exclusive(module: nn.Module, guide: Guide) -> Iterator[None]:
    """Reserve a denoiser for one guide inside a ``with`` block. Every guide's ``steering`` begins with it.

    Raises:
        GuideError: if another guide is active on the denoiser, naming both.
    """
    if (active := _ACTIVE_GUIDES.get(module)) is not None:
        raise GuideError(
            f"{guide!r} cannot steer a {type(module).__name__} that {active!r} is steering. "
            "Draw with one guide at a time: a run has to end before the next begins on the same model."
        )
    _ACTIVE_GUIDES[module] = guide
    try:
        yield
    finally:
        del _ACTIVE_GUIDES[module]
