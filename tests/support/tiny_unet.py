"""Real Stable Diffusion and SDXL pipelines, small enough to draw in milliseconds: random weights, nothing downloaded."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from support.tiny_clip import clip, clip_tokenizer

_LEVELS = (4, 8, 8)


def tiny_sd15(*, scheduler=None, guidance_width: int | None = None) -> StableDiffusionPipeline:
    """Build the pipeline, the same weights every time, global randomness untouched.

    Args:
        scheduler: in place of DDIM as SD 1.5 sets it up.
        guidance_width: of the guidance scale's embedding, for a UNet distilled to take it.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionPipeline(
            scheduler=scheduler or ddim(),
            vae=_vae(),
            text_encoder=clip(12),
            tokenizer=clip_tokenizer(),
            unet=_unet(
                down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=12,
                time_cond_proj_dim=guidance_width,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _ready(pipeline)


def tiny_sdxl(*, scheduler=None, force_zeros: bool = True) -> StableDiffusionXLPipeline:
    """Build the pipeline, the same weights every time, global randomness untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionXLPipeline(
            scheduler=scheduler or ddim(),
            vae=_vae(),
            text_encoder=clip(8),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip(12, projected=True),
            tokenizer_2=clip_tokenizer(),
            unet=_unet(
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 1, 2),
                cross_attention_dim=20,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=12 + 6 * 4,
            ),
            force_zeros_for_empty_prompt=force_zeros,
            add_watermarker=False,
        )
    pipeline.text_encoder_2.eval()
    return _ready(pipeline)


def ddim(**options) -> DDIMScheduler:
    """A scheduler set up as SD 1.5's."""
    defaults = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return DDIMScheduler(**{**defaults, "clip_sample": False, "set_alpha_to_one": False, **options})


def _ready(pipeline):
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _unet(**options) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=_LEVELS,
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        **options,
    )
    # Random weights hardly read the prompt, and tests want pictures that tell prompts apart.
    for name, layer in unet.named_modules():
        if name.endswith(("attn2.to_v", "attn2.to_q", "attn2.to_k")):
            layer.weight.data.mul_(5)
    return unet


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
