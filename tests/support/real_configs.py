"""The denoisers of published models, without their weights: from the configs beside them, on the meta device.

A value that is diffusers' own default is left out. Compared with what is public of them: FLUX.1 with
``configs/diffusion/inference/plugins/t2i2v.py`` of hpcaitech/Open-Sora, FLUX.2 and SD 3.5 with diffusers'
``scripts/convert_flux2_to_diffusers.py`` and ``scripts/convert_sd3_to_diffusers.py`` (SD 3.5's numbers of layers by an
example config's word and from memory), Qwen-Image with exo-explore/exo's ``image/models/qwen/config.py``, Z-Image with
FiditeNemini/z-image-turbo-mlx's ``TECHNICAL_DOCUMENTATION.md``, SD 1.5 with open-mmlab/mmagic's
``configs/stable_diffusion``. No source was found for SDXL's and SD 2.1's: they are from memory.
"""

from functools import cache

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)

from artaug.lora.formats import FLUX1, FLUX2, QWEN_IMAGE, SD3, SD15, SDXL, Z_IMAGE

_SD35 = {"qk_norm": "rms_norm", "joint_attention_dim": 4096, "pooled_projection_dim": 2048}

MODELS = {
    "FLUX.1-dev": (FLUX1, FluxTransformer2DModel, {"guidance_embeds": True}),
    "FLUX.1-schnell": (FLUX1, FluxTransformer2DModel, {}),
    "FLUX.2-dev": (FLUX2, Flux2Transformer2DModel, {}),
    "FLUX.2-klein-4B": (
        FLUX2,
        Flux2Transformer2DModel,
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
    ),
    "FLUX.2-klein-9B": (
        FLUX2,
        Flux2Transformer2DModel,
        {
            "num_layers": 8,
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
            "guidance_embeds": False,
        },
    ),
    "SD3.5-medium": (
        SD3,
        SD3Transformer2DModel,
        {
            **_SD35,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
        },
    ),
    "SD3.5-large": (
        SD3,
        SD3Transformer2DModel,
        {
            **_SD35,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
        },
    ),
    "SDXL": (
        SDXL,
        UNet2DConditionModel,
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "SD1.5": (SD15, UNet2DConditionModel, {"cross_attention_dim": 768, "sample_size": 64}),
    "SD2.1": (
        SD15,
        UNet2DConditionModel,
        {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
    ),
    "Qwen-Image": (QWEN_IMAGE, QwenImageTransformer2DModel, {}),
    "Z-Image": (Z_IMAGE, ZImageTransformer2DModel, {}),
}
"""By the name its users know: the family's table, diffusers' class, and the config."""


@cache
def weight_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """The weight of every layer of a published denoiser that a LoRA can update: linear ones and convolutions."""
    _, denoiser_class, config = MODELS[model]
    with torch.device("meta"):
        denoiser = denoiser_class(**config)
    layer_types = (torch.nn.Linear, torch.nn.Conv2d)
    return {
        name: tuple(layer.weight.shape) for name, layer in denoiser.named_modules() if isinstance(layer, layer_types)
    }
