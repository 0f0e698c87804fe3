"""Families whose text encoder is a language model: chat templates, prompts of any length, positions that start anew."""

import warnings
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from artaug.diffusion.families.common import Tokenizer, tokenizer_settings
from artaug.errors import GuideError
from artaug.regional.denoiser import EncodedPrompt, Span


def chat_tokens(
    prompts: Sequence[str],
    chats: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    *,
    reader: str,
    limit: int,
    start: int = 0,
) -> Hashable:
    """The tokens of prompts, for `kept_encoding`, with a warning of every part that an encoder cuts.

    The words of the chat around a prompt count.

    Args:
        prompts: as they were given.
        chats: the tokens of the whole chat of each, before the cut.
        tokenizer: decodes what is cut.
        reader: the encoder's name.
        limit: tokens of the chat that are read.
        start: how many tokens before them are left out of what the encoder returns.
    """
    for prompt, chat in zip(prompts, chats, strict=True):
        tokens = chat[start:]
        if len(tokens) > limit:
            from_left = tokenizer.truncation_side == "left"
            cut = tokens[: len(tokens) - limit] if from_left else tokens[limit:]
            warnings.warn(
                f"{reader} reads {limit} tokens and the prompt {prompt!r} has {len(tokens)} with the chat around it: "
                f"cut off is {tokenizer.decode(cut)!r}. Shorten it, or raise max_sequence_length.",
                stacklevel=3,
            )
    return limit, start, tokenizer_settings(tokenizer), tuple(map(tuple, chats))


def pad_rows(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack prompts of different lengths.

    Args:
        rows: each (tokens, channels).

    Returns:
        The rows with zeros behind the shorter ones (rows, tokens, channels), and a mask that is 1 on their own tokens.
    """
    longest = max(len(row) for row in rows)
    tokens = torch.stack([pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    mask = torch.stack([pad(row.new_ones(len(row), dtype=torch.long), (0, longest - len(row))) for row in rows])
    return tokens, mask


@dataclass(frozen=True, eq=False)
class SlottedPrompts:
    """The prompts of a batch side by side, in slots at the same places of every row."""

    tokens: Tensor
    """Shape (rows, tokens, channels), zeros where a row has no prompt in a slot."""
    positions: Tensor
    """The position of each token in its own prompt, as if that prompt were the only one: int64, (tokens,)."""
    spans: list[tuple[Span, ...]]
    """The spans of each row."""


def slot_padded(
    base: Tensor,
    prompts: Sequence[Sequence[EncodedPrompt]],
    *,
    name: str,
    trim_padding: bool,
    lengths: Sequence[int] | None = None,
) -> SlottedPrompts:
    """Put region prompts before the prompt of each row, the i-th region prompts of all rows in one slot.

    A model that shares positions over its batch can start every prompt at position 0 only if the i-th prompts of all
    rows begin at the same token. A prompt keeps the positions that it has alone, with its padding on either side. A slot
    is as long as its longest prompt. The region prompts come first, so that the row's own prompt and the image, which
    most queries see, are neighbours in the sequence, and attention reads both without a copy.

    Args:
        base: the prompts of a call, (rows, tokens, channels).
        prompts: for every row its region prompts.
        name: of the tokens in a prompt's conditioning.
        trim_padding: leave a region prompt's padding out.
        lengths: how many tokens of each row of ``base`` belong to its prompt, the rest is padding; None for all.
    """
    parts: list[list[Tensor]] = [[] for _ in base]
    spans: list[list[Span]] = [[] for _ in base]
    positions = []
    for number in range(1, 1 + max(map(len, prompts), default=0)):
        slot_prompts = {
            row: row_prompts[number - 1] for row, row_prompts in enumerate(prompts) if len(row_prompts) >= number
        }
        kept = {
            row: prompt.token_slice if trim_padding else slice(0, prompt.conditioning[name].shape[1])
            for row, prompt in slot_prompts.items()
        }
        slot = slice(min(tokens.start for tokens in kept.values()), max(tokens.stop for tokens in kept.values()))
        positions.append(torch.arange(slot.start, slot.stop))
        for row, (row_parts, row_spans) in enumerate(zip(parts, spans, strict=True)):
            tokens = base.new_zeros(slot.stop - slot.start, base.shape[2])
            if row in slot_prompts:
                place = slice(kept[row].start - slot.start, kept[row].stop - slot.start)
                tokens[place] = slot_prompts[row].conditioning[name][0][kept[row]].to(base)
            row_parts.append(tokens)
            row_spans.extend(_slot_spans(number, kept.get(row, slice(slot.start, slot.start)), slot))
    for row, length in enumerate(lengths or [base.shape[1]] * len(base)):
        spans[row].extend(_slot_spans(0, slice(0, length), slice(0, base.shape[1])))
    return SlottedPrompts(
        torch.stack([torch.cat([*row_parts, own]) for row_parts, own in zip(parts, base, strict=True)]),
        torch.cat([*positions, torch.arange(base.shape[1])]).to(base.device),
        [tuple(row_spans) for row_spans in spans],
    )


def _slot_spans(number: int, prompt: slice, slot: slice) -> Iterator[Span]:
    """The spans of a slot: a prompt, and the padding before and behind it."""
    for span in (
        Span("padding", prompt.start - slot.start),
        Span("text", prompt.stop - prompt.start, number),
        Span("padding", slot.stop - prompt.stop),
    ):
        if span.length:
            yield span


def check_prompts_differ(prompts: Tensor, negative_prompts: Tensor, negative: str) -> None:
    """Refuse prompts equal to the negative prompt, where only the values of a call's prompts tell its branch.

    Raises:
        GuideError: if every prompt of a batch is the negative prompt.
    """
    if torch.equal(prompts, negative_prompts):
        raise GuideError(
            f"every prompt of this batch is the negative prompt {negative!r} itself, so a guide cannot tell which "
            "prediction is for which. Change either, or draw without classifier-free guidance."
        )
