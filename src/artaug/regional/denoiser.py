"""The seam between guides and models: a denoiser's prediction, its prompts and its attention. Each family subclasses it."""

import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn

from artaug._internal.modules import unwrap
from artaug.errors import GuideError
from artaug.regional.isolation import BALANCED, Isolation

Conditioning: TypeAlias = Mapping[str, Any]
"""Encoded prompts by the model's own names: tensors or lists, prompts along the first axis of each."""

ForwardKwargs: TypeAlias = Mapping[str, Any]
"""The keyword arguments a pipeline calls its denoiser with."""

Output: TypeAlias = Any
"""What a denoiser returns: its prediction, or a tuple or an output object of diffusers with the prediction first."""


class AttentionFn(Protocol):
    """Attention of queries to keys and values, all (batch, heads, tokens, channels of a head), as is the result."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, /) -> Tensor:
        """Attend.

        A processor passes ``attn_mask`` where the model's own call has one, in the form of ``scaled_dot_product_attention``
        with four axes; never in a call that holds the prompts of regions.
        """


@dataclass(frozen=True)
class EncodedPrompt:
    """One encoded prompt."""

    conditioning: Conditioning
    """One row of what `Conditioning` holds."""
    token_slice: slice
    """Where its own tokens are along the row; the rest is padding."""


@dataclass(frozen=True)
class Branches:
    """Which rows of a call's batch are predicted for the plans' prompts, and which for the negative prompt.

    Rows follow the order of the pictures. In a call of one branch alone the other is empty.
    """

    cond: range
    uncond: range = range(0)


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of one kind in an attention sequence."""

    kind: Literal["image", "text", "padding", "reference"]
    """Image tokens in row-major order; a prompt; padding, which is attended to by none; or a reference, such as the tokens
    of a reference picture, which all attend to and which attends to all but the regions' prompts."""
    length: int
    """How many tokens."""
    prompt: int = 0
    """For a text, the number of its prompt: 0 for the plan's own (or the negative prompt), i for the i-th region's."""


AttentionProcessor: TypeAlias = Any
"""An attention processor, of the model's own classes."""


class AttentionLayer(Protocol):
    """An attention layer of diffusers, whose processor can be replaced."""

    processor: AttentionProcessor

    def set_processor(self, processor: AttentionProcessor) -> None:
        """Use another processor from now on."""


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention layer."""

    attention: AttentionLayer
    """The layer, whose ``processor`` is replaced during a guided run."""
    block: int
    """Its number in the order of computation, from 0."""
    kind: Literal["joint", "cross", "text"] = "joint"
    """Whether image and texts attend to each other, the image to the texts, or texts to texts."""
    grid: tuple[int, int] | None = None
    """Rows and columns of its image tokens; None for those of the denoiser."""
    stack_start: int = 0
    """The number of the first block of its stack, where a model has several: FLUX's single blocks follow its double ones."""


