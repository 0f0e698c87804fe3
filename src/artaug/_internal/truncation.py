"""A warning where a text encoder truncates a prompt."""

import warnings
from typing import Any


def warn_if_truncated(
    prompt: str,
    *,
    reader: str,
    tokenizer: Any,  # noqa: ANN401 - of transformers, untyped
    limit: int,
    remedy: str,
    stacklevel: int = 3,
) -> None:
    """Warn of the part of a prompt that an encoder truncates; transformers does not warn, and diffusers only logs it.

    Args:
        prompt: the prompt.
        reader: name of the encoder, for the message.
        tokenizer: a tokenizer of transformers.
        limit: number of tokens that the encoder reads, with the special ones that the tokenizer adds.
        remedy: what to do about it, as a sentence.
        stacklevel: whose call the warning is about: 3 for who called the caller.
    """
    tokens = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    special = tokenizer.num_special_tokens_to_add()
    if len(tokens) + special > limit:
        warnings.warn(
            f"{reader} reads {limit} tokens and the prompt {prompt!r} has {len(tokens) + special}: "
            f"cut off is {tokenizer.decode(tokens[limit - special :])!r}. {remedy}",
            stacklevel=stacklevel,
        )
