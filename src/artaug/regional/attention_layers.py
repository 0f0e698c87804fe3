"""The attention of one run: one processor a layer, which the guides of the run share.

At most one guide computes attention at a layer, and any number observe it: what was asked of the layer, and the log-sum-exp of
each query's scores, from which any probability follows as ``exp(q k / sqrt(d) + bias - lse)``. A layer that nobody observes
computes what it would compute without observers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from artaug.errors import GuideError
from artaug.regional.attention import attention_with_lse, supports_merging
from artaug.regional.bias import Bias, MaskBias
from artaug.regional.compiled_attention import SteeredAttention
from artaug.regional.denoiser import AttentionFn, AttentionSite, AttentiveDenoiser
from artaug.regional.guided_call import CurrentCall


@dataclass(frozen=True, eq=False)
class Attended:
    """An attention that was computed, as an observer gets it."""

    query: Tensor
    """(batch, heads, queries, channels of a head)."""
    key: Tensor
    """(batch, heads, keys, channels of a head)."""
    out: Tensor
    """(batch, heads, queries, channels of a head)."""
    lse: Tensor | None
    """The log-sum-exp of the scaled and biased scores of each query, (batch, heads, queries) in float32, without gradient;
    None where the kernel does not return it."""
    bias: Bias | None
    """None where nothing is added to the scores."""


@runtime_checkable
class AttentionComputer(AttentionFn, Protocol):
    """Computes the attention of a layer so that other guides can observe it."""

    def attended(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, /) -> Attended:
        """The result with what observers need."""


Observer: TypeAlias = Callable[[AttentionSite, Attended], None]


class PlainAttention:
    """The model's own attention."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, /) -> Tensor:
        """Scaled dot product attention, as diffusers' own processors compute it."""
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)

    def attended(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, /) -> Attended:
        """The same, by the same kernel where that returns its log-sum-exp."""
        bias = None if attn_mask is None else _additive(attn_mask, query)
        added = None if bias is None else MaskBias(bias)
        if supports_merging(query.device) and query.dtype != torch.float64:  # whose log-sum-exp comes in float32
            kernel_bias = None if bias is None else bias.expand(-1, -1, query.shape[2], -1)
            out, lse = attention_with_lse(query, key, value, kernel_bias)
            return Attended(query, key, out, lse.detach(), added)
        return Attended(query, key, self(query, key, value, attn_mask), None, added)


class AttentionLayers:
    """The processors of one run, and the guides that work on them."""

    def __init__(self, denoiser: AttentiveDenoiser) -> None:
        """Take the layers of a denoiser; `installed` puts the processors in place."""
        self.denoiser: AttentiveDenoiser = denoiser
        self.sites: Sequence[AttentionSite] = tuple(denoiser.sites)
        self.current: CurrentCall = CurrentCall()
        """The call under way, where a guide adds prompts to it."""
        self._computers: Mapping[AttentionSite, AttentionFn] = {}
        self._computing: object = None
        """The guide that computes attention."""
        self._observers: list[Observer] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put the processors in place for a ``with`` block, and those of the model back afterwards."""
        attentions = [SteeredAttention(self._attention_fn(site), self.current) for site in self.sites]
        processors = [
            self.denoiser.processor(site, attention) for site, attention in zip(self.sites, attentions, strict=True)
        ]
        with ExitStack() as undo:
            undo.enter_context(self.denoiser.patched())
            for site, processor in zip(self.sites, processors, strict=True):
                undo.callback(site.attention.set_processor, site.attention.processor)
                site.attention.set_processor(processor)
            yield

    @contextmanager
    def computed_by(self, guide: object, computers: Mapping[AttentionSite, AttentionFn]) -> Iterator[None]:
        """Compute the attention of layers in a guide's way for a ``with`` block.

        Layers that are observed need an `AttentionComputer`, which also says how it computes.

        Raises:
            GuideError: if another guide of the run computes it already.
        """
        if self._computers:
            raise GuideError(
                f"{guide!r} cannot compute attention that another guide of the same run computes: of several guides, one can. "
                "OutputMix works beside it."
            )
        self._computers, self._computing = computers, guide
        try:
            yield
        finally:
            self._computers, self._computing = {}, None

    @contextmanager
    def observed_by(self, observer: Observer) -> Iterator[None]:
        """Call ``observer`` after every attention in a ``with`` block."""
        self._observers.append(observer)
        try:
            yield
        finally:
            self._observers.remove(observer)

    def _attention_fn(self, site: AttentionSite) -> AttentionFn:
        plain = PlainAttention()

        def attention_fn(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            compute = self._computers.get(site, plain)
            if not self._observers:
                return compute(query, key, value, attn_mask)
            if not isinstance(compute, AttentionComputer):
                raise GuideError(
                    f"{self._computing!r} computes attention by a function, which does not tell a guide beside it, such as "
                    "AttentionProbe, what it has computed. Give it a method `attended`: see artaug.regional.AttentionComputer."
                )
            attended = compute.attended(query, key, value, attn_mask)
            for observer in self._observers:
                observer(site, attended)
            return attended.out

        return attention_fn


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    """A mask of attention as what it adds to the scores, in the type of the queries: (rows, heads or 1, queries or 1, keys)."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)
    return mask.to(query)
