"""IP-Adapter (Ye et al. 2023) on UNets: pictures that image tokens attend to beside the text, in the same cross-attention.

diffusers keeps an adapter's weights in the attention processors, and its projection of pictures in the UNet. A UNet with an adapter does
not run without pictures: plans without references are drawn with a scale of 0, at which the processors skip the adapter, so that the
result is bit for bit the UNet's own.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from PIL import Image
from torch import Tensor
from torch.nn import functional

from artaug._internal.images import as_rgb
from artaug.diffusion.families.canvases import mask_image
from artaug.diffusion.families.common import RegionalProcessor
from artaug.diffusion.families.unet.attention import cross_attention
from artaug.plan import Plan
from artaug.regional.denoiser import AttentionFn, AttentionLayer


class RegionalIPAdapterProcessor(RegionalProcessor):
    """Twin of `diffusers.models.attention_processor.IPAdapterAttnProcessor2_0` of diffusers 0.42, for cross-attention.

    `attention_fn` computes the attention to the text, as in `RegionalCrossProcessor`; that to the pictures is upstream's, with the
    weights of the layer's own processor.
    """

    upstream: ClassVar[type] = IPAdapterAttnProcessor2_0
    adapter: IPAdapterAttnProcessor2_0
    """The layer's own processor."""

    @classmethod
    def for_layer(cls, attention: AttentionLayer, attention_fn: AttentionFn) -> Self:
        twin = super().for_layer(attention, attention_fn)
        twin.adapter = attention.processor
        return twin

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: tuple[Tensor, Sequence[Tensor]],
        attention_mask: Tensor | None = None,
        ip_adapter_masks: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        text, ip_hidden_states = encoder_hidden_states

        def beside_pictures(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            attended = self._attention_fn(query, key, value)
            return self._add_pictures(attn, query, attended, ip_hidden_states, ip_adapter_masks)

        return cross_attention(attn, hidden_states, text, beside_pictures, attention_mask=attention_mask)

    def _add_pictures(
        self,
        attn: Attention,
        query: Tensor,
        attended: Tensor,
        ip_hidden_states: Sequence[Tensor],
        ip_adapter_masks: Sequence[Tensor | None] | None,
    ) -> Tensor:
        """What was attended to in the text, and in the pictures: (batch, heads, tokens, channels of a head)."""
        adapter = self.adapter
        masks = ip_adapter_masks or [None] * len(adapter.scale)
        hidden_states: Tensor = _merge_heads(attended).to(query.dtype)
        for pictures, scale, to_k_ip, to_v_ip, mask in zip(
            ip_hidden_states, adapter.scale, adapter.to_k_ip, adapter.to_v_ip, masks, strict=True
        ):
            scales = scale if isinstance(scale, list) else [scale] * (1 if mask is None else mask.shape[1])
            if all(one == 0 for one in scales):
                continue
            # Without masks, all pictures are attended to together, with one scale.
            parts: list[tuple[Tensor, Any, Tensor | None]] = [(pictures, scale, None)]
            if mask is not None:
                parts = list(zip(pictures.unbind(1), scales, mask.unbind(1), strict=True))
            for tokens, strength, shown in parts:
                ip_key, ip_value = (_split_heads(attn, layer(tokens)) for layer in (to_k_ip, to_v_ip))
                seen = _merge_heads(functional.scaled_dot_product_attention(query, ip_key, ip_value)).to(query.dtype)
                if shown is not None:
                    seen = seen * IPAdapterMaskProcessor.downsample(shown, len(seen), *seen.shape[1:]).to(query)
                hidden_states = hidden_states + strength * seen
        return _split_heads(attn, hidden_states)


def _split_heads(attn: Attention, tokens: Tensor) -> Tensor:
    return tokens.view(len(tokens), -1, attn.heads, tokens.shape[-1] // attn.heads).transpose(1, 2)


def _merge_heads(tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).flatten(2)


def adapters_of(unet: Any) -> list[Any]:  # noqa: ANN401 - a UNet of diffusers
    """The processors of a UNet that hold weights of IP-Adapters; none without."""
    return [item for item in unet.attn_processors.values() if hasattr(item, "to_k_ip")]


@contextmanager
def references_read(
    pipeline: Any,  # noqa: ANN401 - of diffusers
    plans: Sequence[Plan],
    size: tuple[int, int],
) -> Iterator[Mapping[str, Any]]:
    """A ``with`` block in which a pipeline with IP-Adapters reads the references of plans that start alike, or its adapters rest.

    Yields:
        Arguments of its call.
    """
    adapters = adapters_of(pipeline.unet)
    if not adapters:
        yield {}
        return
    count = len(adapters[0].scale)
    canvas = plans[0].canvas
    references = [] if canvas is None else [as_rgb(picture) for picture in canvas.references]
    rest = not references
    if rest:
        references = [Image.new("RGB", size)]
    kwargs: dict[str, Any] = {"ip_adapter_image": [references] * count}
    masks = _masks(plans[0], len(references), size)
    if masks is not None:
        kwargs["cross_attention_kwargs"] = {"ip_adapter_masks": [masks] * count}
    scales = [list(adapter.scale) for adapter in adapters]
    try:
        if rest:
            for adapter in adapters:
                adapter.scale[:] = [0.0] * count
        yield kwargs
    finally:
        for adapter, scale in zip(adapters, scales, strict=True):
            adapter.scale[:] = scale


def _masks(plan: Plan, references: int, size: tuple[int, int]) -> Tensor | None:
    """Where each reference shows, (1, references, height, width) of 0 and 1; None where no region names one."""
    named = [(region.reference, region.area) for region in plan.regions if region.reference is not None]
    if not named:
        return None
    width, height = size
    processor = IPAdapterMaskProcessor()
    masks = []
    for number in range(references):
        areas = [area for reference, area in named if reference == number]
        pictures = [mask_image(area, size) for area in areas] or [Image.new("L", size, 255)]
        covered = processor.preprocess(pictures, height=height, width=width)
        masks.append(covered.amax(dim=0))
    return torch.stack(masks, dim=1)
