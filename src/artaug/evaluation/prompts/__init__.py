"""Prompt sets: prompts with categories, from published files on the user's disk or from a small built-in set."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final, overload

import numpy as np

from artaug._internal.annotations import checked
from artaug._internal.decoding import decode_json
from artaug.errors import InvalidValueError, PromptError
from artaug.evaluation.prompts.skipping import check_skipped

__all__ = ["PromptSet"]

_EVERYDAY = Path(__file__).parent / "everyday.tsv"
_PROMPT_COLUMNS = ("Prompt", "Prompts")
_FORMATS = (
    "PartiPrompts (.tsv with columns Prompt, Category, ...), DrawBench (.csv with columns Prompts, Category), "
    'HPD (.json: a list of texts, or of objects with "prompt") or .txt (one prompt a line)'
)


@checked
@final
@dataclass(frozen=True)
class PromptSet(Sequence[str]):
    """Prompts with their categories, in order. It is a sequence of its prompts, so `compare` and `improve` take it.

    Raises:
        PromptError: for a blank prompt, or if there is not one category a prompt.

    >>> import artaug as aa
    >>> prompts = aa.PromptSet.everyday()
    >>> len(prompts), prompts[0]
    (48, 'a kitchen table with half a loaf of bread and a knife')
    """

    prompts: tuple[str, ...]
    categories: tuple[str, ...]
    """One a prompt; the empty string where the file names none."""

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.categories) or not self.prompts:
            raise PromptError(
                f"a PromptSet received {len(self.prompts)} prompts and {len(self.categories)} categories: need one "
                "category a prompt, and at least one prompt."
            )
        for index, prompt in enumerate(self.prompts):
            if not prompt.strip():
                raise PromptError(
                    f"prompt number {index} of the set is {prompt!r}: need a text that says what to draw."
                )

    @classmethod
    def read(cls, path: str | Path) -> "PromptSet":
        """Read a file as its publisher gives it: PartiPrompts, DrawBench, HPD, or plain text.

        PartiPrompts is a ``.tsv`` with the columns ``Prompt`` and ``Category``; DrawBench a ``.csv`` with ``Prompts`` and
        ``Category``; HPD (v2) a ``.json``: a list of texts, whose category is the name of the file (``anime.json``), or
        of objects with ``prompt``; a ``.txt`` has one prompt a line. The ending of the file's name decides the format.
        A row without a prompt is left out, with a warning that names it; blanks around a category are removed.

        Raises:
            PromptError: for another format, or a file that is not what its name says, naming line and column; also if
                half of its rows have no prompt.
            FileNotFoundError: if there is no such file.
        """
        path = Path(path)
        readers = {".tsv": _read_table, ".csv": _read_table, ".json": _read_json, ".txt": _read_lines}
        if path.suffix.lower() not in readers:
            raise PromptError(f"{path.name!r} has an unknown format. Expected {_FORMATS}.")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise PromptError(f"{path.name!r} is not UTF-8 text. Expected {_FORMATS}.") from None
        try:
            rows = list(readers[path.suffix.lower()](text, path))
        except csv.Error as error:
            raise PromptError(f"{path.name!r} is no table: {error}. Expected {_FORMATS}.") from error
        prompts = [row for row in rows if isinstance(row, tuple)]
        check_skipped(path, [row for row in rows if isinstance(row, str)], read=len(prompts), stacklevel=2)
        if not prompts:
            raise PromptError(f"{path.name!r} holds no prompts. Expected {_FORMATS}.")
        return cls(tuple(prompt for prompt, _ in prompts), tuple(category for _, category in prompts))

    @classmethod
    def everyday(cls) -> "PromptSet":
        """Our own 48 prompts of plain scenes in eight categories: for a quick check, not a published benchmark."""
        return cls.read(_EVERYDAY)

    def in_category(self, category: str) -> "PromptSet":
        """The prompts of one category.

        Raises:
            InvalidValueError: if there is none, naming those there are.
        """
        indices = [index for index, name in enumerate(self.categories) if name == category]
        if not indices:
            raise InvalidValueError(
                f"no prompt is of category {category!r}. There are: {sorted(set(self.categories))}."
            )
        return self._select(indices)

    def sample(self, count: int, *, seed: int = 0) -> "PromptSet":
        """``count`` prompts, drawn without replacement and kept in their order; the same for the same seed.

        Raises:
            InvalidValueError: if there are not as many.
        """
        if not 1 <= count <= len(self):
            raise InvalidValueError(f"cannot sample {count} of {len(self)} prompts: need 1 to {len(self)}.")
        return self._select(sorted(np.random.default_rng(seed).choice(len(self), size=count, replace=False)))

    def _select(self, indices: Sequence[int]) -> "PromptSet":
        return PromptSet(tuple(self.prompts[i] for i in indices), tuple(self.categories[i] for i in indices))

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...

    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return self.prompts[index]


# A reader yields the prompt and the category of each row, or, for a row without a prompt, why there is none.


def _read_table(text: str, path: Path) -> Iterator[tuple[str, str] | str]:
    """Prompts and categories of a table with headings. PartiPrompts quotes no field, so in a .tsv a quote is a quote."""
    tabbed = path.suffix.lower() == ".tsv"
    reader = csv.DictReader(
        io.StringIO(text), delimiter="\t" if tabbed else ",", quoting=csv.QUOTE_NONE if tabbed else csv.QUOTE_MINIMAL
    )
    headings = list(reader.fieldnames or ())
    column = next((name for name in _PROMPT_COLUMNS if name in headings), None)
    if column is None:
        raise PromptError(
            f"{path.name!r} has the columns {headings}. Expected {' or '.join(_PROMPT_COLUMNS)} among them."
        )
    for row in reader:
        prompt = row[column]
        if prompt is None or not prompt.strip():
            yield f"line {reader.line_num}: the column {column} is empty"
        else:
            # DrawBench's categories end in a blank in some rows ("Gary Marcus et al. ").
            yield prompt, (row.get("Category") or "").strip()


def _read_json(text: str, path: Path) -> Iterator[tuple[str, str] | str]:
    try:
        items = decode_json(text)
    except ValueError as error:
        raise PromptError(f"{path.name!r} is not JSON: {error}.") from None
    if not isinstance(items, list):
        raise PromptError(f"{path.name!r} holds a JSON {type(items).__name__}. Expected a list, as HPD has.")
    for index, item in enumerate(items):
        prompt = item.get("prompt") if isinstance(item, dict) else item
        if not isinstance(prompt, str) or not prompt.strip():
            yield f'item {index} is {item!r:.120}: expected a text, or an object with a text "prompt"'
        else:
            yield prompt, path.stem if isinstance(item, str) else str(item.get("category", "")).strip()


def _read_lines(text: str, _path: Path) -> Iterator[tuple[str, str] | str]:
    return ((line, "") for line in text.split("\n") if line.strip())
