"""How one model family names its layers: the table of diffusers' names and of the original names, and its file formats.

In memory a LoRA always has diffusers' module paths; only files have other names, and one table serves both directions:
writing looks up a module path (`KeyMap.match`), reading a name (`KeyMap.resolve`). A row with several of diffusers' layers
is one layer of the original model, such as queries, keys and values in one matrix.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple, Self, TypeAlias

from artaug._internal.mappings import FrozenDict


class Format(StrEnum):
    """A convention for the keys of LoRA files.

    >>> import artaug as aa
    >>> aa.Format.KOHYA
    <Format.KOHYA: 'kohya'>
    """

    PEFT = "peft"
    """``transformer.*.lora_A.weight``, or ``unet.*``: what diffusers writes, read by most."""
    KOHYA = "kohya"
    """``lora_unet_*.lora_down.weight`` with an alpha for each layer: sd-scripts and every web UI."""
    COMFYUI = "comfyui"
    """``diffusion_model.*``: the model's own names with dots."""
    DIFFSYNTH = "diffsynth"
    """``*.lora_A.default.weight``: names without a prefix, as DiffSynth-Studio writes them."""
    ONETRAINER = "onetrainer"
    """``lora_transformer_*``, or ``lycoris_*`` of LyCORIS: diffusers' names with underscores. Read, never written."""


QKV = (1, 1, 1)
"""`KeyRow.split_sizes` of queries, keys and values in one layer."""


@dataclass(frozen=True)
class KeyRow:
    """One layer of the original model, and the layers that diffusers splits it into."""

    original: str
    """The original name. ``{}`` stands for the number of a block."""
    diffusers: tuple[str, ...]
    """The denoiser's own module paths; several where the original fuses them, in the order of its output rows."""
    split_sizes: tuple[int, ...] = (1,)
    """Relative numbers of output rows of those layers in the fused one."""
    aspect: Fraction | None = None
    """Outputs over inputs of the original layer, if that distinguishes families with equal names."""
    swapped: bool = False
    """The first and the second half of the output rows are exchanged."""
    swapped_aspect: Fraction | None = None
    """They are only in layers with these outputs over inputs: one name may stand for layers of different sizes."""

    @classmethod
    def unchanged(cls, *names: str) -> tuple[Self, ...]:
        """Layers that have the same name in the original model and in diffusers."""
        return tuple(cls(name, (name,)) for name in names)

    @classmethod
    def renamed(cls, original: str, diffusers: str, suffixes: Mapping[str, str]) -> tuple[Self, ...]:
        """Layers of one block: its name in the original and in diffusers, and below it original to diffusers' names."""
        return tuple(cls(f"{original}.{old}", (f"{diffusers}.{new}",)) for old, new in suffixes.items())

    def swaps(self, *, outputs: int, inputs: int) -> bool:
        """Whether the halves of the output rows are exchanged in a layer of this size."""
        return self.swapped and self.swapped_aspect in {None, Fraction(outputs, inputs)}


@dataclass(frozen=True)
class KeyFormat:
    """How the keys of one format are built for one family."""

    prefix: str
    down: str
    """Ending of the key of ``LowRank.down``."""
    up: str
    """Ending of the key of ``LowRank.up``."""
    original_names: bool = False
    """Original names, fused layers included; else diffusers' names."""
    flat: bool = False
    """Underscores in place of dots."""
    alpha: bool = False
    """An alpha beside every layer, equal to its rank."""
    uniform_rank: bool = False
    """One rank for all layers, smaller ones padded with zeros: for families where diffusers loses alphas that differ."""
    unsupported: frozenset[str] = frozenset()
    """Original names that no reader other than artaug's reads correctly in this format."""

    @classmethod
    def peft(cls, component: str) -> Self:
        """The format of diffusers, for a denoiser that is the pipeline's ``component``: ``transformer`` or ``unet``."""
        return cls(f"{component}.", ".lora_A.weight", ".lora_B.weight")

    @classmethod
    def kohya(
        cls, *, original_names: bool = False, uniform_rank: bool = False, unsupported: Iterable[str] = ()
    ) -> Self:
        """The format of sd-scripts, which trains the original model (``original_names``) or diffusers' one."""
        return cls(
            "lora_unet_",
            ".lora_down.weight",
            ".lora_up.weight",
            original_names,
            flat=True,
            alpha=True,
            uniform_rank=uniform_rank,
            unsupported=frozenset(unsupported),
        )

    @classmethod
    def comfyui(cls, *, original_names: bool = False, unsupported: Iterable[str] = ()) -> Self:
        """The format of ComfyUI with PEFT's names of the factors."""
        return cls(
            "diffusion_model.",
            ".lora_A.weight",
            ".lora_B.weight",
            original_names,
            unsupported=frozenset(unsupported),
        )

    @classmethod
    def diffsynth(cls) -> Self:
        """The format of DiffSynth-Studio, for models whose layers it does not rename."""
        return cls("", ".lora_A.default.weight", ".lora_B.default.weight")

    def stem(self, name: str) -> str:
        """The key of a layer without its ending."""
        return self.prefix + (name.replace(".", "_") if self.flat else name)


