"""A real Qwen-Image pipeline, small enough to draw in milliseconds: random weights from configs, nothing downloaded."""

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import BatchFeature, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from support.tiny_chat import VISION, VOCABULARY, qwen_tokenizer

_WIDTH = 16


def tiny_qwen_image(*, dynamic_shift: bool = True, seed: int = 0) -> QwenImagePipeline:
    """Build the pipeline, the same weights for the same seed, global randomness untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0, use_dynamic_shifting=dynamic_shift, max_shift=0.9, max_image_seq_len=8192
            ),
            vae=_vae(),
            text_encoder=_qwen(),
            tokenizer=qwen_tokenizer(),
            transformer=_transformer(),
        )
    # The real tokenizer spells what comes before the prompt in 34 tokens, this one a letter at a time.
    before = pipeline.prompt_template_encode.split("{}")[0]
    pipeline.prompt_template_encode_start_idx = len(pipeline.tokenizer(before).input_ids)
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.transformer):
        part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_qwen_image_edit() -> QwenImageEditPipeline:
    """Build the pipeline that edits: its language model sees, in patches of 14 pixels."""
    tokenizer = qwen_tokenizer(sees=True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipeline = QwenImageEditPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=_qwen(sees=True),
            tokenizer=tokenizer,
            processor=_Processor(tokenizer),
            transformer=_transformer(),
        )
    before = pipeline.prompt_template_encode.split("<|vision_start|>")[0]
    pipeline.prompt_template_encode_start_idx = len(tokenizer(before).input_ids)
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.transformer):
        part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class _Processor:
    """Prompts and pictures as Qwen2VLProcessor gives them, which needs torchvision for videos."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.image_processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)

    def __call__(self, *, text, images, padding, return_tensors):
        seen = self.image_processor(images=images, return_tensors=return_tensors)
        merged = seen["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2
        texts = [
            chat.replace("<|image_pad|>", "<|image_pad|>" * count)
            for chat, count in zip(text, merged.tolist(), strict=True)
        ]
        return BatchFeature({**self.tokenizer(texts, padding=padding, return_tensors=return_tensors), **seen})


def _transformer() -> QwenImageTransformer2DModel:
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    # Random weights hardly read the prompt, and tests want pictures that tell prompts apart.
    for block in transformer.transformer_blocks:
        for modulation in (block.img_mod, block.txt_mod):
            modulation[1].weight.data.mul_(30)
    return transformer


def _vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.7, 0.1, 0.2, 0.9],
        latents_std=[2.8, 1.4, 2.3, 0.7],
    )


def _qwen(*, sees: bool = False) -> Qwen2_5_VLForConditionalGeneration:
    text = Qwen2_5_VLTextConfig(
        vocab_size=len(VOCABULARY) + (len(VISION) if sees else 0),
        hidden_size=_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    )
    vision = Qwen2_5_VLVisionConfig(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=_WIDTH, fullatt_block_indexes=[0]
    )
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = {name: len(VOCABULARY) + index for index, name in enumerate(names)} if sees else {}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, bos_token_id=0, eos_token_id=2, **ids)
    return Qwen2_5_VLForConditionalGeneration(config)
