"""FLUX.2's attention, told apart by regions: diffusers' own two processors with another attention at their heart."""

import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2AttnProcessor,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
    _get_qkv_projections,
    apply_rotary_emb,
)
from torch import Tensor

from artaug.diffusion.families.common import check_processor
from artaug.errors import GuideError
from artaug.regional.denoiser import AttentionFn, AttentionLayer


class RegionalFlux2Processor:
    """Twin of `Flux2AttnProcessor`, of the blocks with two streams, that attends as it is told."""

    def __init__(self, attention_fn: AttentionFn) -> None:
        """Attend with ``attention_fn``, the prompts before the image."""
        self._attention_fn = attention_fn

    def __call__(
        self,
        attn: Flux2Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if attention_mask is not None:
            raise GuideError("an attention mask came with this call, and regional attention would ignore it.")
        heads = (-1, attn.head_dim)
        projected = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value, asked, seen, said = (one.unflatten(-1, heads) for one in projected)
        query, key = attn.norm_q(query), attn.norm_k(key)
        asked, seen = attn.norm_added_q(asked), attn.norm_added_k(seen)
        query, key, value = (torch.cat(pair, dim=1) for pair in ((asked, query), (seen, key), (said, value)))
        mixed = _attended(self._attention_fn, query, key, value, places=image_rotary_emb)
        length = encoder_hidden_states.shape[1]
        told, drawn = mixed[:, :length], mixed[:, length:]
        return attn.to_out[1](attn.to_out[0](drawn)), attn.to_add_out(told)


class RegionalFlux2ParallelProcessor:
    """Twin of `Flux2ParallelSelfAttnProcessor`, of the blocks with one stream, that attends as it is told."""

    def __init__(self, attention_fn: AttentionFn) -> None:
        """Attend with ``attention_fn``, the prompts before the image."""
        self._attention_fn = attention_fn

    def __call__(
        self,
        attn: Flux2ParallelSelfAttention,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            raise GuideError("an attention mask came with this call, and regional attention would ignore it.")
        projected = attn.to_qkv_mlp_proj(hidden_states)
        of_attention, of_mlp = 3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor
        local = projected.shape[-1] * of_attention // (of_attention + of_mlp)
        qkv, mlp = projected.split([local, projected.shape[-1] - local], dim=-1)
        query, key, value = (one.unflatten(-1, (-1, attn.head_dim)) for one in qkv.chunk(3, dim=-1))
        query, key = attn.norm_q(query), attn.norm_k(key)
        mixed = _attended(self._attention_fn, query, key, value, places=image_rotary_emb)
        drawn: Tensor = attn.to_out(torch.cat([mixed, attn.mlp_act_fn(mlp)], dim=-1))
        return drawn


def regional_processor(
    attention: AttentionLayer, attention_fn: AttentionFn
) -> RegionalFlux2Processor | RegionalFlux2ParallelProcessor:
    """The twin of a layer's processor.

    Raises:
        GuideError: if the layer has another processor than FLUX.2's own.
    """
    if isinstance(attention, Flux2ParallelSelfAttention):
        check_processor(attention, Flux2ParallelSelfAttnProcessor)
        return RegionalFlux2ParallelProcessor(attention_fn)
    check_processor(attention, Flux2AttnProcessor)
    return RegionalFlux2Processor(attention_fn)


def _attended(
    attention_fn: AttentionFn, query: Tensor, key: Tensor, value: Tensor, *, places: tuple[Tensor, Tensor] | None
) -> Tensor:
    if places is not None:
        query = apply_rotary_emb(query, places, sequence_dim=1)
        key = apply_rotary_emb(key, places, sequence_dim=1)
    mixed = attention_fn(*(one.transpose(1, 2) for one in (query, key, value))).transpose(1, 2)
    return mixed.flatten(2, 3).to(query.dtype)