@dataclass(frozen=True)
class KeyMatch:
    """A row of the table with the block numbers of one layer."""

    row: KeyRow
    numbers: tuple[str, ...]

    @property
    def original(self) -> str:
        """The layer's original name."""
        return self.row.original.format(*self.numbers)

    @property
    def diffusers(self) -> tuple[str, ...]:
        """The module paths of its parts."""
        return tuple(name.format(*self.numbers) for name in self.row.diffusers)


@dataclass(frozen=True, kw_only=True)
class KeyMap:
    """Names of all linear layers and convolutions of one model family, and the formats it can be written in.

    The built-in ones are in ``artaug.lora.formats``: ``FLUX1``, ``FLUX2``, ``SD3``, ``SD15``, ``SDXL``, ``QWEN_IMAGE``,
    ``Z_IMAGE``.
    """

    name: str
    """The name of the family in error texts."""
    rows: tuple[KeyRow, ...] = field(repr=False)
    key_formats: Mapping[Format, KeyFormat] = field(repr=False)
    """A format that is missing was not verified against a reader other than artaug's, and is refused."""
    aliases: tuple[KeyRow, ...] = field(default=(), repr=False)
    """Names that other trainers give the layers: read, never written."""
    default_format: Format = Format.PEFT
    """What `LoRA.save` writes without a format: one that the programs of the family's users read whole."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key_formats", FrozenDict(self.key_formats))

    def __hash__(self) -> int:
        return hash(self.name)

    def match(self, layer: str) -> KeyMatch | None:
        """The row of a layer, given the denoiser's module path; None if it has none."""
        return self._find(layer, _NameKind())

    def matches(self, layer: str) -> list[KeyMatch]:
        """All rows of a layer, given the denoiser's module path: with the original name, and with aliases."""
        found = (self._find(layer, _NameKind(aliases=aliases)) for aliases in (False, True))
        return [match for match in found if match is not None]

    def resolve(self, name: str, *, flat: bool) -> tuple[KeyMatch, bool] | None:
        """The row of a layer, given its name in a file, and whether that is an original name or an alias.

        Returns:
            None if no row has this name.
        """
        for original, aliases in ((True, False), (False, False), (True, True)):
            match = self._find(name, _NameKind(original=original, aliases=aliases, flat=flat))
            if match is not None:
                return match, original
        return None

    def _find(self, name: str, kind: "_NameKind") -> KeyMatch | None:
        for row, pattern in self._patterns[kind].get(_mask_numbers(name), ()):
            matched = pattern.fullmatch(name)
            if matched:
                return KeyMatch(row, matched.groups())
        return None

    @cached_property
    def _patterns(self) -> "dict[_NameKind, _Patterns]":
        """The rows by their names with all numbers masked: a file of a thousand keys takes a thousand look-ups."""
        kinds = itertools.starmap(_NameKind, itertools.product((False, True), repeat=3))
        return {
            kind: _compile(self.aliases if kind.aliases else self.rows, original=kind.original, flat=kind.flat)
            for kind in kinds
        }


class _NameKind(NamedTuple):
    """Which of a table's names are searched."""

    original: bool = False
    aliases: bool = False
    flat: bool = False


_Patterns: TypeAlias = dict[str, list[tuple[KeyRow, re.Pattern[str]]]]


def _compile(rows: Sequence[KeyRow], *, original: bool, flat: bool) -> _Patterns:
    patterns: _Patterns = {}
    for row in rows:
        for dotted in (row.original,) if original else row.diffusers:
            name = dotted.replace(".", "_") if flat else dotted
            # each {} becomes a group, so that the numbers of a match fill the row's other names
            pattern = re.compile(re.escape(name).replace(r"\{\}", r"(\d+)"))
            patterns.setdefault(_mask_numbers(name.replace("{}", "0")), []).append((row, pattern))
    return patterns


def _mask_numbers(name: str) -> str:
    return re.sub(r"\d+", "#", name)
