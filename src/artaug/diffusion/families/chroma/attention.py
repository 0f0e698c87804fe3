"""Chroma's joint attention with regions: FLUX's processor, and the float mask that diffusers adds to the scores.

diffusers 0.42 hands Chroma's mask of text tokens to attention as floats, 1 for a token that counts and 0 for padding, and
scaled dot product attention adds floats to the scores: ``softmax(q k / sqrt(d) + m_q m_k) v``. So padding is not hidden, it
weighs 1 / e of what a token weighs (huggingface/diffusers issue 13619). What users draw with is that, so that is what the
twin computes.
"""

import math
from functools import partial
from typing import ClassVar

import torch
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor
from torch.nn.functional import pad

from artaug.diffusion.families.common import RegionalProcessor
from artaug.diffusion.families.flux.attention import RegionalFluxProcessor
from artaug.regional.denoiser import AttentionFn

_EXTRA_CHANNELS = 8  # one is used; fast kernels want multiples of 8


class RegionalChromaProcessor(RegionalProcessor):
    """Twin of `diffusers.models.transformers.transformer_flux.FluxAttnProcessor` of diffusers 0.42, as Chroma calls it.

    ``token_mask`` (rows, tokens) is the mask of the whole sequence. It reaches this call by way of the transformer's
    ``joint_attention_kwargs``. A call that still has diffusers' own ``attention_mask``, of queries and keys, is a call without
    regions.
    """

    upstream: ClassVar[type] = FluxAttnProcessor

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        attention_fn = self._attention_fn
        if attention_mask is not None:
            attention_fn = partial(_attention_with_mask, attention_fn, attention_mask)
        if token_mask is not None:
            attention_fn = partial(attention_with_token_mask, attention_fn, token_mask)
        twin = RegionalFluxProcessor(attention_fn)
        return twin(attn, hidden_states, encoder_hidden_states, image_rotary_emb=image_rotary_emb)


def _attention_with_mask(
    attention_fn: AttentionFn, attention_mask: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    return attention_fn(query, key, value, attention_mask)


def attention_with_token_mask(
    attention_fn: AttentionFn, token_mask: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Attention with ``m_q m_k`` added to the scores, by a function that adds nothing.

    A bias of rank one is one more channel of queries and keys: with q' = (c q, sqrt(d') m_q) and k' = (k, m_k), where d' is
    the number of channels of q' and c = sqrt(d' / d), ``q' k' / sqrt(d')`` is ``q k / sqrt(d) + m_q m_k``. No mask of
    queries x keys is made, and every way of computing regional attention can be used.

    Args:
        attention_fn: plain or regional attention, with scores scaled by the root of the number of channels.
        token_mask: (rows, tokens).
        query: (rows, heads, tokens, channels).
        key: like ``query``.
        value: like ``query``.
    """
    channels = query.shape[-1]
    widened = channels + _EXTRA_CHANNELS
    mask = token_mask.to(query)[:, None, :, None].expand(*query.shape[:3], 1)
    mask = pad(mask, (0, _EXTRA_CHANNELS - 1))
    query = torch.cat([query * math.sqrt(widened / channels), mask * math.sqrt(widened)], dim=-1)
    key = torch.cat([key, mask], dim=-1)
    return attention_fn(query, key, pad(value, (0, _EXTRA_CHANNELS)))[..., :channels]
