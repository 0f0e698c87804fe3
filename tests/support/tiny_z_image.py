"""A real Z-Image pipeline, small enough to draw in milliseconds: random weights from configs, nothing downloaded."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from support.tiny_chat import VOCABULARY, qwen_tokenizer

_WIDTH = 16


def tiny_z_image(*, dynamic_shift: bool = False, seed: int = 0) -> ZImagePipeline:
    """Build the pipeline, the same weights for the same seed, global randomness untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shift),
            vae=_vae(),
            text_encoder=_qwen(),
            tokenizer=qwen_tokenizer(),
            transformer=_transformer(),
        )
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.transformer):
        part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _transformer() -> ZImageTransformer2DModel:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=_WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 16, 16],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    return transformer


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.36,
        shift_factor=0.11,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _qwen() -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
    )
    return Qwen3Model(config)
