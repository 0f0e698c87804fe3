"""Z-Image's attention with regions: diffusers' processor with another attention, and captions with captions behind them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZSingleStreamAttnProcessor
from torch import Tensor
from torch.nn.functional import pad

from artaug.diffusion.families.common import RegionalProcessor


def padded_length(length: int) -> int:
    """Tokens of a sequence once the model has padded it to a multiple of 32. The model attends to this padding."""
    multiple = int(SEQ_MULTI_OF)
    return -(-length // multiple) * multiple


@dataclass(frozen=True, eq=False)
class JoinedCaptions:
    """A caption and the captions of regions behind it, in place of the one caption that Z-Image takes for a picture."""

    prompt: Tensor
    """The plan's own caption, (tokens, channels)."""
    regions: tuple[Tensor, ...]
    """The regions' captions, each (tokens, channels)."""
    pad_regions: bool
    """Whether the regions' captions get the padding that the model gives to a caption of its own."""
    filler: int = 0
    """Hidden tokens behind all captions, so that the rows of a batch have one length."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of the plan's caption and of each region's, padding included."""
        return [
            padded_length(len(self.prompt)),
            *(padded_length(len(region)) if self.pad_regions else len(region) for region in self.regions),
        ]

    def append_to(self, tokens: Tensor, pos_ids: Tensor, pad_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append the regions' captions to what `patchify_and_embed` makes of the plan's caption.

        Args:
            tokens: (tokens, channels), padded.
            pos_ids: (tokens, 3). A caption counts its tokens on the first axis, from 1.
            pad_mask: (tokens,), True where the model puts its padding token.

        Returns:
            The three, longer. Every caption counts from 1 again, as if it were the only one.
        """
        all_tokens, all_pos_ids, all_pad_masks = [tokens], [pos_ids[: len(tokens)]], [pad_mask]
        for region, length in zip(self.regions, self.lengths[1:], strict=True):
            all_tokens.append(pad(region, (0, 0, 0, length - len(region))))
            order = torch.arange(1, length + 1, device=pos_ids.device, dtype=pos_ids.dtype)
            all_pos_ids.append(pad(order[:, None], (0, pos_ids.shape[1] - 1)))
            all_pad_masks.append(torch.arange(length, device=pad_mask.device) >= len(region))
        all_tokens.append(tokens.new_zeros(self.filler, tokens.shape[1]))
        all_pos_ids.append(pos_ids.new_zeros(self.filler, pos_ids.shape[1]))
        all_pad_masks.append(pad_mask.new_ones(self.filler))
        return torch.cat(all_tokens), torch.cat(all_pos_ids), torch.cat(all_pad_masks)


@contextmanager
def accept_joined_captions(transformer: ZImageTransformer2DModel) -> Iterator[None]:
    """Let a transformer take `JoinedCaptions` in a ``with`` block.

    The transformer computes the tokens' positions itself and has no argument for them, so its ``patchify_and_embed`` is
    replaced on the instance.
    """
    original: Callable[..., tuple[list[Any], ...]] = transformer.patchify_and_embed
    replaced = vars(transformer).get("patchify_and_embed")

    def patchify_and_embed(
        all_image: Sequence[Tensor],
        all_cap_feats: Sequence[Tensor | JoinedCaptions],
        patch_size: int,
        f_patch_size: int,
    ) -> tuple[list[Any], ...]:
        prompts = [caption.prompt if isinstance(caption, JoinedCaptions) else caption for caption in all_cap_feats]
        images, captions, sizes, image_pos_ids, pos_ids, image_pad_masks, pad_masks = original(
            all_image, prompts, patch_size, f_patch_size
        )
        for row, caption in enumerate(all_cap_feats):
            if isinstance(caption, JoinedCaptions):
                captions[row], pos_ids[row], pad_masks[row] = caption.append_to(
                    captions[row], pos_ids[row], pad_masks[row]
                )
        return images, captions, sizes, image_pos_ids, pos_ids, image_pad_masks, pad_masks

    transformer.patchify_and_embed = patchify_and_embed
    try:
        yield
    finally:
        del transformer.patchify_and_embed
        if replaced is not None:
            transformer.patchify_and_embed = replaced


class RegionalZImageProcessor(RegionalProcessor):
    """Twin of `diffusers.models.transformers.transformer_z_image.ZSingleStreamAttnProcessor` of diffusers 0.42.

    It differs in one place: `attention_fn` computes the attention. A mask hides the filler of the shorter rows of a batch, and
    comes only in calls without regions: `JoinedCaptions` have one length, so that the model makes no mask for them.
    """

    upstream: ClassVar[type] = ZSingleStreamAttnProcessor

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        query = attn.to_q(hidden_states)
        key = attn.to_k(hidden_states)
        value = attn.to_v(hidden_states)

        query = query.unflatten(-1, (attn.heads, -1))
        key = key.unflatten(-1, (attn.heads, -1))
        value = value.unflatten(-1, (attn.heads, -1))

        # Apply Norms
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)

        # Apply RoPE
        def apply_rotary_emb(x_in: Tensor, freqs_cis: Tensor) -> Tensor:
            with torch.amp.autocast("cuda", enabled=False):
                x = torch.view_as_complex(x_in.float().reshape(*x_in.shape[:-1], -1, 2))
                freqs_cis = freqs_cis.unsqueeze(2)
                x_out = torch.view_as_real(x * freqs_cis).flatten(3)
                return x_out.type_as(x_in)

        if freqs_cis is not None:
            query = apply_rotary_emb(query, freqs_cis)
            key = apply_rotary_emb(key, freqs_cis)

        # Cast to correct dtype
        dtype = query.dtype

        # From [batch, seq_len] to [batch, 1, 1, seq_len] -> broadcast to [batch, heads, seq_len, seq_len]
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None, :]

        # Compute joint attention: (batch, tokens, heads, channels) here, (batch, heads, tokens, channels) there
        hidden_states = self._attention_fn(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attention_mask
        ).transpose(1, 2)

        # Reshape back
        hidden_states = hidden_states.flatten(2, 3)
        hidden_states = hidden_states.to(dtype)

        output: Tensor = attn.to_out[0](hidden_states)
        if len(attn.to_out) > 1:  # dropout
            output = attn.to_out[1](output)

        return output
