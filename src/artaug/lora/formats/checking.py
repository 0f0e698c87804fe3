"""Proof that a file says what was meant: a second reading of it, by the definition of the formats alone.

It shares with the first reader the tables of names and nothing else. The definition: a layer adds
``alpha / rank * up @ down``, where alpha is the layer's own, else the header's, else the rank; a layer that the original
model fuses holds the updates of its parts as blocks of rows; a convolution's factors are convolutions, one after the
other.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from artaug.errors import LoRAError
from artaug.lora.formats.files import read_tensors
from artaug.lora.formats.key_maps import Format, KeyMatch
from artaug.lora.formats.known_maps import KEY_MAPS
from artaug.lora.formats.low_rank import LowRank, relative_error

DEFINITION = "the format's definition"
"""What the second reading calls itself."""

_FACTOR = re.compile(r"(?P<stem>.+)\.lora[_.](?P<half>A|B|down|up|mid)(\.default)?\.weight")
_DOTTED = ("transformer.", "unet.", "base_model.model.", "diffusion_model.", "")
_FLAT = ("lora_unet_", "lora_transformer_")


@dataclass(frozen=True, kw_only=True, eq=False)
class Verification:
    """What several readers, each by itself, made of one LoRA file: the layers that were meant, to within a tolerance."""

    path: Path
    """The file."""
    format: Format
    """How it spells its layers."""
    readers: tuple[str, ...]
    """Who read it."""
    errors: Mapping[str, float]
    """By layer the largest relative error that a reader found: ``|found - meant| / |meant|`` in Frobenius norms of updates."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "errors", MappingProxyType(dict(self.errors)))

    @property
    def worst(self) -> tuple[str, float]:
        """The layer with the largest error, and that error."""
        return max(self.errors.items(), key=lambda one: one[1])

    def __repr__(self) -> str:
        name, error = self.worst
        return (
            f"Verification({str(self.path)!r}: {self.format} file of {len(self.errors)} layers, largest relative error "
            f"{error:.1e} in {name!r}, read by {', '.join(self.readers)})"
        )

    def _repr_html_(self) -> str:
        name, error = self.worst
        facts = {
            "file": f"{self.path} ({self.format})",
            "layers": len(self.errors),
            "largest relative error": f"{error:.1e} in {name}",
            "read by": ", ".join(self.readers),
        }
        rows = "".join(f"<tr><th>{one}</th><td>{escape(str(told))}</td></tr>" for one, told in facts.items())
        return f"<table>{rows}</table>"


def layer_errors(
    found: Mapping[str, LowRank], wanted: Mapping[str, LowRank], *, path: Path, reader: str, tolerance: float
) -> dict[str, float]:
    """The relative error of every layer, as one reader found them.

    Raises:
        LoRAError: if a layer is missing, if there is one that nobody meant, or if an error is above ``tolerance``.
    """
    if more := [name for name, layer in found.items() if name not in wanted and layer.energy()]:
        raise LoRAError(f"{path}: {reader} finds an update of {more[0]!r}, which the LoRA does not have.")
    if missing := [name for name in wanted if name not in found]:
        raise LoRAError(
            f"{path}: {reader} finds {len(wanted) - len(missing)} of {len(wanted)} layers; missing is {missing[0]!r}."
        )
    errors = {name: relative_error(found[name], layer) for name, layer in wanted.items()}
    name, error = max(errors.items(), key=lambda one: one[1])
    if not error <= tolerance:
        raise LoRAError(
            f"{path}: {reader} finds another update of {name!r} than the LoRA has: relative error {error:.1e}, and "
            f"{tolerance:.0e} is allowed. Rounding to bfloat16 alone makes up to 4e-3; all else is a wrong strength."
        )
    return errors


def read_by_definition(path: Path, wanted: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """What a file holds for the layers ``wanted``, and anything beside them, by the definition of its format.

    Raises:
        LoRAError: if a key of the file is no part of those layers, or one of them is there twice.
    """
    tensors, header = read_tensors(path)
    stems, adapter = _stems(tensors, path), _adapter(header)
    found: dict[str, LowRank] = {}
    used: set[str] = set()
    for name in wanted:
        there = {stem: place for stem, place in _spellings(name) if stem in stems}
        if len(there) > 1:
            raise LoRAError(f"{path} holds {name!r} {len(there)} times: as {' and as '.join(there)}.")
        for stem, place in there.items():
            if stem not in used:
                whole = _strong(name, stems[stem], adapter)
                found |= {name: whole} if place is None else _parts(whole, place)
            used.add(stem)
    if unused := stems.keys() - used:
        raise LoRAError(f"{path} holds {min(unused)!r}, which is no layer of the LoRA.")
    return found


def key_stems(path: Path) -> set[str]:
    """What a file calls its layers, prefix included.

    Raises:
        LoRAError: if it holds a key that is no part of a LoRA.
    """
    return set(_stems(read_tensors(path)[0], path))


def _stems(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """The file's tensors by what stands before their role."""
    stems: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            stems.setdefault(key.removesuffix(".alpha"), {})["alpha"] = tensor
        elif matched := _FACTOR.fullmatch(key):
            half = {"A": "down", "B": "up"}.get(matched["half"], matched["half"])
            stems.setdefault(matched["stem"], {})[half] = tensor
        else:
            raise LoRAError(f"{path} holds {key!r}, which is no part of a LoRA.")
    return stems


def _spellings(name: str) -> Iterator[tuple[str, KeyMatch | None]]:
    """Every way a file may call a layer, and what else is behind that name, if it is an original one."""
    key_stems: list[tuple[str, KeyMatch | None]] = [(name, None)]
    key_stems += [(place.original, place) for key_map in KEY_MAPS for place in key_map.matches(name)]
    for one, place in key_stems:
        yield from ((prefix + one, place) for prefix in _DOTTED)
        yield from ((prefix + one.replace(".", "_"), place) for prefix in _FLAT)


def _adapter(header: Mapping[str, str]) -> dict[str, Any]:
    stated = json.loads(header.get("lora_adapter_metadata", "{}"))
    return {key.removeprefix("transformer.").removeprefix("unet."): one for key, one in stated.items()}


def _strong(name: str, part: Mapping[str, Tensor], adapter: Mapping[str, Any]) -> LowRank:
    """A layer's factors with its strength in the second one."""
    down, up = part["down"], part["up"]
    rank = down.shape[0]
    up = up.squeeze(tuple(range(2, up.ndim)))
    if "mid" in part:  # the three convolutions, one after the other, of an impulse at every input
        columns = down.double().reshape(rank, -1)
        down = (part["mid"].double().movedim(1, -1) @ columns).movedim(-1, 1)
    alpha = adapter.get("lora_alpha", rank)
    for pattern, stated in adapter.get("alpha_pattern", {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            alpha = stated
            break
    if "alpha" in part:
        alpha = float(part["alpha"])
    return LowRank(down, up.double() * (alpha / (rank**0.5 if adapter.get("use_rslora") else rank)))


def _parts(whole: LowRank, place: KeyMatch) -> dict[str, LowRank]:
    """A fused layer cut into its parts by rows."""
    rows = whole.up
    if place.row.swapped:
        first, second = rows.chunk(2)
        rows = rows.new_empty(rows.shape)
        rows[: len(second)], rows[len(second) :] = second, first
    unit, start, found = len(rows) // sum(place.row.split_sizes), 0, {}
    for name, share in zip(place.diffusers, place.row.split_sizes, strict=True):
        found[name] = LowRank(whole.down, rows[start : start + share * unit])
        start += share * unit
    return found
