"""A whole FLUX.1-dev with random weights, encoders and autoencoder too: what it costs to draw, without the file."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from artaug import playground
from benchmarks._flux import FLUX_DEV, Geometry


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The sizes of what is beside the transformer."""

    t5_layers: int = 24
    clip_layers: int = 12
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)


def flux_pipeline(geometry: Geometry = FLUX_DEV, parts: Parts = Parts()) -> FluxPipeline:
    """The pipeline, built where ``geometry`` says, with the same weights every time.

    Tokenizers are the playground's, which know fewer words; prompts are padded to the same lengths.
    """
    small = playground.synthesizer().pipeline
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_built(lambda: _autoencoder(parts), geometry),
        text_encoder=_built(lambda: _clip(geometry, parts, small.text_encoder.config), geometry),
        tokenizer=small.tokenizer,
        text_encoder_2=_built(lambda: _t5(geometry, parts, small.text_encoder_2.config), geometry),
        tokenizer_2=small.tokenizer_2,
        transformer=geometry.model(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _autoencoder(parts: Parts) -> AutoencoderKL:
    levels = len(parts.vae_channels)
    return AutoencoderKL(
        block_out_channels=parts.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _clip(geometry: Geometry, parts: Parts, small: CLIPTextConfig) -> CLIPTextModel:
    config = CLIPTextConfig(
        hidden_size=geometry.pooled_channels,
        intermediate_size=4 * geometry.pooled_channels,
        num_hidden_layers=parts.clip_layers,
        num_attention_heads=geometry.pooled_channels // 64,
        projection_dim=geometry.pooled_channels,
        bos_token_id=small.bos_token_id,
        eos_token_id=small.eos_token_id,
        pad_token_id=small.pad_token_id,
    )
    return CLIPTextModel(config)


def _t5(geometry: Geometry, parts: Parts, small: T5Config) -> T5EncoderModel:
    config = T5Config(
        d_model=geometry.text_channels,
        d_ff=geometry.text_channels * 5 // 2,
        d_kv=64,
        num_heads=geometry.text_channels // 64,
        num_layers=parts.t5_layers,
        feed_forward_proj="gated-gelu",
        pad_token_id=small.pad_token_id,
        eos_token_id=small.eos_token_id,
    )
    return T5EncoderModel(config)


def _built(build: Callable[[], Any], geometry: Geometry) -> Any:  # noqa: ANN401 - a model of diffusers or transformers
    """A model with random weights, made on the device and in the type of a geometry."""
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(geometry.dtype)
    try:
        with torch.random.fork_rng(), torch.device(geometry.device):
            torch.manual_seed(0)
            return build().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default_dtype)
