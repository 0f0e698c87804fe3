"""FLUX.1's attention, told apart by regions: diffusers' own processor with another attention at its heart."""

from typing import Self

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    _get_qkv_projections,
    apply_rotary_emb,
)
from torch import Tensor

from artaug.diffusion.families.common import check_processor
from artaug.errors import GuideError
from artaug.regional.denoiser import AttentionFn, AttentionLayer


class RegionalFluxProcessor:
    """Twin of `FluxAttnProcessor`, line by line, that attends as it is told."""

    def __init__(self, attention_fn: AttentionFn) -> None:
        """Attend with ``attention_fn``, the prompts before the image."""
        self._attention_fn = attention_fn

    @classmethod
    def like(cls, attention: AttentionLayer, attention_fn: AttentionFn) -> Self:
        """The twin of a layer's processor.

        Raises:
            GuideError: if the layer has another processor than FLUX's own.
        """
        check_processor(attention, FluxAttnProcessor)
        return cls(attention_fn)

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if attention_mask is not None:
            raise GuideError("an attention mask came with this call, and regional attention would ignore it.")
        heads = (-1, attn.head_dim)
        query, key, value, *of_prompt = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value = (one.unflatten(-1, heads) for one in (query, key, value))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if attn.added_kv_proj_dim is not None:
            asked, seen, said = (one.unflatten(-1, heads) for one in of_prompt)
            asked, seen = attn.norm_added_q(asked), attn.norm_added_k(seen)
            query, key, value = (torch.cat(pair, dim=1) for pair in ((asked, query), (seen, key), (said, value)))
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        mixed = self._attention_fn(*(one.transpose(1, 2) for one in (query, key, value))).transpose(1, 2)
        mixed = mixed.flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return mixed
        length = encoder_hidden_states.shape[1]
        told, drawn = mixed[:, :length], mixed[:, length:]
        drawn = attn.to_out[1](attn.to_out[0](drawn.contiguous()))
        return drawn, attn.to_add_out(told.contiguous())
