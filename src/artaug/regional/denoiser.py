"""What a guide knows of a model: its prediction, its prompts, and its attention. One short class a family writes it."""

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor, nn

from artaug.regional.isolation import BALANCED, Isolation

Conditioning: TypeAlias = Mapping[str, Any]
"""Encoded prompts, by the model's own names: tensors or lists, the first axis of each counting the prompts."""

ForwardKwargs: TypeAlias = Mapping[str, Any]
"""The keyword arguments a pipeline calls its denoiser with."""

Output: TypeAlias = Any
"""What a denoiser returns: its prediction, or a tuple or an object of diffusers that begins with it."""

AttentionFn: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of queries to keys and values, all (batch, heads, tokens, channels of a head); so is the result."""


@dataclass(frozen=True)
class EncodedPrompt:
    """One encoded prompt."""

    conditioning: Conditioning
    """One row of what `Conditioning` holds."""
    token_slice: slice
    """Where along the row its own tokens are; the rest is padding."""


@dataclass(frozen=True)
class Branches:
    """Which rows of a call's batch are predicted for the plans' prompts, and which for the negative prompt.

    Rows follow the order of the pictures. A call of one branch alone has the other one empty.
    """

    cond: range
    uncond: range = range(0)


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of an attention sequence that are of one kind."""

    kind: Literal["image", "text", "padding", "reference"]
    """Image tokens in rows; a prompt; tokens that mean nothing and nobody may see; or tokens that all see and that see
    all but the regions' prompts, as those of a reference picture."""
    length: int
    """How many tokens."""
    prompt: int = 0
    """For a text, whose: 0 for the plan's own (or the negative prompt), i for the i-th region's."""


Processor: TypeAlias = Any
"""What computes an attention layer, of the model's own classes."""


class AttentionLayer(Protocol):
    """A layer as diffusers has them, whose computing can be replaced."""

    processor: Processor

    def set_processor(self, processor: Processor) -> None:
        """Compute with another processor from now on."""


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention layer."""

    attention: AttentionLayer
    """The layer, whose ``processor`` is replaced while a guide is at work."""
    block: int
    """Its place in the order of computation, from 0."""
    kind: Literal["joint", "cross", "text"] = "joint"
    """Whether image and texts look at each other, the image looks at the texts, or texts look at texts."""
    grid: tuple[int, int] | None = None
    """Rows and columns of its image tokens; None for those of the denoiser."""


def bind_forward_args(module: nn.Module, args: Sequence[Any], kwargs: ForwardKwargs) -> dict[str, Any]:
    """A call with its positional arguments by name, since a few pipelines pass some of them so."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


@dataclass(frozen=True, kw_only=True, eq=False)
class Denoiser(ABC):
    """A model in one run, as a guide sees it. This much is enough for `OutputMix`."""

    module: nn.Module
    """The denoiser, its first output the prediction."""
    grid: tuple[int, int]
    """Rows and columns of a prediction: of image tokens, or of latent pixels where that is what it predicts."""

    @abstractmethod
    def branches(self, kwargs: ForwardKwargs) -> Branches:
        """Which rows of the batch belong to the plans' prompts, and which to the negative prompt."""

    @abstractmethod
    def with_prompt_embeds(
        self, kwargs: ForwardKwargs, rows: Sequence[int], prompts: Sequence[EncodedPrompt]
    ) -> dict[str, Any]:
        """The same call for these rows of the batch, each with another prompt."""

    def prediction(self, output: Output) -> Tensor:
        """The prediction in an output, the batch first: it is a tensor, or what holds one in the first place."""
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

    def broadcast_weights(self, weights: Tensor) -> Tensor:
        """Weights of (rows, columns), shaped to multiply one row of a prediction: here (tokens, channels)."""
        return weights.reshape(-1, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentiveDenoiser(Denoiser):
    """A denoiser whose attention can be guided, by `RegionalAttention`."""

    isolation: Isolation = BALANCED
    """What regions and prompts see of each other, where the guide has no isolation of its own."""

    def patched(self) -> AbstractContextManager[None]:
        """Whatever else has to be in place during a run, and is gone after it; nothing unless a family says so."""
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
        """How noisy the pictures of a call are, in [0, 1]: sigma of a flow model, else the timestep's fraction."""

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

    def token_stream(self, layer: str) -> Literal["image", "text", "joint"] | None:
        """What a layer works on, by its name: image tokens (of a convolution, pixels), all prompts' tokens, both, or none.

        A LoRA of a region is worn by its own tokens only, so a layer without tokens (a modulation) wears none of it.
        """
        return None

    @abstractmethod
    def processor(self, site: AttentionSite, attention_fn: AttentionFn) -> Processor:
        """The attention processor of a site, as it is but for one thing: it calls ``attention_fn``.

        Raises:
            GuideError: if the site has a processor that this would not be a twin of, naming it.
        """
