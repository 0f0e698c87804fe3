"""Qwen-Image's attention, told apart by regions: diffusers' own processor with another attention at its heart."""

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0, apply_rotary_emb_qwen
from torch import Tensor

from artaug.diffusion.families.common import check_processor
from artaug.errors import GuideError
from artaug.regional.denoiser import AttentionFn, AttentionLayer


class RegionalQwenImageProcessor:
    """Twin of `QwenDoubleStreamAttnProcessor2_0` that attends as it is told, to prompts that each begin anew."""

    def __init__(self, attention_fn: AttentionFn) -> None:
        """Attend with ``attention_fn``, the prompts before the image."""
        self._attention_fn = attention_fn

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        text_positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        ``text_positions`` (tokens,) says where in its own prompt each text token is; without it they are counted on.
        The name reaches this call by way of the transformer's ``attention_kwargs``. A call that still has a text mask
        has no region to heed, and is answered as diffusers would.
        """
        if encoder_hidden_states_mask is not None:
            told_apart = (encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb)
            plain: tuple[Tensor, Tensor] = QwenDoubleStreamAttnProcessor2_0()(attn, hidden_states, *told_apart)
            return plain
        if attention_mask is not None:
            raise GuideError("an attention mask came with this call, and regional attention would ignore it.")
        heads = (-1, attn.inner_dim // attn.heads)
        query, key, value = (to(hidden_states).unflatten(-1, heads) for to in (attn.to_q, attn.to_k, attn.to_v))
        asked, seen, said = (
            to(encoder_hidden_states).unflatten(-1, heads) for to in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        asked, seen = attn.norm_added_q(asked), attn.norm_added_k(seen)
        if image_rotary_emb is not None:
            of_image, of_text = image_rotary_emb
            if text_positions is not None:
                of_text = of_text[text_positions]
            query, key = (apply_rotary_emb_qwen(one, of_image, use_real=False) for one in (query, key))
            asked, seen = (apply_rotary_emb_qwen(one, of_text, use_real=False) for one in (asked, seen))
        joint = (torch.cat(pair, dim=1).transpose(1, 2) for pair in ((asked, query), (seen, key), (said, value)))
        mixed = self._attention_fn(*joint).transpose(1, 2).flatten(2, 3).to(query.dtype)
        length = encoder_hidden_states.shape[1]
        told, drawn = mixed[:, :length], mixed[:, length:]
        return attn.to_out[1](attn.to_out[0](drawn.contiguous())), attn.to_add_out(told.contiguous())


def regional_processor(attention: AttentionLayer, attention_fn: AttentionFn) -> RegionalQwenImageProcessor:
    """The twin of a layer's processor.

    Raises:
        GuideError: if the layer has another processor than Qwen-Image's own.
    """
    check_processor(attention, QwenDoubleStreamAttnProcessor2_0)
    return RegionalQwenImageProcessor(attention_fn)
