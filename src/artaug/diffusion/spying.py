"""A denoiser that shows what passes through it, for `artaug.diffusion.checking`."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from artaug.regional.denoiser import (
    AttentionFn,
    AttentionSite,
    AttentiveDenoiser,
    Branches,
    EncodedPrompt,
    ForwardKwargs,
    Processor,
    Span,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Spy(AttentiveDenoiser):
    """A denoiser that shows what passes through it."""

    inner: Any
    watch: Callable[["Spy"], None]
    state: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def level(self) -> float:
        return float(self.state["level"])

    def own_tokens(self, *, region: int) -> list[Tensor]:
        """What the first layer with an image answers to the tokens of the left half, and of a region's prompt."""
        answer, spans, kind = (self.state[name] for name in ("answer", "spans", "kind"))
        rows, columns = self.state["grid"] or self.inner.token_grid
        left = (torch.arange(rows)[:, None] * columns + torch.arange(columns // 2)).flatten()
        if kind == "cross":
            return [answer[-1:, :, left]]
        parts, start = [], 0
        for span in spans:
            if span.kind == "image":
                parts.append(answer[-1:, :, left + start])
            elif span.kind == "text" and span.prompt == region:
                parts.append(answer[-1:, :, start : start + span.length])
            start += span.length
        return parts

    def patched(self) -> AbstractContextManager[None]:
        patched: AbstractContextManager[None] = self.inner.patched()
        return patched

    @property
    def sites(self) -> Sequence[AttentionSite]:
        sites: Sequence[AttentionSite] = self.inner.sites
        return sites

    @property
    def token_grid(self) -> tuple[int, int]:
        grid: tuple[int, int] = self.inner.token_grid
        return grid

    def branches(self, kwargs: ForwardKwargs) -> Branches:
        branches: Branches = self.inner.branches(kwargs)
        return branches

    def with_prompt_embeds(
        self, kwargs: ForwardKwargs, rows: Sequence[int], prompts: Sequence[EncodedPrompt]
    ) -> dict[str, Any]:
        changed: dict[str, Any] = self.inner.with_prompt_embeds(kwargs, rows, prompts)
        return changed

    def noise_level(self, kwargs: ForwardKwargs) -> float:
        self.state["level"] = self.inner.noise_level(kwargs)
        return self.level

    def append_prompts(
        self, kwargs: ForwardKwargs, prompts: Sequence[Sequence[EncodedPrompt]], *, trim_padding: bool
    ) -> tuple[dict[str, Any], list[tuple[Span, ...]]]:
        changed, spans = self.inner.append_prompts(kwargs, prompts, trim_padding=trim_padding)
        self.state["spans"] = spans[-1]
        return changed, spans

    def processor(self, site: AttentionSite, attention_fn: AttentionFn) -> Processor:
        def shown(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            answer = attention_fn(query, key, value)
            if site.kind != "text":
                self.state.update(answer=answer.clone(), kind=site.kind, grid=site.grid)
                self.watch(self)
            return answer

        return self.inner.processor(site, shown)


@dataclass(eq=False)
class First:
    """Keeps what the first layer of a run answered to the left half and its prompt."""

    tokens: list[Tensor] = dataclasses.field(default_factory=list)

    def __call__(self, spy: Spy) -> None:
        self.tokens = self.tokens or spy.own_tokens(region=1)