def bind_forward_args(module: nn.Module, args: Sequence[Any], kwargs: ForwardKwargs) -> dict[str, Any]:
    """The arguments of a module's call, all by name: a few pipelines pass some by position."""
    names = list(inspect.signature(type(unwrap(module)).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


@dataclass(frozen=True, kw_only=True, eq=False)
class Denoiser(ABC):
    """The interface of a model to a guide, in one run. This much is enough for `OutputMix`."""

    latents_name: ClassVar[str] = "hidden_states"
    """The argument of a call that holds the latents."""

    module: nn.Module
    """The denoiser without wrappers, whose first output is the prediction."""
    grid: tuple[int, int]
    """Rows and columns of a prediction: of image tokens, or of latent pixels if it predicts those."""

    @abstractmethod
    def branches(self, kwargs: ForwardKwargs) -> Branches:
        """Which rows of the batch belong to the plans' prompts, and which to the negative prompt."""

    @abstractmethod
    def with_prompt_embeds(
        self, kwargs: ForwardKwargs, rows: Sequence[int], prompts: Sequence[EncodedPrompt]
    ) -> dict[str, Any]:
        """The arguments of the same call for these rows of the batch, each with another prompt."""

    def prediction(self, output: Output) -> Tensor:
        """The prediction in an output, batch first."""
        prediction: Tensor = output if isinstance(output, Tensor) else output[0]
        return prediction

    def with_prediction(self, output: Output, prediction: Tensor) -> Output:
        """The same kind of output with another prediction in it."""
        if isinstance(output, Tensor):
            return prediction
        if isinstance(output, tuple):
            return (prediction, *output[1:])
        first = dataclasses.fields(output)[0].name
        return dataclasses.replace(output, **{first: prediction})

    def latents_in(self, kwargs: ForwardKwargs) -> Tensor:
        """The latents in a call's arguments as the pipeline holds them between steps, one row for each picture.

        The default takes the first tokens of the argument `latents_name`, as many as `grid` has. Override it, and
        `with_latents`, for a model whose input has another form, or is scaled.

        Raises:
            GuideError: in the default, for a call without that argument.
        """
        if self.latents_name not in kwargs:
            raise GuideError(
                f"{type(self).__name__} does not say where the latents are in a call with {sorted(kwargs)}, so no guide can "
                "move them. Write its `latents_name`, and `latents_in` and `with_latents` where they have another form."
            )
        model_input: Tensor = kwargs[self.latents_name]
        return model_input[_picture_rows(self.branches(kwargs)), : math.prod(self.grid)]

    def with_latents(self, kwargs: ForwardKwargs, latents: Tensor) -> dict[str, Any]:
        """The arguments of the same call with other latents, in every branch of guidance."""
        return {**kwargs, self.latents_name: with_first(kwargs[self.latents_name], latents)}

    def select_rows(self, kwargs: ForwardKwargs, rows: range) -> dict[str, Any]:
        """The arguments of the same call for these rows of its batch alone.

        The default takes the rows of every tensor that has as many as the batch, in whatever it is nested.
        """
        branches = self.branches(kwargs)
        count = len(branches.cond) + len(branches.uncond)
        if len(rows) == count:
            return dict(kwargs)
        return {name: _rows_of(value, rows, count) for name, value in kwargs.items()}

    def with_gradients(self) -> AbstractContextManager[None]:
        """A ``with`` block in which calls of the module with gradients predict as those without do; by default nothing is needed."""
        return nullcontext()

    def broadcast_weights(self, weights: Tensor) -> Tensor:
        """Weights (rows, columns), shaped to multiply one row of a prediction, which by default is (tokens, channels)."""
        return rearrange(weights, "rows columns -> (rows columns) 1")


def with_first(tensor: Tensor, latents: Tensor) -> Tensor:
    """A model's input with other latents, which come first along its second axis, in as many branches as it has."""
    repeated = latents.to(tensor).repeat(len(tensor) // len(latents), *[1] * (latents.ndim - 1))
    rest = tensor[:, latents.shape[1] :]  # of what the pipeline puts behind them: a reference picture, a mask
    return torch.cat([repeated, rest], dim=1) if rest.shape[1] else repeated


def _picture_rows(branches: Branches) -> slice:
    """The rows of one branch of a call: each picture has one."""
    rows = branches.cond or branches.uncond
    return slice(rows.start, rows.stop)


def _rows_of(value: Any, rows: range, count: int) -> Any:  # noqa: ANN401 - whatever a pipeline passes
    if isinstance(value, Tensor):
        return value[rows.start : rows.stop] if value.ndim and len(value) == count else value
    if isinstance(value, Mapping):
        return {name: _rows_of(item, rows, count) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_rows_of(item, rows, count) for item in value)
    return value


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentiveDenoiser(Denoiser):
    """A denoiser whose attention can be guided, by `RegionalAttention`."""

    isolation: Isolation = BALANCED
    """The family's default of what attends to what; a guide's own isolation comes first."""

    def patched(self) -> AbstractContextManager[None]:
        """A ``with`` block in which the module has whatever other changes a guided run needs; by default none."""
        return nullcontext()

    @property
    @abstractmethod
    def sites(self) -> Sequence[AttentionSite]:
        """The layers where image tokens and prompts meet, in the order of computation."""

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens in attention."""
        return self.grid

    @abstractmethod
    def noise_level(self, kwargs: ForwardKwargs) -> float:
        """The noise level of a call's pictures, in [0, 1]: sigma of a flow model, else the timestep's fraction."""

    @abstractmethod
    def append_prompts(
        self, kwargs: ForwardKwargs, prompts: Sequence[Sequence[EncodedPrompt]], *, trim_padding: bool
    ) -> tuple[dict[str, Any], list[tuple[Span, ...]]]:
        """The same call with more prompts beside the one that each row has. Only called inside `patched`.

        Args:
            kwargs: the arguments of the pipeline's call.
            prompts: for every row of the batch the region prompts to add, possibly none.
            trim_padding: add the tokens of each prompt only, without its padding.

        Returns:
            The call's arguments, and for every row the spans of its joint sequence, in order. Rows with fewer prompts are
            padded.

        Raises:
            GuideError: if the prompts are longer than the model has positions for.
        """

    def spans(self, kwargs: ForwardKwargs) -> list[tuple[Span, ...]]:
        """For every row of a call the spans of its joint sequence, in order, as the pipeline makes the call.

        The default asks `append_prompts`, with no prompts to add.
        """
        rows = len(self.branches(kwargs).cond) + len(self.branches(kwargs).uncond)
        _, spans = self.append_prompts(kwargs, [()] * rows, trim_padding=True)
        return spans

    def token_stream(self, layer: str) -> Literal["image", "text", "joint"] | None:
        """What a layer works on, by its name: image tokens (of a convolution, pixels), all prompts' tokens, both, or none.

        A region's LoRA applies to its own tokens only, so a layer without tokens (a modulation) gets none of it.
        """
        return None

    @abstractmethod
    def processor(self, site: AttentionSite, attention_fn: AttentionFn) -> AttentionProcessor:
        """An attention processor like the one that a site has, but with ``attention_fn`` as its attention.

        Raises:
            GuideError: if the site has a processor of a class that this does not reproduce, naming it.
        """
