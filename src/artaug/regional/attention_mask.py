"""Sight: how strongly each query token sees each group of key tokens. All that regional attention has to know."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from artaug.errors import GuideError
from artaug.regional.denoiser import Span
from artaug.regional.isolation import Isolation
from artaug.regional.region_weights import Shares


@dataclass(frozen=True, eq=False)
class Sight:
    """Which keys a query sees, and how strongly.

    Attention under a sight is ``softmax(q k / sqrt(d) + log w) v``, w the weight of the key's group for the query.
    A weight of 1 for all is plain attention, of 0 is not to see; all weights of a query times a constant are the same.

    Raises:
        GuideError: if a weight is negative or not finite, or a query sees no key, whose softmax would be NaN.
    """

    weights: Float[Tensor, "queries groups"]
    """Float32, on the CPU."""
    groups: Int[Tensor, " keys"]
    """The group of each key, on the CPU."""
    segments: tuple[slice, ...]
    """Neighbouring queries of one kind, all queries together: of the image, of one prompt."""

    def __post_init__(self) -> None:
        if not self.weights.isfinite().all() or (self.weights < 0).any():
            raise GuideError("a sight's weights hold negative numbers, NaN or infinity. Expected finite weights >= 0.")
        held = torch.bincount(self.groups, minlength=self.weights.shape[1]) > 0
        blind = ~(self.weights[:, held] > 0).any(dim=1)
        if blind.any():
            raise GuideError(f"{int(blind.sum())} of {len(blind)} query tokens would see no key, which gives NaN.")

    @cached_property
    def bias(self) -> Float[Tensor, "queries keys"]:
        """What dense attention adds to its scores: ``log w``, minus infinity where nothing is seen."""
        return self.weights.log()[:, self.groups]

    @property
    def is_hard(self) -> bool:
        """Whether every query sees all it sees equally strongly, so that no bias is needed."""
        greatest = self.weights.amax(dim=1, keepdim=True)
        return bool(((self.weights == 0) | (self.weights == greatest)).all())


def joint_sight(spans: Sequence[Span], shares: Shares, isolation: Isolation | None) -> Sight:
    """The sight of joint attention, where image and prompts look at each other.

    Args:
        spans: the sequence, in order.
        shares: of the image's tokens.
        isolation: who may look at whom; None for all at all.
    """
    kinds = _Kinds.of(spans, shares, isolation)
    weights = torch.zeros(len(kinds.of_token), kinds.count)
    start = 0
    for span in spans:
        weights[start : start + span.length] = kinds.seen_by(span)
        start += span.length
    return Sight(weights, kinds.of_token, _segments(spans))


def text_sight(spans: Sequence[Span], isolation: Isolation | None) -> Sight:
    """The sight of attention among prompts alone."""
    texts = [span for span in spans if span.kind in {"text", "padding"}]
    nothing = Shares(torch.ones(1 + max(span.prompt for span in texts), 1))
    return joint_sight(texts, nothing, isolation)


def cross_sight(spans: Sequence[Span], shares: Shares, isolation: Isolation | None) -> Sight:
    """The sight of cross-attention, where image tokens look at prompts."""
    texts = [span for span in spans if span.kind in {"text", "padding"}]
    count = shares.weights.shape[0]
    groups = [torch.full((span.length,), span.prompt if span.kind == "text" else count) for span in texts]
    seen = shares.weights if isolation and isolation.image_to_text == "regions" else torch.ones_like(shares.weights)
    there = torch.zeros(count)
    there[[span.prompt for span in texts if span.kind == "text"]] = 1
    weights = torch.cat([seen * there[:, None], torch.zeros(1, seen.shape[1])]).T
    return Sight(weights.contiguous(), torch.cat(groups), (slice(0, len(weights)),))


@dataclass(frozen=True, eq=False)
class _Kinds:
    """The groups of keys of a joint sequence: each prompt, the image's tokens by signature, others, and fillers."""

    of_token: Tensor
    texts: int
    """Groups 0 to ``texts`` - 1 are the prompts; then come the image's, then others, then fillers."""
    shares: Shares
    isolation: Isolation | None

    @classmethod
    def of(cls, spans: Sequence[Span], shares: Shares, isolation: Isolation | None) -> "_Kinds":
        texts, images = shares.weights.shape[0], _signatures(shares)
        groups = {"reference": texts + images, "padding": texts + images + 1}
        parts = []
        for span in spans:
            if span.kind == "image":
                parts.append(texts + shares.signatures)
            else:
                parts.append(torch.full((span.length,), groups.get(span.kind, span.prompt)))
        return cls(torch.cat(parts), texts, shares, isolation)

    @property
    def count(self) -> int:
        return self.texts + _signatures(self.shares) + 2

    def seen_by(self, span: Span) -> Tensor:
        """Weights of every group for the queries of a span: (queries, groups), or one row for all of them."""
        image = slice(self.texts, self.count - 2)
        weights = torch.zeros(span.length if span.kind == "image" else 1, self.count)
        if span.kind == "padding":
            weights[:, -1] = 1
            return weights
        weights[:, -2] = 1
        if self.isolation is None:
            weights[:, :-1] = 1
        elif span.kind == "reference":
            weights[:, image], weights[:, 0] = 1, 1
        elif span.kind == "text":
            weights[:, image] = self._image_seen_by(span.prompt)
            weights[:, : self.texts] = float(self.isolation.text_to_text == "open")
            weights[:, span.prompt] = 1
        else:
            weights[:, image] = self._image_seen_by_image()
            open_to_all = self.isolation.image_to_text == "open"
            weights[:, : self.texts] = 1 if open_to_all else self.shares.weights.T
        return weights

    def _image_seen_by(self, prompt: int) -> Tensor:
        """Which signatures a prompt sees: (signatures,)."""
        signatures = self.shares.signatures
        seen = torch.zeros(_signatures(self.shares))
        if self.isolation and self.isolation.text_to_image == "open":
            return seen + 1
        seen[signatures[self.shares.reached[prompt]]] = 1
        return seen

    def _image_seen_by_image(self) -> Tensor:
        signatures = self.shares.signatures
        if self.isolation is None or self.isolation.image_to_image == "open":
            return torch.ones(1, 1)
        return self.shares.meeting(self.isolation.image_to_image).float()[signatures]


def _signatures(shares: Shares) -> int:
    """How many kinds of image tokens there are."""
    return int(shares.signatures.max()) + 1


def _segments(spans: Sequence[Span]) -> tuple[slice, ...]:
    edges = [0]
    for span in spans:
        edges.append(edges[-1] + span.length)
    return tuple(slice(low, high) for low, high in pairwise(edges) if low < high)
