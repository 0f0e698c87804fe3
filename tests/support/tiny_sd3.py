"""A real SD3 pipeline, small enough to draw in milliseconds: random weights from configs, nothing downloaded."""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from support.tiny_clip import LETTERS, clip, clip_tokenizer

_WIDTH = 24


def tiny_sd3(
    *, is_35: bool = False, has_t5: bool = True, dynamic_shift: bool = False, channels: int = 4
) -> StableDiffusion3Pipeline:
    """Build the pipeline, the same weights every time, global randomness untouched; ``channels`` of its latents."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shift),
            vae=_vae(channels),
            text_encoder=clip(8, projected=True),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip(12, projected=True),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=_t5() if has_t5 else None,
            tokenizer_3=_t5_tokenizer() if has_t5 else None,
            transformer=_transformer(is_35, channels),
        )
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.transformer):
        part.eval()
    if has_t5:
        pipeline.text_encoder_3.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _transformer(is_35: bool, channels: int) -> SD3Transformer2DModel:
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        pos_embed_max_size=12,
        dual_attention_layers=(0, 1) if is_35 else (),
        qk_norm="rms_norm" if is_35 else None,
    )
    # Random weights hardly read the prompt, and tests want pictures that tell prompts apart.
    transformer.time_text_embed.text_embedder.linear_1.weight.data.mul_(3)
    transformer.context_embedder.weight.data.mul_(10)
    for block in transformer.transformer_blocks:
        block.attn.add_v_proj.weight.data.mul_(10)
    return transformer


def _vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _t5() -> T5EncoderModel:
    size = len(_t5_vocabulary())
    return T5EncoderModel(T5Config(vocab_size=size, d_model=_WIDTH, d_kv=12, d_ff=48, num_layers=2, num_heads=2))


def _t5_vocabulary() -> list[tuple[str, float]]:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return [*special, ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]


def _t5_tokenizer() -> T5Tokenizer:
    return T5Tokenizer(vocab=_t5_vocabulary(), extra_ids=0, model_max_length=512)
