"""Qwen-Image's joint attention with regions: diffusers' processor, with another attention in place of its own."""

from typing import ClassVar

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0, apply_rotary_emb_qwen
from torch import Tensor

from artaug.diffusion.families.common import RegionalProcessor
from artaug.errors import GuideError


class RegionalQwenImageProcessor(RegionalProcessor):
    """Twin of `diffusers.models.transformers.transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0` of diffusers 0.42.

    It differs in two places: `attention_fn` computes the attention, and ``text_positions`` selects the rotary embedding of each
    text token.
    """

    upstream: ClassVar[type] = QwenDoubleStreamAttnProcessor2_0

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,  # Image stream
        encoder_hidden_states: Tensor,  # Text stream
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        text_positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the layer.

        ``text_positions`` (tokens,) holds the position of each text token in its own prompt; without it the positions run
        on from token to token. It reaches this call by way of the transformer's ``attention_kwargs``. A call that still
        has a text mask is a call without regions.
        """
        if attention_mask is not None:
            raise GuideError(
                "an attention mask came with this call, and Qwen-Image's attention takes none from outside."
            )

        if encoder_hidden_states_mask is not None:
            seq_img = hidden_states.shape[1]
            image_mask = torch.ones((hidden_states.shape[0], seq_img), dtype=torch.bool, device=hidden_states.device)
            attention_mask = torch.cat([encoder_hidden_states_mask, image_mask], dim=1)
            attention_mask = attention_mask[:, None, None, :]

        seq_txt = encoder_hidden_states.shape[1]

        # Compute QKV for image stream (sample projections)
        img_query = attn.to_q(hidden_states)
        img_key = attn.to_k(hidden_states)
        img_value = attn.to_v(hidden_states)

        # Compute QKV for text stream (context projections)
        txt_query = attn.add_q_proj(encoder_hidden_states)
        txt_key = attn.add_k_proj(encoder_hidden_states)
        txt_value = attn.add_v_proj(encoder_hidden_states)

        head_dim = attn.inner_dim // attn.heads
        img_query = img_query.unflatten(-1, (-1, head_dim))
        img_key = img_key.unflatten(-1, (-1, head_dim))
        img_value = img_value.unflatten(-1, (-1, head_dim))

        txt_query = txt_query.unflatten(-1, (-1, head_dim))
        txt_key = txt_key.unflatten(-1, (-1, head_dim))
        txt_value = txt_value.unflatten(-1, (-1, head_dim))

        # Apply QK normalization
        if attn.norm_q is not None:
            img_query = attn.norm_q(img_query)
        if attn.norm_k is not None:
            img_key = attn.norm_k(img_key)
        if attn.norm_added_q is not None:
            txt_query = attn.norm_added_q(txt_query)
        if attn.norm_added_k is not None:
            txt_key = attn.norm_added_k(txt_key)

        # Apply RoPE
        if image_rotary_emb is not None:
            img_freqs, txt_freqs = image_rotary_emb
            if text_positions is not None:
                txt_freqs = txt_freqs[text_positions]
            img_query = apply_rotary_emb_qwen(img_query, img_freqs, use_real=False)
            img_key = apply_rotary_emb_qwen(img_key, img_freqs, use_real=False)
            txt_query = apply_rotary_emb_qwen(txt_query, txt_freqs, use_real=False)
            txt_key = apply_rotary_emb_qwen(txt_key, txt_freqs, use_real=False)

        # Concatenate for joint attention, the text first
        joint_query = torch.cat([txt_query, img_query], dim=1)
        joint_key = torch.cat([txt_key, img_key], dim=1)
        joint_value = torch.cat([txt_value, img_value], dim=1)

        # (batch, tokens, heads, channels) here, (batch, heads, tokens, channels) there
        joint_hidden_states = self._attention_fn(
            joint_query.transpose(1, 2), joint_key.transpose(1, 2), joint_value.transpose(1, 2), attention_mask
        ).transpose(1, 2)

        # Reshape back
        joint_hidden_states = joint_hidden_states.flatten(2, 3)
        joint_hidden_states = joint_hidden_states.to(joint_query.dtype)

        # Split attention outputs back
        txt_attn_output = joint_hidden_states[:, :seq_txt, :]  # Text part
        img_attn_output = joint_hidden_states[:, seq_txt:, :]  # Image part

        # Apply output projections
        img_attn_output = attn.to_out[0](img_attn_output.contiguous())
        if len(attn.to_out) > 1:
            img_attn_output = attn.to_out[1](img_attn_output)  # dropout

        txt_attn_output = attn.to_add_out(txt_attn_output.contiguous())

        return img_attn_output, txt_attn_output
