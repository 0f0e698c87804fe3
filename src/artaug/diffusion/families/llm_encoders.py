"""What families do alike that read prompts with a language model: chats, rows of any length, texts that begin anew."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import CacheMixin
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import pad

from artaug._internal.images import as_rgb
from artaug.diffusion.families.common import Pipeline, Tokenizer
from artaug.errors import GuideError, ModelError
from artaug.regional.denoiser import EncodedPrompt, Span


def warn_if_chat_truncated(
    prompt: str, tokens: Sequence[int], *, reader: str, tokenizer: Tokenizer, limit: int
) -> None:
    """Say what an encoder will not see of a prompt in its chat, the words of the chat around it counted.

    Args:
        prompt: as it was given.
        tokens: of the whole chat, none cut.
        reader: the encoder's name.
        tokenizer: decodes what is cut.
        limit: tokens of the chat that are read.
    """
    if len(tokens) > limit:
        from_left = tokenizer.truncation_side == "left"
        cut = tokens[: len(tokens) - limit] if from_left else tokens[limit:]
        warnings.warn(
            f"{reader} reads {limit} tokens and the prompt {prompt!r} has {len(tokens)} with the chat around it: "
            f"cut off is {tokenizer.decode(cut)!r}. Shorten it, or raise max_sequence_length.",
            stacklevel=2,
        )


def checked_pixels(pipeline: Pipeline, images: Sequence[Image], *, width: int, height: int) -> Tensor:
    """Pictures as a VAE takes them, in its type and where it works: (batch, 3, height, width), in [-1, 1].

    Raises:
        ModelError: if a picture has another size.
    """
    for image in images:
        if image.size != (width, height):
            raise ModelError(
                f"a picture of {image.width} x {image.height} pixels cannot be encoded at {width} x "
                f"{height}. Resize it, or set the synthesizer's width and height."
            )
    pixels = pipeline.image_processor.preprocess([as_rgb(image) for image in images], height=height, width=width)
    device = pipeline._execution_device  # noqa: SLF001 - .device is wrong under offload
    return pixels.to(device, pipeline.vae.dtype)  # type: ignore[no-any-return]


def stacked(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of (tokens, channels) as one tensor, zeros behind the shorter ones, and a mask that is 1 on what is theirs."""
    longest = max(len(row) for row in rows)
    filled = torch.stack([pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    mask = torch.stack([pad(row.new_ones(len(row), dtype=torch.long), (0, longest - len(row))) for row in rows])
    return filled, mask


@dataclass(frozen=True, eq=False)
class Slotted:
    """Prompts of a batch one after the other, in slots that are at the same places in every row."""

    tokens: Tensor
    """Shape (rows, tokens, channels), zeros where a row has nothing."""
    positions: Tensor
    """The position of each token in the prompt it is of, as if that were the only one: int64, (tokens,)."""
    spans: list[tuple[Span, ...]]
    """What each row holds."""


def slotted(
    base: Tensor,
    prompts: Sequence[Sequence[EncodedPrompt]],
    *,
    name: str,
    trim_padding: bool,
    lengths: Sequence[int] | None = None,
) -> Slotted:
    """Put region prompts ahead of the prompt each row has, the i-th prompts of all rows in one slot.

    Ahead, so that the row's own prompt stays the neighbour of the image behind it: most tokens see these two, and
    attention takes neighbours without copying them together.

    A model that shares positions over its batch can so begin every prompt anew. A prompt keeps the positions it has
    alone, on whichever side its padding is; a slot is as long as its longest prompt, the rest filler.

    Args:
        base: the prompts of a call, (rows, tokens, channels).
        prompts: for every row those to add.
        name: of the tokens in a text's conditioning.
        trim_padding: leave a text's padding out.
        lengths: tokens of each row of ``base`` that are its prompt's, the rest filler; None for all.
    """
    rows: list[list[Tensor]] = [[] for _ in base]
    ends = lengths or [base.shape[1]] * len(rows)
    spans: list[list[Span]] = [[] for _ in base]
    positions = []
    for number in range(1, 1 + max(map(len, prompts), default=0)):
        there = {row: of_row[number - 1] for row, of_row in enumerate(prompts) if len(of_row) >= number}
        held = {row: _held(text, name, trim_padding=trim_padding) for row, text in there.items()}
        slot = slice(min(one.start for one in held.values()), max(one.stop for one in held.values()))
        positions.append(torch.arange(slot.start, slot.stop))
        for row, (parts, of_row) in enumerate(zip(rows, spans, strict=True)):
            filled = base.new_zeros(slot.stop - slot.start, base.shape[2])
            if row in there:
                own = slice(held[row].start - slot.start, held[row].stop - slot.start)
                filled[own] = there[row].conditioning[name][0][held[row]].to(base)
            parts.append(filled)
            of_row.extend(_framed(number, held.get(row, slice(slot.start, slot.start)), slot))
    own_spans = [_framed(0, slice(0, end), slice(0, base.shape[1])) for end in ends]
    return Slotted(
        torch.stack([torch.cat([*parts, own]) for parts, own in zip(rows, base, strict=True)]),
        torch.cat([*positions, torch.arange(base.shape[1])]).to(base.device),
        [(*of_row, *own) for of_row, own in zip(spans, own_spans, strict=True)],
    )


def _held(text: EncodedPrompt, name: str, *, trim_padding: bool) -> slice:
    return text.token_slice if trim_padding else slice(0, text.conditioning[name].shape[1])


def _framed(prompt: int, own: slice, slot: slice) -> Iterator[Span]:
    """A prompt in its slot, with the filler before and behind it."""
    for span in (
        Span("padding", own.start - slot.start),
        Span("text", own.stop - own.start, prompt),
        Span("padding", slot.stop - own.stop),
    ):
        if span.length:
            yield span


def check_apart(prompts: Tensor, against: Tensor, negative: str) -> None:
    """Refuse prompts that are the negative prompt, where a pipeline copies both and only their values tell them apart.

    Raises:
        GuideError: if every picture of a batch is asked to be what it should not be.
    """
    if torch.equal(prompts, against):
        raise GuideError(
            f"every prompt of this batch is the negative prompt {negative!r} itself, so a guide cannot tell which "
            "prediction is for which. Change either, or draw without classifier-free guidance."
        )


def check_no_cache(transformer: CacheMixin) -> None:
    """Refuse to guide a transformer that caches predictions.

    Raises:
        GuideError: since a cache cannot tell a region's prompt from the plan's.
    """
    if transformer.is_cache_enabled:
        raise GuideError(
            "this transformer caches predictions from step to step (enable_cache), which cannot tell a region's "
            "prompt from the plan's. Call pipeline.transformer.disable_cache() before drawing with a guide."
        )
