"""Decoding that can neither leave a JSON schema nor run out of tokens before the JSON is closed.

Which token may come next is llguidance's work. What is added here is a landing: once the tokens that are left only just
suffice to close what is open, nothing else is let through. So any weights give whole JSON, random ones too.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from artaug.errors import InvalidValueError, ModelError

_CLOSERS = (b"]", b"}", b",", b'"')
"""What closes or goes on to the next thing outside of texts, the best first."""
_SLACK = 16
"""Tokens that may go to finishing a letter, an escape or a number before anything can be closed."""


class SchemaDecoding:
    """A model's vocabulary, ready to hold replies to JSON schemas, without free white space between their parts.

    Raises:
        ModelError: for a tokenizer that llguidance cannot read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, ends: Sequence[int]) -> None:
        try:
            self.words = from_tokenizer(tokenizer, eos_token=list(ends))
        except ValueError as fault:
            raise ModelError(
                f"{type(tokenizer).__name__} cannot be held to a schema: {fault}. Load a fast tokenizer, or pass "
                "constrained=False and have the model's free replies read."
            ) from fault
        to_state_dict = [self.words.decode_bytes([token]) for token in range(self.words.vocab_size)]
        self.ends = list(ends)
        self.begins_with = {mark: np.array([text.startswith(mark) for text in to_state_dict]) for mark in _CLOSERS}
        self.is_letter = np.array([text == b"z" for text in to_state_dict])

    def keeping(self, schemas: Sequence[dict[str, Any]], *, max_new_tokens: int) -> LogitsProcessor:
        """Hold the rows of one batch to a schema each, from here on.

        Raises:
            InvalidValueError: if ``max_new_tokens`` cannot hold even the shortest reply, or for a schema that llguidance
                cannot follow.
        """
        needed = max((fewest_tokens(schema) for schema in schemas), default=0)
        if max_new_tokens < needed:
            raise InvalidValueError(
                f"max_new_tokens={max_new_tokens} cannot hold a reply with one suggestion: need at least {needed}."
            )
        return _KeepsSchemas(self, [self._matcher(schema) for schema in schemas], needed, max_new_tokens)

    def _matcher(self, schema: dict[str, Any]) -> LLMatcher:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        matcher = LLMatcher(self.words, grammar)
        if matcher.is_error():
            raise InvalidValueError(f"llguidance cannot follow this schema: {matcher.get_error()}; received {schema}.")
        return matcher


def fewest_tokens(schema: dict[str, Any]) -> int:
    """So many tokens always suffice to close a reply, wherever in the schema it is.

    A token is at least a byte, so the bytes of the shortest reply with one thing in every list are enough.

    >>> from artaug.critics.constrained import fewest_tokens
    >>> fewest_tokens({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]})
    25
    """
    return len(json.dumps(_shortest(schema), separators=(",", ":")).encode()) + 1 + _SLACK


def _shortest(schema: dict[str, Any]) -> Any:  # noqa: ANN401  # JSON
    match schema["type"]:
        case "object":
            return {name: _shortest(part) for name, part in schema["properties"].items()}
        case "array":
            return [_shortest(schema["items"])] * max(schema.get("minItems", 0), 1)
        case "string":
            return "a" * schema.get("minLength", 0)
        case _:
            return 0


class _KeepsSchemas(LogitsProcessor):  # type: ignore[misc]  # transformers is not read by mypy
    """Masks, row by row, what would leave the row's schema. It goes through one batch, once."""

    def __init__(self, decoding: SchemaDecoding, matchers: list[LLMatcher], needed: int, max_new_tokens: int) -> None:
        self.decoding = decoding
        self.matchers = matchers
        self.needed = needed
        self.left = max_new_tokens
        self.begun = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask the scores (rows, vocabulary) of the tokens that may not come next."""
        allowed = torch.zeros(
            (len(self.matchers), max(scores.shape[1], self.decoding.words.vocab_size)), dtype=torch.bool
        )
        for row, matcher in enumerate(self.matchers):
            if self.begun and not matcher.is_stopped() and not matcher.consume_token(int(input_ids[row, -1])):
                raise RuntimeError(f"a token was drawn that the schema does not allow: {matcher.get_error()}")
            tokens = self.decoding.ends if matcher.is_stopped() else np.flatnonzero(self._allowed(matcher))
            allowed[row, torch.as_tensor(tokens)] = True
        self.begun, self.left = True, self.left - 1
        return scores.masked_fill(~allowed[:, : scores.shape[1]].to(scores.device), -torch.inf)

    def _allowed(self, matcher: LLMatcher) -> np.ndarray:
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed: np.ndarray = np.unpackbits(bits, bitorder="little")[: self.decoding.words.vocab_size].astype(bool)
        if self.left > self.needed:
            return allowed
        in_a_text = bool((allowed & self.decoding.is_letter).any())
        for mark in (b'"',) if in_a_text else _CLOSERS:
            closing: np.ndarray = allowed & self.decoding.begins_with[mark]
            if closing.any():
                return closing
        return allowed
