"""Decoding that keeps to a JSON schema and closes the JSON before the tokens run out.

llguidance computes which tokens may come next. This module adds the end: once the remaining tokens are only just enough
to close what is open, it lets nothing else through. So any weights give complete JSON, random ones too.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from artaug.errors import InvalidValueError, ModelError

_CLOSERS = (b"]", b"}", b",", b'"')
"""The tokens, outside of strings, that close something or lead to the next required part, in order of preference."""
_SLACK = 16
"""Tokens that finishing a character, an escape or a number may take before anything can be closed."""


class SchemaDecoding:
    """A tokenizer's vocabulary, prepared to constrain replies to JSON schemas, without white space between JSON tokens.

    Raises:
        ModelError: for a tokenizer that llguidance cannot read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, eos_token_ids: Sequence[int]) -> None:
        try:
            self.tokenizer: LLTokenizer = from_tokenizer(tokenizer, eos_token=list(eos_token_ids))
        except ValueError as error:
            raise ModelError(
                f"llguidance cannot read the vocabulary of {type(tokenizer).__name__}: {error}. Load a fast tokenizer, or "
                "pass constrained=False to parse the model's free replies."
            ) from error
        token_bytes = [self.tokenizer.decode_bytes([token]) for token in range(self.tokenizer.vocab_size)]
        self.eos_token_ids: list[int] = list(eos_token_ids)
        self.starts_with: dict[bytes, NDArray[np.bool_]] = {
            mark: np.array([text.startswith(mark) for text in token_bytes]) for mark in _CLOSERS
        }
        self.is_letter: NDArray[np.bool_] = np.array(
            [text == b"z" for text in token_bytes]
        )  # allowed only inside a string

    def logits_processor(self, schemas: Sequence[dict[str, Any]], *, max_new_tokens: int) -> LogitsProcessor:
        """A processor for one ``generate`` call that constrains each row of the batch to its schema.

        Raises:
            InvalidValueError: if ``max_new_tokens`` is too small for the shortest reply, or for a schema that llguidance
                does not support.
        """
        reserve = max((min_tokens(schema) for schema in schemas), default=0)
        if max_new_tokens < reserve:
            raise InvalidValueError(
                f"max_new_tokens={max_new_tokens} cannot hold a reply with one suggestion: need at least {reserve}."
            )
        return _SchemaLogitsProcessor(self, [self._matcher(schema) for schema in schemas], reserve, max_new_tokens)

    def _matcher(self, schema: dict[str, Any]) -> LLMatcher:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        matcher = LLMatcher(self.tokenizer, grammar)
        if matcher.is_error():
            raise InvalidValueError(
                f"llguidance does not support this schema: {matcher.get_error()}; received {schema}."
            )
        return matcher


def min_tokens(schema: dict[str, Any]) -> int:
    """A number of tokens that is enough to close a reply from any state of the schema.

    A token has at least one byte, so the bytes of the shortest reply with one item in every list are enough.

    >>> from artaug.critics.constrained import min_tokens
    >>> min_tokens({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]})
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


class _SchemaLogitsProcessor(LogitsProcessor):  # type: ignore[misc]  # mypy does not read transformers
    """Masks, row by row, the tokens that would break the row's schema. For one ``generate`` call only."""

    def __init__(self, decoding: SchemaDecoding, matchers: list[LLMatcher], reserve: int, max_new_tokens: int) -> None:
        self.decoding = decoding
        self.matchers = matchers
        self.reserve = reserve
        self.remaining = max_new_tokens
        self.started = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Set the scores (rows, vocabulary) of the tokens that may not come next to -inf."""
        # The model may score more tokens than the tokenizer has (padded embeddings), or fewer.
        width = max(scores.shape[1], self.decoding.tokenizer.vocab_size)
        allowed = torch.zeros((len(self.matchers), width), dtype=torch.bool)
        for row, matcher in enumerate(self.matchers):
            if self.started and not matcher.is_stopped() and not matcher.consume_token(int(input_ids[row, -1])):
                raise RuntimeError(f"a token was sampled that the schema does not allow: {matcher.get_error()}")
            stopped = matcher.is_stopped()
            tokens = self.decoding.eos_token_ids if stopped else np.flatnonzero(self._allowed(matcher))
            allowed[row, torch.as_tensor(tokens)] = True
        self.started, self.remaining = True, self.remaining - 1
        return scores.masked_fill(~allowed[:, : scores.shape[1]].to(scores.device), -torch.inf)

    def _allowed(self, matcher: LLMatcher) -> np.ndarray:
        """Which tokens (vocabulary,) may come next; only closing ones once the remaining tokens are needed for that."""
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed: np.ndarray = np.unpackbits(bits, bitorder="little")[: self.decoding.tokenizer.vocab_size].astype(bool)
        if self.remaining > self.reserve:
            return allowed
        in_string = bool((allowed & self.decoding.is_letter).any())
        for mark in (b'"',) if in_string else _CLOSERS:
            closing: np.ndarray = allowed & self.decoding.starts_with[mark]
            if closing.any():
                return closing
        return allowed
