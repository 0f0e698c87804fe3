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
class KeyRow:
    """One layer of the original model, and the layers diffusers makes of it."""

    original: str
    """The original name, ``{}`` standing for a block's number."""
    diffusers: tuple[str, ...]
    """The denoiser's own module paths; several where the original fuses them, in the order of its output rows."""
    split_sizes: tuple[int, ...] = (1,)
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
    original_names: bool = False
    """Original names, fused layers included; else diffusers' names."""
    flat: bool = False
    """Underscores in place of dots."""
    alpha: bool = False
    """An alpha beside every layer, equal to its rank."""
    uniform_rank: bool = False
    """One rank for all layers, with zeros behind the smaller: where diffusers loses alphas that differ."""
    unsupported: frozenset[str] = frozenset()
    """Original names that no independent reader reads right in this format."""

    def stem(self, name: str) -> str:
        """The key of a layer without its ending."""
        return self.prefix + (name.replace(".", "_") if self.flat else name)


@dataclass(frozen=True)
class KeyMatch:
    """A row of the table, with the numbers filled in."""

    row: KeyRow
    numbers: tuple[str, ...]

    @property
    def original(self) -> str:
        """The layer's original name."""
        return self.row.original.format(*self.numbers)

    @property
    def diffusers(self) -> tuple[str, ...]:
        """The module paths of its parts."""
        return tuple(one.format(*self.numbers) for one in self.row.diffusers)


@dataclass(frozen=True, kw_only=True)
class KeyMap:
    """The linear layers and convolutions of one model family, every one of them, and the formats they can be written in.

    The built-in ones stand in ``artaug.lora.formats``: ``FLUX1``, ``FLUX2``, ``SD3``, ``SD15``, ``SDXL``, ``QWEN_IMAGE``,
    ``Z_IMAGE``.
    """

    name: str
    """What its users call it."""
    rows: tuple[KeyRow, ...] = field(repr=False)
    key_formats: Mapping[Format, KeyFormat] = field(repr=False)
    """A format that is missing was not verified against a reader other than artaug's, and is refused."""
    aliases: tuple[KeyRow, ...] = field(default=(), repr=False)
    """Names that other trainers give the layers: read, never written."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "spellings", MappingProxyType(dict(self.key_formats)))

    def __hash__(self) -> int:
        return hash(self.name)

    def __reduce__(self) -> tuple[object, tuple[str, tuple[KeyRow, ...], dict[Format, KeyFormat], tuple[KeyRow, ...]]]:
        return _naming, (self.name, self.rows, dict(self.key_formats), self.aliases)  # a mapping proxy cannot be sent

    def match(self, layer: str) -> KeyMatch | None:
        """Where a module path of the denoiser stands in the table."""
        return self._first(layer, _Names())

    def matches(self, layer: str) -> list[KeyMatch]:
        """All that stands in the table of a module path: the original name, and names of other trainers."""
        found = (self._first(layer, _Names(aliases=aliases)) for aliases in (False, True))
        return [place for place in found if place is not None]

    def resolve(self, name: str, *, flat: bool) -> tuple[KeyMatch, bool] | None:
        """What a file's name for a layer means, and whether it is another's name for it; None if nothing."""
        for original, aliases in ((True, False), (False, False), (True, True)):
            place = self._first(name, _Names(original=original, aliases=aliases, flat=flat))
            if place is not None:
                return place, original
        return None

    def _first(self, name: str, names: "_Names") -> KeyMatch | None:
        for row, pattern in self._patterns[names].get(_blanked(name), ()):
            matched = pattern.fullmatch(name)
            if matched:
                return KeyMatch(row, matched.groups())
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
    name: str, rows: tuple[KeyRow, ...], key_formats: Mapping[Format, KeyFormat], aliases: tuple[KeyRow, ...]
) -> KeyMap:
    return KeyMap(name=name, rows=rows, key_formats=key_formats, aliases=aliases)


class _Names(NamedTuple):
    """Which of a table's names."""

    original: bool = False
    aliases: bool = False
    flat: bool = False


_Patterns: TypeAlias = dict[str, list[tuple[KeyRow, re.Pattern[str]]]]


def _patterns(rows: Sequence[KeyRow], *, original: bool, flat: bool) -> _Patterns:
    found: _Patterns = {}
    for row, name in _spelt(rows, original=original):
        to_state_dict = name.replace(".", "_") if flat else name
        pattern = re.compile(re.escape(to_state_dict).replace(r"\{\}", r"(\d+)"))
        found.setdefault(_blanked(to_state_dict.replace("{}", "0")), []).append((row, pattern))
    return found


def _spelt(rows: Sequence[KeyRow], *, original: bool) -> Iterator[tuple[KeyRow, str]]:
    for row in rows:
        for name in (row.original,) if original else row.diffusers:
            yield row, name


def _blanked(name: str) -> str:
    return re.sub(r"\d+", "#", name)
