"""Build the playground's FluxPipeline, untrained: the real classes, at about one five-thousandth of the size."""

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from artaug.playground.world import ADJECTIVES, COLORS, PLACES, SETTINGS, SHAPES

MAX_SEQUENCE_LENGTH = 24
"""Tokens of a caption, the end token included."""
SHIFT = 1.0

_PAD, _END, _UNKNOWN, _START = "<pad>", "</s>", "<unk>", "<s>"
_WIDTH, _HEADS, _POOLED = 96, 4, 64


def new_pipeline(vae: AutoencoderKL) -> FluxPipeline:
    """A pipeline of an untrained transformer, untrained encoders and a trained autoencoder."""
    tokenizer, tokenizer_2 = _tokenizer(has_start_token=True), _tokenizer(has_start_token=False)
    transformer = FluxTransformer2DModel(
        in_channels=4 * vae.config.latent_channels,
        num_layers=2,
        num_single_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=_WIDTH,
        pooled_projection_dim=_POOLED,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    _start_as_identity(transformer)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=_clip(len(tokenizer), end=tokenizer.eos_token_id),
        tokenizer=tokenizer,
        text_encoder_2=_t5(len(tokenizer_2)),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def _start_as_identity(transformer: FluxTransformer2DModel) -> None:
    """Close every gate, as in adaLN-Zero (Peebles and Xie 2023)."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith("linear") or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def _tokenizer(*, has_start_token: bool) -> PreTrainedTokenizerFast:
    """Split captions into words: lower case, no punctuation, anything unknown is one token."""
    phrases = (*COLORS, *SHAPES, *PLACES, *SETTINGS, *ADJECTIVES, "a", "an", "and")
    words = dict.fromkeys([_PAD, _END, _UNKNOWN, _START, *" ".join(phrases).split()])
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=_UNKNOWN))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s]"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = f"{_START} $A {_END}" if has_start_token else f"$A {_END}"
    special = [(token, backend.token_to_id(token)) for token in (_START, _END)]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_START,
        eos_token=_END,
        unk_token=_UNKNOWN,
        pad_token=_PAD,
        model_max_length=MAX_SEQUENCE_LENGTH + has_start_token,
    )


def _clip(vocabulary: int, *, end: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=_POOLED,
        intermediate_size=2 * _POOLED,
        num_hidden_layers=2,
        num_attention_heads=_HEADS,
        max_position_embeddings=MAX_SEQUENCE_LENGTH + 1,
        projection_dim=_POOLED,
        eos_token_id=end,
        bos_token_id=None,
        pad_token_id=0,
    )
    return CLIPTextModel(config)


def _t5(vocabulary: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocabulary,
        d_model=_WIDTH,
        d_kv=_WIDTH // _HEADS,
        d_ff=2 * _WIDTH,
        num_layers=2,
        num_heads=_HEADS,
        dropout_rate=0.0,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=32,
        pad_token_id=0,
        eos_token_id=1,
        is_encoder_decoder=False,
        use_cache=False,
    )
    encoder = T5EncoderModel(config)
    _init_position_biases(encoder)
    return encoder


@torch.no_grad()
def _init_position_biases(encoder: T5EncoderModel) -> None:
    """Start with heads that attend back, ahead, around and anywhere, so that words soon find what they belong to."""
    back, ahead = next(position_biases(encoder)).split(16)
    steps = torch.arange(16.0)
    back.copy_(torch.stack([-0.6 * steps, -4 - steps, -0.4 * steps, 0 * steps], dim=1))
    ahead.copy_(torch.stack([-4 - steps, -0.6 * steps, -0.4 * steps, 0 * steps], dim=1))


def position_biases(encoder: T5EncoderModel) -> Iterator[nn.Parameter]:
    """Yield the table of attention by distance between words: distances back and ahead x heads."""
    yield encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight


def tokenize(pipeline: FluxPipeline, captions: list[str], gists: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token numbers for the word encoder and for the pooled one, as the pipeline makes them."""
    words = pipeline.tokenizer_2(
        captions, padding="max_length", max_length=MAX_SEQUENCE_LENGTH, truncation=True, return_tensors="pt"
    )
    pooled = pipeline.tokenizer(
        gists, padding="max_length", max_length=pipeline.tokenizer_max_length, truncation=True, return_tensors="pt"
    )
    return words.input_ids, pooled.input_ids
