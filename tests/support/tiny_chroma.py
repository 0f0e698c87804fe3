"""A real Chroma pipeline, small enough to draw in milliseconds: random weights from configs, nothing downloaded."""

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from support import tiny_flux


def tiny_chroma(*, dynamic_shift: bool = False, seed: int = 0) -> ChromaPipeline:
    """Build the pipeline, the same weights for the same seed, global randomness untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = ChromaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shift),
            vae=tiny_flux.vae(),
            text_encoder=tiny_flux.t5(),
            tokenizer=tiny_flux.t5_tokenizer(),
            transformer=_transformer(),
        )
    for component in (pipeline.vae, pipeline.text_encoder, pipeline.transformer):
        component.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _transformer() -> ChromaTransformer2DModel:
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=24,
        approximator_layers=2,
    )
    # Random weights hardly read the prompt, and tests want pictures that differ with the prompt: open the gates.
    transformer.distilled_guidance_layer.out_proj.weight.data.mul_(10)
    return transformer
