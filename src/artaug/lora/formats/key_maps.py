"""How one family's layers are called, by diffusers and by the model's own authors. Rows of a table, no code."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple, TypeAlias


class Format(StrEnum):
    """A way of spelling LoRA files.

    >>> import artaug as aa
    >>> aa.Format.KOHYA
    <Format.KOHYA: 'kohya'>
    """

    PEFT = "peft"
    """``transformer.*.lora_A.weight``, or ``unet.*``: what diffusers writes, read by most."""
    KOHYA = "kohya"
    """``lora_unet_*.lora_down.weight`` with an alpha a layer: sd-scripts and every web UI."""
    COMFYUI = "comfyui"
    """``diffusion_model.*``: the model's own names with dots."""
    DIFFSYNTH = "diffsynth"
    """``*.lora_A.default.weight``: bare names, as DiffSynth-Studio trains them."""
    ONETRAINER = "onetrainer"
    """``lora_transformer_*``: diffusers' names with underscores. Read, never written."""


@dataclass(frozen=True)
class Row:
    """One layer of the original model, and the layers diffusers makes of it."""

    theirs: str
    """The original name, ``{}`` standing for a block's number."""
    ours: tuple[str, ...]
    """The denoiser's own module paths; several where the original fuses them, in the order of its output rows."""
    shares: tuple[int, ...] = (1,)
    """Relative heights of those layers in the fused one."""
    aspect: Fraction | None = None
    """Outputs over inputs of the original layer, where that tells families apart."""
    swapped: bool = False
    """The two halves of the output rows change places."""


@dataclass(frozen=True)
class KeyFormat:
    """How a format spells the layers of one family."""

    prefix: str
    down: str
    up: str
    original: bool = False
    """Original names, fused layers included; else diffusers' names."""
    flat: bool = False
    """Underscores in place of dots."""
    alpha: bool = False
    """An alpha beside every layer, equal to its rank."""
    uniform: bool = False
    """One rank for all layers, with zeros behind the smaller: where diffusers loses alphas that differ."""
    unread: frozenset[str] = frozenset()
    """Original names that no independent reader reads right in this format."""

    def base(self, name: str) -> str:
        """The key of a layer without its ending."""
        return self.prefix + (name.replace(".", "_") if self.flat else name)


@dataclass(frozen=True)
class Place:
    """A row of the table, with the numbers filled in."""

    row: Row
    numbers: tuple[str, ...]

    @property
    def theirs(self) -> str:
        """The layer's original name."""
        return self.row.theirs.format(*self.numbers)

    @property
    def ours(self) -> tuple[str, ...]:
        """The module paths of its parts."""
        return tuple(one.format(*self.numbers) for one in self.row.ours)


@dataclass(frozen=True, kw_only=True)
class KeyMap:
    """The linear layers and convolutions of one model family, every one of them, and the formats they can be written in.

    The built-in ones stand in ``artaug.lora.formats``: ``FLUX1``, ``FLUX2``, ``SD3``, ``SD15``, ``SDXL``, ``QWEN_IMAGE``,
    ``Z_IMAGE``.
    """

    name: str
    """What its users call it."""
    rows: tuple[Row, ...] = field(repr=False)
    spellings: Mapping[Format, KeyFormat] = field(repr=False)
    """A format that is missing was not verified against a reader other than artaug's, and is refused."""
    aliases: tuple[Row, ...] = field(default=(), repr=False)
    """Names that other trainers give the layers: read, never written."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "spellings", MappingProxyType(dict(self.spellings)))

    def __hash__(self) -> int:
        return hash(self.name)

    def __reduce__(self) -> tuple[object, tuple[str, tuple[Row, ...], dict[Format, KeyFormat], tuple[Row, ...]]]:
        return _naming, (self.name, self.rows, dict(self.spellings), self.aliases)  # a mapping proxy cannot be sent

    def place(self, layer: str) -> Place | None:
        """Where a module path of the denoiser stands in the table."""
        return self._first(layer, _Names())

    def places(self, layer: str) -> list[Place]:
        """All that stands in the table of a module path: the original name, and names of other trainers."""
        found = (self._first(layer, _Names(aliases=aliases)) for aliases in (False, True))
        return [place for place in found if place is not None]

    def read(self, name: str, *, flat: bool) -> tuple[Place, bool] | None:
        """What a file's name for a layer means, and whether it is another's name for it; None if nothing."""
        for original, aliases in ((True, False), (False, False), (True, True)):
            place = self._first(name, _Names(original=original, aliases=aliases, flat=flat))
            if place is not None:
                return place, original
        return None

    def _first(self, name: str, names: "_Names") -> Place | None:
        for row, pattern in self._patterns[names].get(_blanked(name), ()):
            matched = pattern.fullmatch(name)
            if matched:
                return Place(row, matched.groups())
        return None

    @cached_property
    def _patterns(self) -> dict["_Names", "_Patterns"]:
        """The rows by their names with all numbers blanked, so that a file of a thousand keys is read at once."""
        chosen = [_Names(*one) for one in itertools.product((False, True), repeat=3)]
        return {
            one: _patterns(self.aliases if one.aliases else self.rows, original=one.original, flat=one.flat)
            for one in chosen
        }


def _naming(
    name: str, rows: tuple[Row, ...], spellings: Mapping[Format, KeyFormat], aliases: tuple[Row, ...]
) -> KeyMap:
    return KeyMap(name=name, rows=rows, spellings=spellings, aliases=aliases)


class _Names(NamedTuple):
    """Which of a table's names."""

    original: bool = False
    aliases: bool = False
    flat: bool = False


_Patterns: TypeAlias = dict[str, list[tuple[Row, re.Pattern[str]]]]


def _patterns(rows: Sequence[Row], *, original: bool, flat: bool) -> _Patterns:
    found: _Patterns = {}
    for row, name in _spelt(rows, original=original):
        to_state_dict = name.replace(".", "_") if flat else name
        pattern = re.compile(re.escape(to_state_dict).replace(r"\{\}", r"(\d+)"))
        found.setdefault(_blanked(to_state_dict.replace("{}", "0")), []).append((row, pattern))
    return found


def _spelt(rows: Sequence[Row], *, original: bool) -> Iterator[tuple[Row, str]]:
    for row in rows:
        for name in (row.theirs,) if original else row.ours:
            yield row, name


def _blanked(name: str) -> str:
    return re.sub(r"\d+", "#", name)
