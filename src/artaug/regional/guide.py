"""The seam between a plan's regions and a denoiser: what a guide is, and the rule of one guide per denoiser."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from artaug._internal.contracts import contract_error
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


def steer(guide: Guide, denoiser: Denoiser, regions: Sequence[Sequence[EncodedRegion]]) -> AbstractContextManager[None]:
    """Call a guide and check that it returned a context manager.

    Raises:
        ContractError: if it did not; a ``steering`` that yields needs ``@contextlib.contextmanager``.
    """
    block: object = guide.steering(denoiser, regions)
    if not isinstance(block, AbstractContextManager):
        raise contract_error(
            type(guide).__name__,
            "steering",
            received=f"{type(block).__name__} {block!r:.120}",
            inputs=f"a {type(denoiser).__name__} and the regions of {len(regions)} picture(s)",
            expected="a context manager, as of a method with @contextlib.contextmanager",
        )
    return block


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
