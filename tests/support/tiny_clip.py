"""Tiny real CLIP text encoders with a tokenizer of letters: random weights from a config, nothing downloaded."""

import string

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

LETTERS = string.printable[:94]
LONGEST = 32
"""The longest prompt in tokens; 77 in the real one."""


def clip(width: int, *, projected: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Build an encoder of hidden size ``width``, with a projection of the pooled output or without."""
    config = CLIPTextConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LONGEST,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def clip_tokenizer() -> CLIPTokenizer:
    """Build the tokenizer: every letter is a token."""
    return CLIPTokenizer(vocab=_vocabulary(), merges=[], model_max_length=LONGEST)


def _vocabulary() -> dict[str, int]:
    pieces = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return {piece: index for index, piece in enumerate(pieces)}
