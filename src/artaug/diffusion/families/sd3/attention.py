"""SD3's joint attention, told apart by regions: diffusers' own processor with another attention at its heart."""

from typing import Self

import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor, nn

from artaug.diffusion.families.common import check_processor
from artaug.errors import GuideError
from artaug.regional.denoiser import AttentionFn, AttentionLayer


class RegionalSD3Processor:
    """Twin of `JointAttnProcessor2_0`, line by line, that attends as it is told."""

    def __init__(self, attention_fn: AttentionFn) -> None:
        """Attend with ``attention_fn``, the image before the prompts."""
        self._attention_fn = attention_fn

    @classmethod
    def like(cls, attention: AttentionLayer, attention_fn: AttentionFn) -> Self:
        """The twin of a layer's processor.

        Raises:
            GuideError: if the layer has another processor than SD3's own.
        """
        check_processor(attention, JointAttnProcessor2_0)
        return cls(attention_fn)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if attention_mask is not None:
            raise GuideError("SD3's attention was given an attention_mask, which it drops. Leave it out.")
        heads = (attn.heads, -1)
        query, key, value = (
            to(hidden_states).unflatten(-1, heads).transpose(1, 2) for to in (attn.to_q, attn.to_k, attn.to_v)
        )
        asked, seen, said = (
            to(encoder_hidden_states).unflatten(-1, heads).transpose(1, 2)
            for to in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        query, key = _normed(attn.norm_q, query), _normed(attn.norm_k, key)
        asked, seen = _normed(attn.norm_added_q, asked), _normed(attn.norm_added_k, seen)
        query, key, value = (torch.cat(pair, dim=2) for pair in ((query, asked), (key, seen), (value, said)))
        mixed = self._attention_fn(query, key, value).transpose(1, 2).flatten(2, 3).to(query.dtype)
        length = hidden_states.shape[1]
        drawn, told = mixed[:, :length], mixed[:, length:]
        if not attn.context_pre_only:
            told = attn.to_add_out(told)
        return attn.to_out[1](attn.to_out[0](drawn)), told


def _normed(norm: nn.Module | None, heads: Tensor) -> Tensor:
    """SD3.5 normalizes queries and keys, SD3 does not."""
    return heads if norm is None else norm(heads)
