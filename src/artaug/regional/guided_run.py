"""A guided run: what a guide is given of one drawing, or one prediction in training, and what guides share in it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

from artaug._internal.modules import outside_graphs
from artaug.errors import GuideError
from artaug.plan import Plan, Region
from artaug.regional.attention_layers import AttentionLayers
from artaug.regional.denoiser import (
    AttentiveDenoiser,
    Branches,
    Denoiser,
    EncodedPrompt,
    ForwardKwargs,
    bind_forward_args,
)

PhraseTokens: TypeAlias = Callable[[str, Sequence[str]], Sequence[tuple[int, ...]]]
"""The tokens of phrases in a prompt, as `artaug.diffusion.Family.phrase_tokens` gives them."""

Mover: TypeAlias = Callable[..., Tensor]
"""Moves latents before a step; takes and gives what `artaug.LatentGuide.moved` does."""


class Moves(Protocol):
    """The moves of a drawing, as its calls of the denoiser need them."""

    def before_call(self, call: "DenoiserCall", /) -> "DenoiserCall":
        """The same call with the latents of its step."""

    def after_hooks(self, call: "DenoiserCall", kwargs: ForwardKwargs, /) -> None:
        """Take over the latents that hooks of a guide have replaced in a call."""


@dataclass(frozen=True)
class EncodedRegion:
    """A region and its encoded prompts."""

    region: Region
    prompt: EncodedPrompt
    """Its prompt."""
    negative_prompt: EncodedPrompt | None = None
    """Its negative prompt, if it has one."""


@dataclass(frozen=True, eq=False)
class EncodedPlan:
    """A plan of a drawing whose prompt is encoded, as a guide sees it that moves the embeddings."""

    plan: Plan
    token_slice: slice
    """Where the prompt's own tokens are among its embeddings, special ones included; the rest is padding."""
    phrase_tokens: PhraseTokens = field(repr=False)
    """Where a prompt's tokens are, by the model's family; `phrase` is made of it."""

    def phrase(self, text: str) -> tuple[int, ...]:
        """Which embeddings are those of a phrase: their numbers, rising, as `GuidedRun.phrase` finds them.

        Args:
            text: part of the prompt, such as ``"red cone"``.

        Raises:
            GuideError: if the prompt does not hold it.
        """
        (found,) = self.phrase_tokens(self.plan.prompt, [text])
        if not found:
            raise absent_phrase(text, [self.plan.prompt])
        return tuple(found)


def absent_phrase(text: str, prompts: Sequence[str]) -> GuideError:
    """The error of a phrase that no prompt of a drawing holds."""
    return GuideError(
        f"the phrase {text!r} is in none of the prompts {list(prompts[:3])!r} as the model reads them. Expected whole "
        "words of a prompt, in its order, before what is cut off."
    )


@dataclass(frozen=True, eq=False)
class DenoiserCall:
    """One call of a run's denoiser, as the pipeline makes it."""

    denoiser: Denoiser
    kwargs: ForwardKwargs
    """Its arguments by name, before any guide has changed them, but for latents that guides have moved."""
    trial: object | None = None
    """What tells the trials of one move of the latents from all others, see `GuidedRun.trials`; None for a call that draws."""

    @cached_property
    def branches(self) -> Branches:
        """Which rows of the batch belong to the plans' prompts, and which to the negative prompt."""
        return self.denoiser.branches(self.kwargs)


