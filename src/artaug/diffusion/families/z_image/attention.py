"""Z-Image's attention, told apart by regions: diffusers' own processor with another attention at its heart, and places."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZSingleStreamAttnProcessor
from torch import Tensor
from torch.nn.functional import pad

from artaug.diffusion.families.common import check_processor
from artaug.regional.denoiser import AttentionFn, AttentionLayer


def padded(length: int) -> int:
    """Tokens of a sequence with the model's own padding, which it sees, behind it."""
    multiple = int(SEQ_MULTI_OF)
    return -(-length // multiple) * multiple


@dataclass(frozen=True, eq=False)
class Captions:
    """A caption with others after it, in place of the one caption Z-Image takes for a picture."""

    own: Tensor
    """Shape (tokens, channels)."""
    added: tuple[Tensor, ...]
    """Each of shape (tokens, channels)."""
    whole: bool
    """Whether the added ones get the padding that the model gives to a caption of its own."""
    filler: int = 0
    """Tokens after all of them that nobody sees, so that the rows of a batch are of one length."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of the own caption and of the added ones, each with its padding."""
        return [padded(len(self.own)), *(padded(len(one)) if self.whole else len(one) for one in self.added)]

    def behind(self, tokens: Tensor, places: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Put the added captions behind the own one as the model has prepared it, each beginning at the first place."""
        rows, orders, unsaid = [tokens], [places[: len(tokens)]], [padding]
        for one, room in zip(self.added, self.lengths[1:], strict=True):
            rows.append(pad(one, (0, 0, 0, room - len(one))))
            order = torch.arange(1, room + 1, device=places.device, dtype=places.dtype)
            orders.append(pad(order[:, None], (0, places.shape[1] - 1)))
            unsaid.append(torch.arange(room, device=padding.device) >= len(one))
        rows.append(tokens.new_zeros(self.filler, tokens.shape[1]))
        orders.append(places.new_zeros(self.filler, places.shape[1]))
        unsaid.append(padding.new_ones(self.filler))
        return torch.cat(rows), torch.cat(orders), torch.cat(unsaid)


@contextmanager
def captions_in_place(transformer: ZImageTransformer2DModel) -> Iterator[None]:
    """Let a transformer take `Captions` for a time: where tokens are is decided inside it, and no argument says."""
    plain: Callable[..., tuple[list[Any], ...]] = transformer.patchify_and_embed
    replaced = vars(transformer).get("patchify_and_embed")

    def patchified(
        all_image: Sequence[Tensor], all_cap_feats: Sequence[Tensor | Captions], patch_size: int, f_patch_size: int
    ) -> tuple[list[Any], ...]:
        own = [one.own if isinstance(one, Captions) else one for one in all_cap_feats]
        images, tokens, sizes, image_places, places, image_padding, padding = plain(
            all_image, own, patch_size, f_patch_size
        )
        for row, one in enumerate(all_cap_feats):
            if isinstance(one, Captions):
                tokens[row], places[row], padding[row] = one.behind(tokens[row], places[row], padding[row])
        return images, tokens, sizes, image_places, places, image_padding, padding

    transformer.patchify_and_embed = patchified
    try:
        yield
    finally:
        del transformer.patchify_and_embed
        if replaced is not None:
            transformer.patchify_and_embed = replaced


class RegionalZImageProcessor:
    """Twin of `ZSingleStreamAttnProcessor`, line by line, that attends as it is told.

    A call with a mask, which hides what fills up the shorter rows of a batch, has no region to heed and is answered as
    diffusers would: `Captions` are all of one length, so that the model makes no mask of its own.
    """

    def __init__(self, attention_fn: AttentionFn) -> None:
        """Attend with ``attention_fn``, the image before the prompts."""
        self._attention_fn = attention_fn

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            plain: Tensor = ZSingleStreamAttnProcessor()(
                attn, hidden_states, attention_mask=attention_mask, freqs_cis=freqs_cis
            )
            return plain
        query, key, value = (
            to(hidden_states).unflatten(-1, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if freqs_cis is not None:
            query, key = _rotated(query, freqs_cis), _rotated(key, freqs_cis)
        mixed = self._attention_fn(*(one.transpose(1, 2) for one in (query, key, value))).transpose(1, 2)
        output: Tensor = attn.to_out[0](mixed.flatten(2, 3).to(query.dtype))
        return attn.to_out[1](output) if len(attn.to_out) > 1 else output


def regional_processor(attention: AttentionLayer, attention_fn: AttentionFn) -> RegionalZImageProcessor:
    """The twin of a layer's processor.

    Raises:
        GuideError: if the layer has another processor than Z-Image's own.
    """
    check_processor(attention, ZSingleStreamAttnProcessor)
    return RegionalZImageProcessor(attention_fn)


def _rotated(tokens: Tensor, places: Tensor) -> Tensor:
    with torch.amp.autocast("cuda", enabled=False):
        pairs = torch.view_as_complex(tokens.float().reshape(*tokens.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * places.unsqueeze(2)).flatten(3).type_as(tokens)
