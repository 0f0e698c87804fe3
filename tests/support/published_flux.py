"""FLUX.1-dev's own transformer with random weights on a GPU, between encoders that are as small as they may be."""

from dataclasses import replace

import torch
from benchmarks import _flux as flux
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from support.tiny_flux import tiny_flux


def published_flux(storage, geometry=flux.FLUX_DEV):
    """The pipeline in bfloat16, its transformer stored as told: ``"plain"``, ``"fp8"`` or ``"nf4"``."""
    pipeline = tiny_flux()
    channels = {"hidden_size": geometry.pooled_channels, "num_attention_heads": 1, "num_hidden_layers": 1}
    clip, t5 = pipeline.text_encoder.config, pipeline.text_encoder_2.config
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    parts = {
        "vae": vae,
        "text_encoder": CLIPTextModel(CLIPTextConfig(**{**clip.to_dict(), **channels})),
        "text_encoder_2": T5EncoderModel(T5Config(**{**t5.to_dict(), "d_model": geometry.text_channels})),
    }
    parts = {name: one.eval().to(geometry.device, torch.bfloat16) for name, one in parts.items()}
    rest = {name: pipeline.components[name] for name in ("scheduler", "tokenizer", "tokenizer_2")}
    return type(pipeline)(**rest, **parts, transformer=replace(geometry, storage=storage).model())
