"""Which tokens a phrase of a prompt becomes: the one place that matches words with tokens, for every kind of encoder."""

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from artaug.diffusion.families.common import Tokenizer
from artaug.errors import GuideError

_MARK = "\ue000"
"""A character of no meaning, which stands for the prompt to find where a chat template puts it."""


@dataclass(frozen=True, kw_only=True)
class TokenizedPrompt:
    """A prompt as one text encoder reads it."""

    text: str
    """What is tokenized: the prompt, or a chat around it."""
    prompt: slice
    """Where the prompt is in ``text``."""
    characters: tuple[tuple[int, int], ...]
    """For every token where its characters in ``text`` begin and end; equal for one that stands for none."""
    first: int
    """The position of the first token in a row of `artaug.diffusion.Family.encode_prompts`, negative where the row leaves it out."""
    positions_kept: range
    """The positions in the row that belong to this encoder."""
    convert: Callable[[str], str] = str
    """What was done to the prompt before, such as the words of a textual inversion; a phrase is converted likewise."""

    def positions(self, phrase: str) -> list[int]:
        """The positions in the row of all tokens that hold characters of a phrase."""
        found = list(_occurrences(self.convert(phrase), self.text, self.prompt))
        return [
            position
            for position, (start, stop) in enumerate(self.characters, start=self.first)
            if position in self.positions_kept and any(start < last and first < stop for first, last in found)
        ]


def tokenize_prompt(
    tokenizer: Tokenizer,
    prompt: str,
    *,
    limit: int,
    offset: int = 0,
    convert: Callable[[str], str] = str,
) -> TokenizedPrompt:
    """A prompt as an encoder reads it that pads on the right and cuts prompts at ``limit`` tokens, its special ones included.

    Args:
        tokenizer: of the encoder.
        prompt: as it was given.
        limit: tokens that are read.
        offset: the position of the encoder's first token in the row.
        convert: see `TokenizedPrompt.convert`.
    """
    text = convert(prompt)
    characters = character_spans(tokenizer, text, limit=limit)
    return TokenizedPrompt(
        text=text,
        prompt=slice(0, len(text)),
        characters=characters,
        first=offset,
        positions_kept=range(offset, offset + limit),
        convert=convert,
    )


def tokenize_chat(
    tokenizer: Tokenizer,
    prompt: str,
    chat: Callable[[str], str],
    *,
    limit: int,
    start: int = 0,
    pads_left: bool = False,
    add_special_tokens: bool = True,
) -> TokenizedPrompt:
    """A prompt in a chat, as a language model reads it.

    Args:
        tokenizer: of the language model.
        prompt: as it was given.
        chat: the text of the whole chat around a prompt.
        limit: tokens that are read, without those before ``start``.
        start: how many tokens at the beginning are left out of the row.
        pads_left: whether a row has its padding before the tokens, up to ``limit``.
        add_special_tokens: whether the tokenizer adds its own to the chat.
    """
    text, marked = chat(prompt), chat(_MARK)
    # What surrounds the prompt is the same for all prompts; a template may have stripped the prompt itself.
    before = marked.index(_MARK)
    after = len(marked) - before - len(_MARK)
    characters = character_spans(tokenizer, text, add_special_tokens=add_special_tokens)
    length = len(characters) - start
    cut = max(length - limit, 0) if tokenizer.truncation_side == "left" else 0
    first = limit - min(length, limit) if pads_left else 0
    return TokenizedPrompt(
        text=text,
        prompt=slice(before, len(text) - after),
        characters=characters,
        first=first - start - cut,
        positions_kept=range(first, limit),
    )


def character_spans(
    tokenizer: Tokenizer, text: str, *, limit: int | None = None, add_special_tokens: bool = True
) -> tuple[tuple[int, int], ...]:
    """Where the characters of every token begin and end, of at most ``limit`` tokens.

    Raises:
        GuideError: for a tokenizer that does not say.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise GuideError(
            f"{type(tokenizer).__name__} does not say which characters its tokens hold, so no phrase can be found. Load the "
            "pipeline with the fast tokenizer of the same name."
        )
    encoded = tokenizer(
        text,
        truncation=limit is not None,
        max_length=limit,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        verbose=False,
    )
    return tuple((int(start), int(stop)) for start, stop in encoded.offset_mapping)


def _occurrences(phrase: str, text: str, within: slice) -> Iterator[tuple[int, int]]:
    """Where a phrase begins and ends in part of a text, by whole words."""
    words = phrase.split()
    if not words:
        return
    # Looking ahead, since what begins inside a word may overlap what does not: "cat cat" in "scat cat cat".
    spaced = r"\s+".join(map(re.escape, words))
    pattern = re.compile(f"(?=({spaced}))", re.IGNORECASE)
    for match in pattern.finditer(text, within.start, within.stop):
        first, last = match.span(1)
        outer_left = text[first - 1] if first > within.start else " "
        outer_right = text[last] if last < within.stop else " "
        if not (_is_one_word(outer_left, text[first]) or _is_one_word(text[last - 1], outer_right)):
            yield first, last


def _is_one_word(left: str, right: str) -> bool:
    """Whether two neighbouring characters are in one word. Scripts without case do not part words by spaces, or less strictly."""
    return _is_word(left) and _is_word(right)


def _is_word(character: str) -> bool:
    return character.isdigit() or character.lower() != character.upper() or unicodedata.combining(character) > 0
