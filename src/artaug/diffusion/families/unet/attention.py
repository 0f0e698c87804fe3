"""A UNet's cross-attention, told apart by regions: diffusers' own processor with another attention at its heart."""

from typing import Self

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from artaug.diffusion.families.common import check_processor
from artaug.errors import GuideError
from artaug.regional.denoiser import AttentionFn, AttentionLayer


class RegionalCrossProcessor:
    """Twin of `AttnProcessor2_0` in cross-attention, line by line, that attends as it is told."""

    def __init__(self, attention_fn: AttentionFn) -> None:
        """Attend with ``attention_fn``, queries of the image and keys of the prompts."""
        self._attention_fn = attention_fn

    @classmethod
    def like(cls, attention: AttentionLayer, attention_fn: AttentionFn) -> Self:
        """The twin of a layer's processor.

        Raises:
            GuideError: if the layer has another processor than a fresh UNet's.
        """
        check_processor(attention, AttnProcessor2_0)
        return cls(attention_fn)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            raise GuideError(
                "the UNet was given an encoder_attention_mask, which regional attention would drop. Leave it out."
            )
        if attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        heads = (attn.heads, -1)
        query, key, value = (
            one.unflatten(-1, heads).transpose(1, 2)
            for one in (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        mixed = self._attention_fn(query, key, value).transpose(1, 2).flatten(2, 3).to(query.dtype)
        mixed = attn.to_out[1](attn.to_out[0](mixed))
        if attn.residual_connection:
            mixed = mixed + hidden_states
        return mixed / attn.rescale_output_factor  # type: ignore[no-any-return]
