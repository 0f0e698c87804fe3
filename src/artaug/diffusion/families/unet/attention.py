"""A UNet's cross-attention with regions: diffusers' processor, with another attention in place of its own."""

from collections.abc import Callable
from typing import ClassVar

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from artaug.diffusion.families.common import RegionalProcessor
from artaug.errors import GuideError


class RegionalCrossProcessor(RegionalProcessor):
    """Twin of `diffusers.models.attention_processor.AttnProcessor2_0` of diffusers 0.42, for cross-attention.

    It differs in three places: `attention_fn` computes the attention, an attention mask is an error, and what a UNet's
    cross-attention does not use is left out (spatial norm, group norm, hidden states with rows and columns).
    """

    upstream: ClassVar[type] = AttnProcessor2_0

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        return cross_attention(
            attn, hidden_states, encoder_hidden_states, self._attention_fn, attention_mask=attention_mask
        )


def cross_attention(
    attn: Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_fn: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    attention_mask: Tensor | None,
) -> Tensor:
    """What the twins have in common: upstream's lines, with ``attention_fn`` for the attention."""
    if attention_mask is not None:
        raise GuideError(
            "the UNet was given an encoder_attention_mask, which regional attention would drop. Leave it out."
        )

    residual = hidden_states

    batch_size = encoder_hidden_states.shape[0]

    query = attn.to_q(hidden_states)

    if attn.norm_cross:
        encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)

    key = attn.to_k(encoder_hidden_states)
    value = attn.to_v(encoder_hidden_states)

    inner_dim = key.shape[-1]
    head_dim = inner_dim // attn.heads

    query = query.view(batch_size, -1, attn.heads, head_dim).transpose(1, 2)

    key = key.view(batch_size, -1, attn.heads, head_dim).transpose(1, 2)
    value = value.view(batch_size, -1, attn.heads, head_dim).transpose(1, 2)

    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)

    # the output of attention = (batch, num_heads, seq_len, head_dim)
    hidden_states = attention_fn(query, key, value)

    hidden_states = hidden_states.transpose(1, 2).reshape(batch_size, -1, attn.heads * head_dim)
    hidden_states = hidden_states.to(query.dtype)

    # linear proj
    hidden_states = attn.to_out[0](hidden_states)
    # dropout
    hidden_states = attn.to_out[1](hidden_states)

    if attn.residual_connection:
        hidden_states = hidden_states + residual

    return hidden_states / attn.rescale_output_factor  # type: ignore[no-any-return]
