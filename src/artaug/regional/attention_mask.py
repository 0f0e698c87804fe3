"""Group masks: the weight of every group of keys for every query, which is all that regional attention depends on.

A mask has a row for each query token and a column for each *group* of key tokens (one prompt, or the image tokens that
the same prompts govern): (queries, groups) in place of the (queries, keys) of a dense mask. Attention under it is
``softmax(q k / sqrt(d) + log w) v``, so a weight of 1 for every group is plain attention, and 0 hides a group.
"""

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
from artaug.regional.region_weights import RegionWeights


@dataclass(frozen=True, eq=False)
class GroupMask:
    """An attention mask of (queries, keys), stored as one weight for each query and *group* of keys.

    Masked attention is ``softmax(q k / sqrt(d) + log w) v``, with w the weight of the key's group for the query. If all
    weights are 1 it is plain attention; a weight of 0 hides the group. Multiplying all weights of one query by a
    constant changes nothing, since the softmax divides it out again.

    Raises:
        GuideError: if a weight is negative or not finite, or a query attends to no key, whose softmax would be NaN.
    """

    weights: Float[Tensor, "queries groups"]
    """Float32, on the CPU."""
    groups: Int[Tensor, " keys"]
    """The group of each key, on the CPU."""
    segments: tuple[slice, ...]
    """Neighbouring queries of one span (the image, one prompt); together they are all queries, in order."""

    def __post_init__(self) -> None:
        if not self.weights.isfinite().all() or (self.weights < 0).any():
            raise GuideError("a mask's weights hold negative numbers, NaN or infinity. Expected finite weights >= 0.")
        nonempty = torch.bincount(self.groups, minlength=self.weights.shape[1]) > 0
        empty_queries = ~(self.weights[:, nonempty] > 0).any(dim=1)
        if empty_queries.any():
            raise GuideError(
                f"{int(empty_queries.sum())} of {len(empty_queries)} query tokens would attend to no key, which gives "
                "NaN. Give each query a positive weight for a group that has keys."
            )

    @cached_property
    def bias(self) -> Float[Tensor, "queries keys"]:
        """What dense attention adds to its scores: ``log w``, minus infinity where a key is hidden."""
        return self.weights.log()[:, self.groups]

    @property
    def is_hard(self) -> bool:
        """Whether every query weighs all groups that it attends to equally, so that no bias is needed."""
        largest = self.weights.amax(dim=1, keepdim=True)
        return bool(((self.weights == 0) | (self.weights == largest)).all())


def joint_mask(spans: Sequence[Span], region_weights: RegionWeights, isolation: Isolation | None) -> GroupMask:
    """The mask of joint attention, where image and prompts attend to each other.

    Args:
        spans: the sequence, in order.
        region_weights: of the image's tokens.
        isolation: what may attend to what; None if all may attend to all.
    """
    groups = _JointGroups.of(spans, region_weights, isolation)
    weights = torch.zeros(len(groups.of_key), groups.count)
    start = 0
    for span in spans:
        weights[start : start + span.length] = groups.weights_for(span)
        start += span.length
    return GroupMask(weights, groups.of_key, _segments(spans))


def text_mask(spans: Sequence[Span], isolation: Isolation | None) -> GroupMask:
    """The mask of attention among prompts alone."""
    texts = [span for span in spans if span.kind in {"text", "padding"}]
    # A joint mask needs region weights; those of a single token stand in, since this sequence has no image tokens.
    no_regions = RegionWeights.of_one_token(1 + max(span.prompt for span in texts))
    return joint_mask(texts, no_regions, isolation)