@dataclass(kw_only=True, eq=False)
class GuidedRun:
    """One drawing of a batch of plans, or one prediction in training, as its guides see it."""

    denoiser: Denoiser
    """The model."""
    plans: Sequence[Plan]
    """One for each picture of the batch."""
    regions: Sequence[Sequence[EncodedRegion]]
    """The regions of each picture with their prompts encoded, possibly none."""
    phrase_tokens: PhraseTokens = field(repr=False)
    """Where a prompt's tokens are, by the model's family; `phrase` is made of it."""
    token_slices: Sequence[slice] = ()
    """Where each plan's own tokens are in its encoded prompt, special ones included: see `artaug.diffusion.Family.token_slices`;
    empty where nothing says."""
    call: DenoiserCall | None = field(default=None, init=False, repr=False)
    """The last call of the denoiser that the pipeline made; None before the first, and in `aside`."""
    movers: list[Mover] = field(default_factory=list, init=False, repr=False)
    """What moves the latents before every step, in this order: see `latents_moved_by`."""
    moves: Moves | None = field(default=None, init=False, repr=False)
    """How the drawing puts moved latents into its steps; None in a run that draws nothing."""
    trial: object | None = field(default=None, init=False, repr=False)
    """What tells the trials under way from all others; None outside `trials`."""
    _layers: AttentionLayers | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._called = False
        self._is_aside = False

    def phrase(self, text: str) -> tuple[tuple[int, ...], ...]:
        """Which tokens of each picture's encoded prompt hold a phrase: numbers in a row of `artaug.diffusion.Family.encode_prompts`, rising.

        A phrase is found by whole words, in upper or lower case, wherever it stands. Where a model reads a prompt with
        several encoders whose tokens stand one after the other (SD3), the tokens of all of them count.

        Args:
            text: part of a prompt, such as ``"red cone"``.

        Returns:
            The tokens for each picture, none for one whose prompt does not hold the phrase.

        Raises:
            GuideError: if no picture's prompt holds it.
        """
        tokens: list[tuple[int, ...]] = []
        for plan in self.plans:
            (found,) = self.phrase_tokens(plan.prompt, [text])
            tokens.append(tuple(found))
        if not any(tokens):
            raise absent_phrase(text, [plan.prompt for plan in self.plans])
        return tuple(tokens)

    @contextmanager
    def attention(self) -> Iterator[AttentionLayers]:
        """The attention of the denoiser for a ``with`` block: one processor a layer, which all guides of the run share.

        Raises:
            GuideError: for a denoiser that does not say where its attention is, or an attention that has a processor which
                would be lost.
        """
        if self._layers is not None:
            yield self._layers
            return
        if not isinstance(self.denoiser, AttentiveDenoiser):
            raise GuideError(
                f"{type(self.denoiser).__name__} does not say where its model's attention is, so attention cannot be "
                "guided. Use OutputMix, or make it an AttentiveDenoiser."
            )
        layers = AttentionLayers(self.denoiser)
        with layers.installed():
            self._layers = layers
            try:
                yield layers
            finally:
                self._layers = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A ``with`` block in which calls of the denoiser are a guide's own, and no guide of the run acts on them.

        `call` is None in it: a hook of a guide that finds None has nothing to do.
        """
        outer, was_aside = self.call, self._is_aside
        self.call, self._is_aside = None, True
        try:
            with nullcontext() if self._layers is None else self._layers.current.kept():
                yield
        finally:
            self.call, self._is_aside = outer, was_aside

    @contextmanager
    def latents_moved_by(self, move: Mover) -> Iterator[None]:
        """Have the latents moved before every step of the drawing, inside a ``with`` block.

        Args:
            move: is called as `artaug.LatentGuide.moved` is, after those that came before it, with the latents that they gave.
        """
        self.movers.append(move)
        try:
            yield
        finally:
            self.movers.remove(move)

    @contextmanager
    def trials(self) -> Iterator[None]:
        """A ``with`` block in which calls of the denoiser try latents for one move, and draw nothing.

        The run's guides act on them. A guide that notes what is drawn leaves out calls whose `DenoiserCall.trial` is another
        than the `trial` in which it was applied.
        """
        outer, self.trial, self.call = self.trial, object(), None
        try:
            yield
        finally:
            self.trial = outer

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keep `call` up to date in a ``with`` block, and put moved latents into it, by a hook that runs outside graphs.

        Raises:
            GuideError: by the hook, if a guide moves latents in a run that draws nothing.
        """

        def note_call(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[()], dict[str, Any]] | None:
            self._called = True
            if self._is_aside:
                return None
            call = DenoiserCall(self.denoiser, bind_forward_args(module, args, kwargs), self.trial)
            if self.trial is not None or not self.movers:
                self.call = call
                return None
            if self.moves is None:
                raise GuideError(
                    f"{len(self.movers)} guide(s) of this run move latents before a step, and it has no steps: it is one "
                    "prediction, as in training. Draw with them by DiffusersSynthesizer(..., guide=...)."
                )
            moved = self.moves.before_call(call)
            self.call = moved
            return None if moved is call else ((), dict(moved.kwargs))

        hook = self.denoiser.module.register_forward_pre_hook(outside_graphs(note_call), with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def hooks_noted(self) -> Iterator[None]:
        """A ``with`` block in which latents that hooks of a guide, registered before it, replace are those of the step, too."""

        def note_latents(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.moves is not None and self.call is not None and self.call.trial is None:
                self.moves.after_hooks(self.call, bind_forward_args(module, args, kwargs))

        with self.denoiser.module.register_forward_pre_hook(outside_graphs(note_latents), with_kwargs=True):
            yield

    def check_called(self, guide: object) -> None:
        """Refuse to go on after a first step without a call of the denoiser: a guide cannot have acted.

        Raises:
            GuideError: naming the guide.
        """
        if not self._called:
            raise GuideError(
                f"{guide!r} had no effect: a step was drawn without a call of the {type(self.denoiser.module).__name__} that "
                "it steers. The pipeline calls another model (one that was exported, compiled ahead of time, or put in its "
                "place). Put the model itself into the pipeline."
            )
