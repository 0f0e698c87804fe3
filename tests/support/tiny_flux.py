"""A real FLUX pipeline, small enough to draw in milliseconds: random weights from configs, nothing downloaded."""

import string

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

TINY_SIZE = 32
"""Pixels on a side that suit the pipeline: 8 x 8 image tokens of 4 x 4 pixels."""


def tiny_flux(*, guidance_embeds: bool = False, dynamic_shift: bool = False, seed: int = 0) -> FluxPipeline:
    """Build the pipeline, the same weights for the same seed, global randomness untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shift),
            vae=vae(),
            text_encoder=_clip(),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=t5(),
            tokenizer_2=t5_tokenizer(),
            transformer=_transformer(guidance_embeds),
        )
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.transformer):
        part.eval()
    return pipeline


def _transformer(guidance_embeds: bool) -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    # Random weights hardly read the prompt, and tests want pictures that tell prompts apart.
    transformer.time_text_embed.text_embedder.linear_1.weight.data.mul_(10)
    return transformer


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=TINY_SIZE,
        scaling_factor=0.36,
        shift_factor=0.11,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _clip() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(_clip_vocabulary()),
        hidden_size=20,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config)


def _clip_vocabulary() -> dict[str, int]:
    pieces = [
        "<|startoftext|>",
        "<|endoftext|>",
        *string.printable[:94],
        *(f"{letter}</w>" for letter in string.printable[:94]),
    ]
    return {piece: number for number, piece in enumerate(pieces)}


def _clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=_clip_vocabulary(), merges=[], model_max_length=32)


def t5() -> T5EncoderModel:
    size = len(_t5_vocabulary())
    return T5EncoderModel(T5Config(vocab_size=size, d_model=24, d_kv=12, d_ff=48, num_layers=2, num_heads=2))


def _t5_vocabulary() -> list[tuple[str, float]]:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return [*special, ("▁", -1.0), *((letter, -2.0) for letter in string.printable[:94])]


def t5_tokenizer() -> T5Tokenizer:
    return T5Tokenizer(vocab=_t5_vocabulary(), extra_ids=0, model_max_length=512)
