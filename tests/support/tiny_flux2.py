"""Real FLUX.2 pipelines, small enough to draw in milliseconds: random weights from configs, nothing downloaded."""

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from support.tiny_chat import VOCABULARY, qwen_tokenizer

_WIDTH = 8
_PIECES = {"<s>": 0, "</s>": 1, "<pad>": 2, "[IMG]": 3, "[INST]": 4, "[/INST]": 5}
_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% for part in message.content %}"
    "{% if message.role == 'user' %}[INST]{{ part.text }}[/INST]{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def tiny_flux2(*, guidance_embeds: bool = True, dynamic_shift: bool = True, seed: int = 0) -> Flux2Pipeline:
    """Build the dev pipeline, the same weights for the same seed, global randomness untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = Flux2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shift),
            vae=_vae(),
            text_encoder=_mistral(),
            tokenizer=_mistral_tokenizer(),
            transformer=_transformer(guidance_embeds=guidance_embeds),
        )
    pipeline.system_message = "Draw."  # the real one would be a few hundred of the tokens that spell it
    return _ready(pipeline)


def tiny_flux2_klein(*, is_distilled: bool = False, seed: int = 0) -> Flux2KleinPipeline:
    """Build the klein pipeline, the same weights for the same seed, global randomness untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=_vae(),
            text_encoder=_qwen(),
            tokenizer=qwen_tokenizer(),
            transformer=_transformer(guidance_embeds=False),
            is_distilled=is_distilled,
        )
    return _ready(pipeline)


def _ready(pipeline):
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.transformer):
        part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _transformer(*, guidance_embeds: bool) -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * _WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    # Random weights hardly read the prompt, and tests want pictures that tell prompts apart.
    for modulation in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        getattr(transformer, modulation).linear.weight.data.mul_(20)
    return transformer


def _vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    vae.bn.running_mean.copy_(torch.linspace(-1, 1, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2, 16))
    return vae


def _mistral() -> Mistral3ForConditionalGeneration:
    text = MistralConfig(
        vocab_size=len(_PIECES) + 256,
        hidden_size=_WIDTH,
        intermediate_size=16,
        num_hidden_layers=31,  # the pipeline reads layers 10, 20 and 30
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        pad_token_id=2,
    )
    vision = PixtralVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision, image_token_index=3))


def _mistral_tokenizer() -> PreTrainedTokenizerFast:
    """In place of the `PixtralProcessor` around it, whose image half needs torchvision: its chats are the tokenizer's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {**_PIECES, **{letter: len(_PIECES) + number for number, letter in enumerate(letters)}}
    spelling = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    spelling.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelling.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=spelling,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["[INST]", "[/INST]"],
        padding_side="left",  # as FLUX.2's own
        chat_template=_CHAT,
    )


def _qwen() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=_WIDTH,
        intermediate_size=16,
        num_hidden_layers=28,  # the pipeline reads layers 9, 18 and 27
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config)
