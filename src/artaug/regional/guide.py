"""The seam between a plan and a denoiser: what a guide is, several of them together, and one run at a time on a model."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar, final
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from artaug._internal.annotations import Seam, checked
from artaug._internal.arguments import check_items
from artaug._internal.contracts import check_result, contract_error
from artaug._internal.modules import uncompiled
from artaug.errors import GuideError, InvalidValueError, NonFiniteError
from artaug.plan import Plan
from artaug.regional.guided_run import EncodedPlan, GuidedRun


class Guide(Seam):
    """Acts on a denoiser while it samples. It is asked for every drawing, applied for one run, and leaves no trace."""

    runs_compiled: ClassVar[bool] = False
    """Whether the guide acts in compiled code, so that a compiled denoiser stays compiled in its runs. In those of all others
    it runs as it is written: compiled code would pass over hooks within it."""

    @property
    def runs_cached(self) -> bool:
        """Whether it can guide a denoiser that reuses in a step what its layers computed in earlier ones (``enable_cache``)."""
        return False

    @abstractmethod
    def applied(self, run: GuidedRun) -> AbstractContextManager[None]:
        """Act on ``run.denoiser`` inside a ``with`` block, and take everything back at its end."""

    def declines(self, plans: Sequence[Plan]) -> bool:
        """Whether the guide has nothing to do in a drawing of these plans, which is then bit for bit one without a guide."""
        return False

    def embedded(
        self, embeds: Float[Tensor, "tokens channels"], encoded: EncodedPlan
    ) -> Float[Tensor, "tokens channels"]:
        """The embeddings of a plan's prompt to draw with; by default those that the text encoder gave.

        It is called for each picture of a drawing, before that begins. Pooled embeddings, and the prompts of regions and the negative
        prompt, stay as they were.

        Args:
            embeds: float32, padding included, a copy: what the model reads token by token. Two encoders of SD3 stand one
                after the other among the tokens, those of SDXL among the channels.
            encoded: the plan, and where its phrases are.

        Returns:
            Embeddings of the same shape. If they are equal to ``embeds``, the prompt is drawn as it was.
        """
        return embeds

    @property
    def reads_regions(self) -> bool:
        """Whether the guide makes regions take effect: a plan with regions is an error where no guide does."""
        return True


@checked
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


def moves_embeddings(guide: Guide) -> bool:
    """Whether a guide, or one of `Together`, has an ``embedded`` of its own."""
    if isinstance(guide, Together):
        return any(map(moves_embeddings, guide.guides))
    return type(guide).embedded is not Guide.embedded


def embed(guide: Guide, plans: Sequence[EncodedPlan], embeds: Tensor) -> Tensor:
    """Let a guide, or those of `Together` that do not decline, move the embeddings of prompts one after the other.

    Args:
        guide: to be asked for each plan.
        plans: of one drawing.
        embeds: (plans, tokens, channels).

    Returns:
        The embeddings to draw with: ``embeds`` itself where none was moved, since denoisers know the branches of a call by it.

    Raises:
        ContractError: if a guide returns anything but embeddings of the same shape.
        NonFiniteError: for NaN or infinity.
    """
    if isinstance(guide, Together):
        for member in guide.guides:
            embeds = embed(member, plans, embeds)
        return embeds
    if not moves_embeddings(guide) or declines(guide, [encoded.plan for encoded in plans]):
        return embeds
    moved = torch.stack([_embedded(guide, row, encoded) for row, encoded in zip(embeds, plans, strict=True)])
    return embeds if torch.equal(moved, embeds) else moved


def _embedded(guide: Guide, embeds: Tensor, encoded: EncodedPlan) -> Tensor:
    """What a guide makes of one prompt's embeddings, in their type."""
    name, inputs = type(guide).__name__, repr(encoded.plan.prompt)
    given = embeds.to(torch.promote_types(embeds.dtype, torch.float32), copy=True)
    moved = check_result(name, "embedded", guide.embedded(given, encoded), of=Tensor, inputs=inputs)
    if moved.shape != embeds.shape:
        raise contract_error(
            name,
            "embedded",
            received=f"embeddings of shape {tuple(moved.shape)}",
            inputs=inputs,
            expected=f"the shape {tuple(embeds.shape)} of those that it was given",
        )
    if not moved.isfinite().all():
        raise NonFiniteError(f"{name}.embedded moved the embeddings of {inputs} to NaN or infinity. Move them less.")
    return moved.detach().to(embeds)


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