def cross_mask(spans: Sequence[Span], region_weights: RegionWeights, isolation: Isolation | None) -> GroupMask:
    """The mask of cross-attention, where image tokens attend to prompts."""
    texts = [span for span in spans if span.kind in {"text", "padding"}]
    weights = region_weights.weights  # (prompts, tokens)
    # Groups 0 to len(weights) - 1 are the prompts, the last is the padding.
    padding = len(weights)
    groups = [torch.full((span.length,), span.prompt if span.kind == "text" else padding) for span in texts]
    if isolation is None or isolation.image_to_text == "open":
        weights = torch.ones_like(weights)
    present = torch.zeros(len(weights))
    present[[span.prompt for span in texts if span.kind == "text"]] = 1
    weights = torch.cat([weights * present[:, None], torch.zeros(1, weights.shape[1])]).T
    return GroupMask(weights.contiguous(), torch.cat(groups), (slice(0, len(weights)),))


@dataclass(frozen=True, eq=False)
class _JointGroups:
    """The groups of keys of a joint sequence, in this order: prompts, image tokens by class, reference, padding.

    Image tokens of one class attend, and are attended to, alike. So the mask needs a column for each class, of which
    there are a few, and not for each of thousands of image tokens.
    """

    of_key: Tensor
    """The group of each key: (keys,)."""
    num_prompts: int
    region_weights: RegionWeights
    isolation: Isolation | None

    @classmethod
    def of(cls, spans: Sequence[Span], region_weights: RegionWeights, isolation: Isolation | None) -> "_JointGroups":
        num_prompts, num_classes = region_weights.weights.shape[0], region_weights.num_classes
        other_groups = {"reference": num_prompts + num_classes, "padding": num_prompts + num_classes + 1}
        of_key = [
            num_prompts + region_weights.token_classes
            if span.kind == "image"
            else torch.full((span.length,), other_groups.get(span.kind, span.prompt))
            for span in spans
        ]
        return cls(torch.cat(of_key), num_prompts, region_weights, isolation)

    @property
    def count(self) -> int:
        return self.num_prompts + self.region_weights.num_classes + 2

    def weights_for(self, span: Span) -> Tensor:
        """Weights of every group for the queries of a span: (queries, groups), or one row if all are alike."""
        prompts, image = slice(0, self.num_prompts), slice(self.num_prompts, self.count - 2)
        reference, padding = -2, -1
        weights = torch.zeros(span.length if span.kind == "image" else 1, self.count)
        if span.kind == "padding":  # attends to itself, since a row of zeros would be NaN, and is attended to by none
            weights[:, padding] = 1
            return weights
        weights[:, reference] = 1
        if self.isolation is None:
            weights[:, :padding] = 1
        elif span.kind == "reference":
            weights[:, image], weights[:, 0] = 1, 1
        elif span.kind == "text":
            weights[:, image] = self._classes_for_prompt(span.prompt)
            weights[:, prompts] = float(self.isolation.text_to_text == "open")
            weights[:, span.prompt] = 1
        else:
            weights[:, image] = self._classes_for_image()
            open_to_all = self.isolation.image_to_text == "open"
            weights[:, prompts] = 1 if open_to_all else self.region_weights.weights.T
        return weights

    def _classes_for_prompt(self, prompt: int) -> Tensor:
        """Weights of the token classes for a prompt's queries: (classes,)."""
        if self.isolation is None or self.isolation.text_to_image == "open":
            return torch.ones(self.region_weights.num_classes)
        weights = torch.zeros(self.region_weights.num_classes)
        weights[self.region_weights.token_classes[self.region_weights.members[prompt]]] = 1
        return weights

    def _classes_for_image(self) -> Tensor:
        """Weights of the token classes for the image's queries: (tokens, classes), or one number for all."""
        if self.isolation is None or self.isolation.image_to_image == "open":
            return torch.ones(1, 1)
        visible = self.region_weights.class_visibility(self.isolation.image_to_image)
        return visible.float()[self.region_weights.token_classes]


def _segments(spans: Sequence[Span]) -> tuple[slice, ...]:
    edges = [0]
    for span in spans:
        edges.append(edges[-1] + span.length)
    return tuple(slice(low, high) for low, high in pairwise(edges) if low < high)
