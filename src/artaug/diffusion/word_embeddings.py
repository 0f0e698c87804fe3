"""Words of one's own in a pipeline: a tokenizer that knows them and embeddings that hold their rows, for a ``with`` block.

Neither the tokenizer nor the weights are changed. A copy of the tokenizer and a module around the embeddings take their places, and
the originals come back after the block.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.nn.functional import embedding

from artaug._internal.digests import digest
from artaug._internal.modules import frozen, unwrap
from artaug.errors import ModelError, TokensError
from artaug.tokens import ANY_ENCODER, InstalledTokens, Tokens, place_rows

_FURTHER = chr(0xE000)
"""Between a word and the number of a further row, in the names of its tokens: a character that prompts do not have."""
_LEGACY_EOS = 2
"""``eos_token_id`` in the configs of CLIP from before transformers 4.31, which is wrong."""


@contextmanager
def installed_tokens(pipeline: Any, encoders: Mapping[str, str], tokens: Tokens) -> Iterator[InstalledTokens]:  # noqa: ANN401 - any diffusers pipeline
    """Let a pipeline's text encoders, frozen, read ``tokens`` in a ``with`` block.

    Args:
        pipeline: of diffusers.
        encoders: see `artaug.diffusion.Family.text_encoders`.
        tokens: the words and their rows.

    Raises:
        TokensError: before anything changes, if a tokenizer knows a word already, or no text encoder has rows as wide.
        ModelError: if there are no ``encoders``.
    """
    parts = _parts(pipeline, encoders)
    rows_by_encoder = _by_encoder(tokens, {name: _width(encoder) for name, (_, encoder) in parts.items()})
    readers = {
        name: _reader(
            parts[name][0],
            {word: len(rows) for word, rows in words.items()},
            tokens,
            encoder=name,
            # diffusers writes a space between the rows of a word, which some tokenizers read.
            between=" " if isinstance(pipeline, TextualInversionLoaderMixin) else "",
        )
        for name, words in rows_by_encoder.items()
    }
    tensors, places = place_rows(rows_by_encoder)
    parameters = {name: nn.Parameter(rows.float(), requires_grad=False) for name, rows in tensors.items()}
    mean_norms = {name: _mean_norm(parts[name][1]) for name in parameters}
    with ExitStack() as stack:
        for name, (reader, ids) in readers.items():
            encoder = parts[name][1]
            stack.enter_context(frozen(encoder))
            stack.enter_context(_replaced_tokenizer(pipeline, _tokenizer_name(encoders[name]), reader))
            stack.enter_context(_replaced_embeddings(encoder, parameters[name], ids))
            stack.enter_context(_end_of_text_by_id(encoder, reader))
        yield InstalledTokens(parameters, mean_norms, places)


def mean_embeddings(pipeline: Any, encoders: Mapping[str, str], text: str) -> dict[str, Tensor]:  # noqa: ANN401 - as above
    """The mean embedding of the tokens of a text, by text encoder: float32, shape (width,).

    Raises:
        TokensError: if an encoder does not know the text.
    """
    means = {}
    for name, (tokenizer, encoder) in _parts(pipeline, encoders).items():
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if not ids or (tokenizer.unk_token_id in ids and tokenizer.unk_token_id != tokenizer.eos_token_id):
            raise TokensError(
                f"the tokenizer of {name} does not know {text!r}: begin with a word that the model has learned."
            )
        weights: Any = encoder.get_input_embeddings()
        device = next(weights.parameters()).device
        with torch.no_grad():
            means[name] = weights(torch.tensor([ids], device=device))[0].float().mean(0).cpu()
    return means


def digest_of_installed(pipeline: Any, encoders: Mapping[str, str]) -> str:  # noqa: ANN401 - as above
    """Of all words that are installed at this moment; empty if there are none."""
    tokenizers = (getattr(pipeline, _tokenizer_name(part), None) for part in encoders.values())
    digests = [tokenizer.tokens_digest for tokenizer in tokenizers if isinstance(tokenizer, _WordReader)]
    return digest(*digests) if digests else ""


class _Embeddings(nn.Module):
    """The embeddings of a text encoder, with further rows for tokens of their own."""

    ids: Tensor

    def __init__(self, vocabulary: nn.Module, rows: nn.Parameter, ids: list[int]) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.rows = rows
        self.register_buffer("ids", torch.tensor(ids), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        # The ids lie anywhere: models have rows beyond the end of their tokenizer's vocabulary.
        is_row = torch.eq(input_ids.unsqueeze(-1), self.ids.to(input_ids.device))  # (..., rows)
        is_new = is_row.any(-1)
        known: Tensor = self.vocabulary(input_ids.masked_fill(is_new, 0))
        new = embedding(is_row.int().argmax(-1), self.rows.to(known.device)).to(known.dtype)
        return torch.where(is_new.unsqueeze(-1), new, known)


class _WordReader:
    """A tokenizer that reads a word as several tokens; it is mixed into a copy of the pipeline's own."""

    expansions: Mapping[str, str]
    """Of each word with several rows: the words of its rows."""
    tokens_digest: str

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the tokenizer's own
        if not isinstance(text, str) and not (isinstance(text, list | tuple) and all(isinstance(t, str) for t in text)):
            return self._read(text, *args, **kwargs)
        texts = [text] if isinstance(text, str) else list(text)
        expanded = [self._expand(item) for item in texts]
        given = expanded[0][0] if isinstance(text, str) else [item for item, _ in expanded]
        encoded = self._read(given, *args, **kwargs)
        if "offset_mapping" in encoded:  # of the text that was given
            offsets = [encoded["offset_mapping"]] if isinstance(text, str) else encoded["offset_mapping"]
            original = [
                [(origins[start][0], origins[stop - 1][1]) if stop > start else (start, stop) for start, stop in spans]
                for spans, (_, origins) in zip(offsets, expanded, strict=True)
            ]
            encoded["offset_mapping"] = original[0] if isinstance(text, str) else original
        return encoded

    def _read(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - likewise
        """The tokenizer's own call."""
        tokenizer: Any = super()
        return tokenizer.__call__(*args, **kwargs)

    def _expand(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """The text with several words for each that has several rows, and where each of its characters is from."""
        pieces, origins, end = [], [], 0
        words = "|".join(map(re.escape, sorted(self.expansions, key=len, reverse=True))) or "(?!)"
        for match in re.finditer(words, text):
            expansion = self.expansions[match[0]]
            pieces += [text[end : match.start()], expansion]
            origins += [(index, index + 1) for index in range(end, match.start())]
            origins += [match.span()] * len(expansion)
            end = match.end()
        origins += [(index, index + 1) for index in range(end, len(text))]
        return "".join([*pieces, text[end:]]), origins


def _parts(pipeline: Any, encoders: Mapping[str, str]) -> dict[str, tuple[Any, Any]]:  # noqa: ANN401 - as above
    """Tokenizer and encoder by the encoder's name, of those that the pipeline has."""
    parts = {
        name: (getattr(pipeline, _tokenizer_name(part), None), unwrap(encoder))
        for name, part in encoders.items()
        if (encoder := getattr(pipeline, part, None)) is not None
    }
    if not parts:
        raise ModelError(
            f"words cannot be added to a {type(pipeline).__name__}: its family does not say which of its parts read prompts by "
            "tokens. Write the family's `text_encoders`, if it is yours."
        )
    return parts


def _tokenizer_name(encoder: str) -> str:
    """The name of the part that tokenizes for an encoder, which has the same number."""
    return encoder.replace("text_encoder", "tokenizer")


def _by_encoder(tokens: Tokens, widths: Mapping[str, int]) -> dict[str, dict[str, Tensor]]:
    """The rows of each word by the encoder that reads them."""
    found: dict[str, dict[str, Tensor]] = {}
    for word, encoders in tokens.rows.items():
        for name, rows in encoders.items():
            fitting = [one for one in widths if widths[one] == rows.shape[1] and name in {one, ANY_ENCODER}]
            if len(fitting) != 1:
                reason = (
                    f"fit several of them, {fitting}: load the file with encoder=..." if fitting else "fit none of them"
                )
                raise TokensError(
                    f"{word!r} has rows of width {rows.shape[1]} for the text encoder {name!r}, and the model has "
                    f"{', '.join(f'{one} of width {width}' for one, width in widths.items())}: they {reason}."
                )
            found.setdefault(fitting[0], {})[word] = rows
    return found


def _reader(
    tokenizer: Any,  # noqa: ANN401 - of transformers
    counts: Mapping[str, int],
    tokens: Tokens,
    *,
    encoder: str,
    between: str,
) -> tuple[Any, list[int]]:
    """A copy of the tokenizer that reads the words, and the ids of their rows, one word after another."""
    known = [word for word in counts if _is_known(tokenizer, word)]
    if known:
        raise TokensError(
            f"the tokenizer of {encoder} knows {known} already, so a prompt could mean either. Choose another word, with signs "
            "that no language has, such as '<cone>': Tokens.load(path, word='<cone>')."
        )
    reader = copy.deepcopy(tokenizer)
    # As `add_tokens` of a text, but matched letter by letter: some tokenizers ignore case and signs.
    names = {word: [word, *(f"{word}{_FURTHER}{row}" for row in range(1, count))] for word, count in counts.items()}
    pieces = [name for of_word in names.values() for name in of_word]
    reader.add_tokens([AddedToken(name, normalized=False) for name in pieces])
    cls = type(tokenizer)
    if not isinstance(tokenizer, _WordReader):  # of words that were installed before
        reader.__class__ = type(cls.__name__, (_WordReader, cls), {"__module__": cls.__module__})
    inherited = getattr(tokenizer, "expansions", {})
    reader.expansions = {
        **inherited,
        **{word: between.join(of_word) for word, of_word in names.items() if len(of_word) > 1},
    }
    reader.tokens_digest = digest(getattr(tokenizer, "tokens_digest", ""), tokens.digest)
    return reader, reader.convert_tokens_to_ids(pieces)


def _is_known(tokenizer: Any, word: str) -> bool:  # noqa: ANN401 - of transformers
    """Whether a word is a token: with the marks of CLIP, T5 and byte-level tokenizers, too, which say that it begins or ends there."""
    ids = list(tokenizer(word, add_special_tokens=False, verbose=False).input_ids)
    token = tokenizer.convert_ids_to_tokens(ids[0]) if len(ids) == 1 else ""
    return word in tokenizer.get_vocab() or token.lstrip(chr(0x2581) + chr(0x120)).removesuffix("</w>") == word.lower()


def _width(encoder: Any) -> int:  # noqa: ANN401 - of transformers
    vocabulary = encoder.get_input_embeddings()
    return int(_innermost(vocabulary).embedding_dim)


def _innermost(vocabulary: Any) -> Any:  # noqa: ANN401 - a module
    return _innermost(vocabulary.vocabulary) if isinstance(vocabulary, _Embeddings) else vocabulary


def _mean_norm(encoder: Any) -> float:  # noqa: ANN401 - of transformers
    weight: Tensor = _innermost(encoder.get_input_embeddings()).weight
    return float(weight.detach().float().norm(dim=1).mean()) if not weight.is_meta else float("nan")


@contextmanager
def _replaced_tokenizer(pipeline: Any, name: str, reader: Any) -> Iterator[None]:  # noqa: ANN401 - as above
    tokenizer = getattr(pipeline, name)
    setattr(pipeline, name, reader)
    try:
        yield
    finally:
        setattr(pipeline, name, tokenizer)


@contextmanager
def _replaced_embeddings(encoder: Any, rows: nn.Parameter, ids: list[int]) -> Iterator[None]:  # noqa: ANN401 - as above
    # T5 has them in two places, as two modules of one weight, and sets both to one.
    places = [
        (parent, name, child)
        for parent in encoder.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Embedding | _Embeddings)
    ]
    encoder.set_input_embeddings(_Embeddings(encoder.get_input_embeddings(), rows, ids))
    try:
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


@contextmanager
def _end_of_text_by_id(encoder: nn.Module, tokenizer: Any) -> Iterator[None]:  # noqa: ANN401 - as above
    """Let CLIP find the end of the text by its id, not as the highest id of the prompt, which a word of one's own has.

    transformers does the latter where the config has the old ``eos_token_id``. Without such words both are the same token.
    """
    legacy = [module for module in encoder.modules() if vars(module).get("eos_token_id") == _LEGACY_EOS]
    for module in legacy:
        module.eos_token_id = tokenizer.eos_token_id
    try:
        yield
    finally:
        for module in legacy:
            module.eos_token_id = _LEGACY_EOS  # type: ignore[assignment]
