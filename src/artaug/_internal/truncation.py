"""Words that a text encoder does not read."""

import warnings
from typing import Any


def warn_if_truncated(prompt: str, *, reader: str, tokenizer: Any, limit: int, remedy: str) -> None:  # noqa: ANN401
    """Say what an encoder will not see: transformers cuts without a word, and diffusers logs it where few look.

    Args:
        prompt: what is to be read.
        reader: who reads it, for the message.
        tokenizer: one of transformers.
        limit: how many tokens are read, those a tokenizer adds included.
        remedy: what to do about it, as a sentence.
    """
    tokens = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    room = limit - tokenizer.num_special_tokens_to_add()
    if len(tokens) > room:
        warnings.warn(
            f"{reader} reads {limit} tokens and the prompt {prompt!r} has {len(tokens) + limit - room}: "
            f"cut off is {tokenizer.decode(tokens[room:])!r}. {remedy}",
            stacklevel=3,
        )
