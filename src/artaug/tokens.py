"""Words of one's own: embedding rows of text encoders (textual inversion, arXiv 2208.01618), as a value and as files."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeAlias, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from artaug._internal.digests import tensors_digest
from artaug._internal.files import atomic_write, load_tensors, save_tensors
from artaug._internal.mappings import FrozenDict
from artaug._internal.text import shorten
from artaug.errors import TokensError

__all__ = ["InstalledTokens", "TokenLayout", "Tokens"]

Rows: TypeAlias = Float[Tensor, "vectors width"]
"""Embedding rows of one word in one text encoder: as many tokens as there are vectors."""

TokenLayout: TypeAlias = Literal["diffusers", "a1111", "encoders"]
"""How a file names its rows.

``"diffusers"``: one tensor, by the word (``learned_embeds.safetensors`` of diffusers). ``"a1111"``: one tensor ``emb_params``, the word
is the name of the file. ``"encoders"``: a tensor for each text encoder, by its name (``clip_l``, ``clip_g``, ``t5xxl``), as for SDXL,
SD3 and FLUX; the word is the name of the file.
"""

ANY_ENCODER = "any"
"""The encoder of rows whose file does not say it: the one whose embeddings are as wide."""
_A1111_NAME = "emb_params"
_ENCODERS = {
    **{name: name for name in ("clip_l", "clip_g", "clip_h", "t5xxl", "qwen25_7b", "qwen3_4b")},
    "t5": "t5xxl",  # of diffusers' script for FLUX
}
"""The names of text encoders in files, and here."""
_WORD, _ENCODER = "artaug.word", "artaug.encoder"
"""What the header of a file says where the names of its tensors do not."""


@final
@dataclass(frozen=True, eq=False)
class Tokens:
    """Words of one's own, with their embedding rows in each text encoder: what textual inversion learns.

    `artaug.diffusion.DiffusersSynthesizer.with_tokens` draws with them, and `artaug.TokenTrainer` learns them. A word with several
    rows is read as that many tokens. An encoder for which a word has no rows reads it letter by letter, as any unknown word.

    Raises:
        TokensError: if there is no word, one is empty or has white space in it, or its rows are not finite numbers of shape
            (vectors, width).

    >>> import artaug as aa, torch
    >>> tokens = aa.Tokens({"<cone>": {"clip_l": torch.ones(2, 768), "t5xxl": torch.ones(1, 4096)}})
    >>> tokens
    Tokens('<cone>': 2 x 768 clip_l, 1 x 4096 t5xxl)
    """

    rows: Mapping[str, Mapping[str, Rows]]
    """By word, then by text encoder; ``"any"`` is the encoder whose embeddings are as wide."""

    def __post_init__(self) -> None:
        _check_form(self.rows)
        if not self.rows:
            raise TokensError("Tokens need at least one word, received none.")
        for word, encoders in self.rows.items():
            if word.split() != [word]:
                raise TokensError(
                    f"{word!r} is no word: expected letters or signs without white space, such as '<cone>'."
                )
            if not encoders:
                raise TokensError(f"the word {word!r} has no rows: expected them for at least one text encoder.")
            for encoder, rows in encoders.items():
                _check_rows(word, encoder, rows)
        copied = {
            word: FrozenDict({encoder: rows.detach().cpu().clone() for encoder, rows in encoders.items()})
            for word, encoders in self.rows.items()
        }
        object.__setattr__(self, "rows", FrozenDict(copied))

    def __repr__(self) -> str:
        words = (
            f"{word!r}: " + ", ".join(f"{len(rows)} x {rows.shape[1]} {encoder}" for encoder, rows in encoders.items())
            for word, encoders in self.rows.items()
        )
        return f"Tokens({'; '.join(words)})"

    @property
    def words(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(self.rows)

    @property
    def digest(self) -> str:
        """SHA-256 of words and rows, in hexadecimal: equal if and only if two are bitwise equal."""
        return tensors_digest(
            {f"{word} {encoder}": rows for word, encoders in self.rows.items() for encoder, rows in encoders.items()}
        )

    def __or__(self, other: "Tokens") -> "Tokens":
        """The words of both.

        Raises:
            TokensError: if both have a word.
        """
        if both := self.rows.keys() & other.rows.keys():
            raise TokensError(
                f"both have the words {sorted(both)}. Take one of them out, or load it under another word."
            )
        return Tokens({**self.rows, **other.rows})

    def only(self, *words: str) -> "Tokens":
        """Some of the words.

        Raises:
            TokensError: for one that is not there.
        """
        if missing := [word for word in words if word not in self.rows]:
            raise TokensError(f"{self!r} has no {missing}.")
        return Tokens({word: self.rows[word] for word in words})

    def save(self, path: str | Path, *, layout: TokenLayout | None = None) -> Path:
        """Write one word as a safetensors file, atomically.

        Readers for which the file's name is the word (A1111, ComfyUI) want it called so. The rows keep their precision.

        Args:
            path: where to write; missing folders are created.
            layout: see `TokenLayout`; None for ``"diffusers"`` of one text encoder, and ``"encoders"`` of several.

        Returns:
            The path written.

        Raises:
            TokensError: if there are several words, which no layout of the field holds, or several text encoders in a layout for
                one.
            StorageError: if the system cannot write the file; an existing file is kept.
        """
        if len(self.rows) > 1:
            raise TokensError(
                f"a file holds one word, and there are {len(self.rows)}: {list(self.rows)}. Save each: tokens.only(word).save(...)."
            )
        ((word, encoders),) = self.rows.items()
        layout = layout or ("diffusers" if len(encoders) == 1 else "encoders")
        if layout not in get_args(TokenLayout):
            raise TokensError(f"layout={layout!r}: expected one of {list(get_args(TokenLayout))}.")
        if layout == "encoders":
            if unknown := [name for name in encoders if name not in _ENCODERS.values()]:
                raise TokensError(
                    f"no reader of the layout 'encoders' knows the text encoder {unknown[0]!r}: expected names of "
                    f"{sorted(set(_ENCODERS.values()))}, or one encoder in another layout."
                )
            tensors, header = dict(encoders), {_WORD: word}
        else:
            if len(encoders) > 1:
                raise TokensError(
                    f"the layout {layout!r} holds the rows of one text encoder, and {word!r} has those of {list(encoders)}. Use "
                    "'encoders'."
                )
            ((encoder, rows),) = encoders.items()
            tensors = {word if layout == "diffusers" else _A1111_NAME: rows}
            header = {_WORD: word, _ENCODER: encoder}
        path = Path(path)
        with atomic_write(path, what="the file of tokens", remedy="Make room, or choose another place.") as temporary:
            save_tensors(tensors, temporary, header)
        return path

    @classmethod
    def load(cls, path: str | Path, *, word: str | None = None, encoder: str | None = None) -> Self:
        """Read a safetensors file in any `TokenLayout`, recognised by its keys.

        Args:
            path: the file.
            word: what to call it; None for what the file says, or else, as A1111 and ComfyUI do, for the file's name.
            encoder: whose rows they are, in a file that has one tensor and does not say; None for the one whose width fits.

        Raises:
            TokensError: if there is no such file, it is no safetensors file, or its tensors are not rows of one word.
        """
        path = Path(path)
        try:
            tensors, header = load_tensors(path)
        except OSError as error:
            raise TokensError(
                f"{path} could not be read: {error}. Expected a safetensors file of a textual inversion; pickled ones (.pt, .bin) "
                "can run code, and are not read."
            ) from None
        names = list(tensors)
        if names and all(name in _ENCODERS for name in names) and _ENCODER not in header:
            stated, encoders = header.get(_WORD), {_ENCODERS[name]: tensors[name] for name in names}
            if encoder is not None:
                raise TokensError(f"{path} names its text encoders, {list(encoders)}: leave encoder={encoder!r} out.")
        elif len(names) == 1:
            stated = header.get(_WORD) if names[0] == _A1111_NAME else names[0]
            encoders = {encoder or header.get(_ENCODER) or ANY_ENCODER: tensors[names[0]]}
        else:
            raise TokensError(
                f"{path} holds {len(names)} tensors (first: {names[:3]}). Expected one, or one for each text encoder, named as "
                f"{sorted(_ENCODERS)}: is it a LoRA, or a whole model?"
            )
        # diffusers also writes a single row as a vector.
        rows = {name: tensor.unsqueeze(0) if tensor.ndim == 1 else tensor for name, tensor in encoders.items()}
        return cls({word or stated or path.stem: rows})


def _check_form(rows: object) -> None:
    if not isinstance(rows, Mapping) or not all(
        isinstance(word, str) and isinstance(encoders, Mapping) for word, encoders in rows.items()
    ):
        raise TokensError(
            "Tokens need rows by word, then by text encoder, such as {'<cone>': {'clip_l': rows}}, received "
            f"{shorten(repr(rows), 120)}. An encoder that is not known is 'any'."
        )


def _check_rows(word: str, encoder: str, rows: object) -> None:
    expected = f"Expected finite numbers of shape (vectors, width) for {word!r} in {encoder!r}"
    if not isinstance(rows, Tensor) or not rows.is_floating_point() or rows.ndim != 2 or 0 in rows.shape:
        received = f"{rows.dtype} of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else repr(rows)
        raise TokensError(f"{expected}, received {received}.")
    if not rows.isfinite().all():
        raise TokensError(f"{expected}, received NaN or infinity.")


@dataclass(frozen=True, eq=False)
class InstalledTokens:
    """Words that text encoders read at this moment, and the rows that they read: `artaug.diffusion.Family.installed`."""

    parameters: Mapping[str, nn.Parameter]
    """By text encoder: float32, shape (rows, width), the rows of all words one after another. They ask for no gradient until
    ``requires_grad_()`` is called, and what is written into them is read by the next encoding."""
    mean_norms: Mapping[str, float]
    """By text encoder: the mean norm of the rows of its own vocabulary."""
    places: Mapping[str, Mapping[str, slice]]
    """By word, then by text encoder: which rows are its."""

    def tokens(self, tensors: Mapping[str, Tensor] | None = None) -> Tokens:
        """The rows as they are now, or other ``tensors`` in their place, as a value."""
        tensors = self.parameters if tensors is None else tensors
        return Tokens(
            {
                word: {encoder: tensors[encoder][rows].detach() for encoder, rows in encoders.items()}
                for word, encoders in self.places.items()
            }
        )

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self.parameters.values())


def place_rows(
    rows_by_encoder: Mapping[str, Mapping[str, Rows]],
) -> tuple[dict[str, Tensor], dict[str, dict[str, slice]]]:
    """Rows of words, by encoder and word, one after another: the whole of each encoder, and where each word's are.

    >>> import torch
    >>> from artaug.tokens import place_rows
    >>> place_rows({"clip_l": {"<a>": torch.ones(2, 4), "<b>": torch.ones(1, 4)}})[1]
    {'<a>': {'clip_l': slice(0, 2, None)}, '<b>': {'clip_l': slice(2, 3, None)}}
    """
    places: dict[str, dict[str, slice]] = {}
    for encoder, words in rows_by_encoder.items():
        start = 0
        for word, rows in words.items():
            places.setdefault(word, {})[encoder] = slice(start, start + len(rows))
            start += len(rows)
    return {encoder: torch.cat(list(words.values())) for encoder, words in rows_by_encoder.items()}, places
