"""The seam between a plan and a denoiser: what a guide is, several of them together, and one run at a time on a model."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar, final
from weakref import WeakKeyDictionary

from torch import nn

from artaug._internal.arguments import check_items
from artaug._internal.contracts import check_result, contract_error
from artaug._internal.modules import uncompiled
from artaug.errors import GuideError, InvalidValueError
from artaug.plan import Plan
from artaug.regional.guided_run import GuidedRun


class Guide(ABC):
    """Acts on a denoiser while it samples. It is asked for every drawing, applied for one run, and leaves no trace."""

    runs_compiled: ClassVar[bool] = False
    """Whether the guide acts in compiled code, so that a compiled denoiser stays compiled in its runs. In those of all others
    it runs as it is written: compiled code would pass over hooks within it."""

    @property
    def runs_cached(self) -> bool:
        """Whether it can guide a denoiser that reuses in a step what its layers computed in earlier ones (`enable_cache`)."""
        return False

    @abstractmethod
    def applied(self, run: GuidedRun) -> AbstractContextManager[None]:
        """Act on ``run.denoiser`` inside a ``with`` block, and take everything back at its end."""

    def declines(self, plans: Sequence[Plan]) -> bool:
        """Whether the guide has nothing to do in a drawing of these plans, which is then bit for bit one without a guide."""
        return False

    @property
    def reads_regions(self) -> bool:
        """Whether the guide makes regions take effect: a plan with regions is an error where no guide does."""
        return True


@final
@dataclass(frozen=True)
class Together(Guide):
    """Several guides in one run.

    Each is asked for itself: one that declines the plans is left out. Guides that work on attention share the one processor
    that a layer has. The first is applied first, so that hooks of later ones get what earlier ones made of a prediction. A
    guide's own predictions (those of `OutputMix` under a region's prompt) are not steered by the others.

    Raises:
        InvalidValueError: without guides, or for one that is none.

    >>> import artaug as aa
    >>> aa.Together((aa.RegionalAttention(), aa.OutputMix())).reads_regions
    True
    """

    runs_compiled: ClassVar[bool] = True  # each guide says so for itself

    guides: Sequence[Guide]
    """In the order in which they are applied."""

    def __post_init__(self) -> None:
        check_items("Together", "guides", self.guides, Guide)
        object.__setattr__(self, "guides", tuple(self.guides))  # a list, too
        if not self.guides:
            raise InvalidValueError("Together(()) would guide nothing: expected one or more guides.")

    @contextmanager
    def applied(self, run: GuidedRun) -> Iterator[None]:
        with ExitStack() as stack:
            for guide in self.guides:
                if not declines(guide, run.plans):
                    stack.enter_context(_applied(guide, run))
            yield

    def declines(self, plans: Sequence[Plan]) -> bool:
        return all(declines(guide, plans) for guide in self.guides)

    @property
    def reads_regions(self) -> bool:
        return any(guide.reads_regions for guide in self.guides)

    @property
    def runs_cached(self) -> bool:
        return all(guide.runs_cached for guide in self.guides)


def declines(guide: Guide, plans: Sequence[Plan]) -> bool:
    """Ask a guide whether it declines plans.

    Raises:
        ContractError: if it answers with something else than a bool.
    """
    return check_result(
        type(guide).__name__, "declines", guide.declines(plans), of=bool, inputs=f"{len(plans)} plan(s)"
    )


@contextmanager
def steer(guide: Guide, run: GuidedRun) -> Iterator[GuidedRun]:
    """Apply a guide to a run for a ``with`` block. Everything that guides goes through here.

    Raises:
        ContractError: if ``applied`` did not return a context manager; one that yields needs
            ``@contextlib.contextmanager``.
        GuideError: if another run on the same model has not ended, naming both.
    """
    with _reserved(run.denoiser.module, guide), run.watched(), _applied(guide, run):
        yield run


def _applied(guide: Guide, run: GuidedRun) -> AbstractContextManager[None]:
    """A guide's block, in which a model is compiled only where the guide allows it."""
    block: object = guide.applied(run)
    if not isinstance(block, AbstractContextManager):
        raise contract_error(
            type(guide).__name__,
            "applied",
            received=f"{type(block).__name__} {block!r:.120}",
            inputs=f"a {type(run.denoiser).__name__} and {len(run.plans)} plan(s)",
            expected="a context manager, as of a method with @contextlib.contextmanager",
        )
    return block if guide.runs_compiled else _as_written(block, run)


@contextmanager
def _as_written(block: AbstractContextManager[None], run: GuidedRun) -> Iterator[None]:
    """A guide's block without compiled code, in which its hooks may do what they like."""
    with uncompiled(), block, run.hooks_noted():
        yield


_ACTIVE_GUIDES: WeakKeyDictionary[nn.Module, Guide] = WeakKeyDictionary()


@contextmanager
def _reserved(module: nn.Module, guide: Guide) -> Iterator[None]:
    """Reserve a denoiser for one run inside a ``with`` block."""
    if (active := _ACTIVE_GUIDES.get(module)) is not None:
        raise GuideError(
            f"{guide!r} cannot steer a {type(module).__name__} that {active!r} is steering. A run has to end before the "
            "next begins on the same model; to guide one run by both, use Together."
        )
    _ACTIVE_GUIDES[module] = guide
    try:
        yield
    finally:
        del _ACTIVE_GUIDES[module]
