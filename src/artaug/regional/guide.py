"""The seam between a plan's regions and a denoiser: what a guide is, and the rule of one guide per denoiser."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakKeyDictionary

from torch import nn

from artaug._internal.contracts import contract_error
from artaug._internal.modules import outside_graphs, uncompiled
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

    needs_regions: ClassVar[bool] = False
    """Whether the guide does nothing where no plan of a batch has regions, so that it need not be installed then."""
    runs_compiled: ClassVar[bool] = False
    """Whether the guide acts in compiled code, so that a compiled denoiser stays compiled in its runs. In those of all others
    it runs as it is written: compiled code would pass over hooks within it."""

    @abstractmethod
    def steering(self, denoiser: Denoiser, regions: Sequence[Sequence[EncodedRegion]]) -> AbstractContextManager[None]:
        """Steer ``denoiser`` inside a ``with`` block; ``regions`` holds those of each picture of the batch, possibly none."""


@dataclass
class SteeredRun:
    """What shows that a guide acts: a run in which the denoiser was never called cannot have been steered."""

    guide: Guide
    denoiser: Denoiser
    called: bool = False
    """Whether the denoiser has been called while the guide was installed."""

    def check_called(self) -> None:
        """Refuse to go on after a first step without a call of the denoiser.

        Raises:
            GuideError: naming the guide.
        """
        if not self.called:
            raise GuideError(
                f"{self.guide!r} had no effect: a step was drawn without a call of the {type(self.denoiser.module).__name__} that "
                "it steers. The pipeline calls another model (one that was exported, compiled ahead of time, or put in its "
                "place). Put the model itself into the pipeline."
            )


def steer(
    guide: Guide, denoiser: Denoiser, regions: Sequence[Sequence[EncodedRegion]]
) -> AbstractContextManager[SteeredRun]:
    """Install a guide for a ``with`` block, and see whether the denoiser is called in it.

    Raises:
        ContractError: if ``steering`` did not return a context manager; one that yields needs
            ``@contextlib.contextmanager``.
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
    return _run(SteeredRun(guide, denoiser), block)


@contextmanager
def _run(run: SteeredRun, block: AbstractContextManager[None]) -> Iterator[SteeredRun]:
    """The run of an installed guide, compiled where the guide allows it. Hooks of the whole module run outside graphs."""

    def note_call(_module: nn.Module, _args: object) -> None:
        run.called = True

    module = run.denoiser.module
    with block, nullcontext() if run.guide.runs_compiled else uncompiled():
        hook = module.register_forward_pre_hook(outside_graphs(note_call))
        try:
            yield run
        finally:
            hook.remove()


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
