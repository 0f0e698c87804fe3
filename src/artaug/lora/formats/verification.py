"""Verification of a LoRA file by a second reader, which knows only the definition of the formats.

It shares with the first reader (``load.py``) the tables of names, the opening of the file and of PEFT's config, and nothing
else. The definition: a layer adds ``alpha / rank * up @ down``, where alpha is the layer's own, else the config's, else the
rank. A layer that the original model fuses holds the updates of its parts as blocks of rows. The factors of a convolution
are two convolutions in sequence.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from artaug.errors import LoRAError
from artaug.lora.formats.adapter_config import PEFT_CONFIG, AdapterConfig, read_config
from artaug.lora.formats.key_maps import Format, KeyMap, KeyMatch
from artaug.lora.formats.known_maps import KEY_MAPS
from artaug.lora.formats.load import read_tensors
from artaug.lora.formats.low_rank import LowRank, relative_error
from artaug.lora.formats.programs import Program

DEFINITION = "the format's definition"
"""The name of the second reader in `Verification.readers`."""

_FACTOR = re.compile(r"(?P<stem>.+)\.lora[_.](?P<role>A|B|down|up|mid)(\.default)?\.weight")
_DOTTED_PREFIXES = ("transformer.", "unet.", "base_model.model.", "diffusion_model.", "")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")


@dataclass(frozen=True, kw_only=True, eq=False)
class Verification:
    """The result of reading one LoRA file with several independent readers: all found the expected layers within a tolerance."""

    path: Path
    """The file."""
    format: Format
    """The convention of its keys."""
    readers: tuple[str, ...]
    """Names of the readers that ran: artaug's two, and the pipeline of diffusers if that can read the file."""
    errors: Mapping[str, float]
    """By layer the largest relative error of any reader: ``|actual - expected| / |expected|`` in Frobenius norms of updates."""
    whole: tuple[str, ...] = ()
    """Programs that read the whole file, by their published rules."""
    partial: Mapping[str, str] = field(default_factory=dict)
    """By program that knows the model and does not read the whole file: what it makes of it."""

    @property
    def worst(self) -> tuple[str, float]:
        """The layer with the largest error, and that error."""
        return max(self.errors.items(), key=lambda item: item[1])

    def __repr__(self) -> str:
        name, error = self.worst
        return (
            f"Verification({str(self.path)!r}: {self.format} file of {len(self.errors)} layers, largest relative error "
            f"{error:.1e} in {name!r}, read by {', '.join(self.readers)}{'; ' if self._programs else ''}{self._programs})"
        )

    @property
    def _programs(self) -> str:
        """Which programs will read the file whole, in one sentence."""
        whole = [f"whole in {', '.join(self.whole)}"] if self.whole else []
        return "; ".join([*whole, *(f"{program} {reading}" for program, reading in self.partial.items())])

    def _repr_html_(self) -> str:
        name, error = self.worst
        facts = {
            "file": f"{self.path} ({self.format})",
            "layers": len(self.errors),
            "largest relative error": f"{error:.1e} in {name}",
            "read by": ", ".join(self.readers),
            **({"programs": self._programs} if self._programs else {}),
        }
        rows = "".join(f"<tr><th>{label}</th><td>{escape(str(fact))}</td></tr>" for label, fact in facts.items())
        return f"<table>{rows}</table>"


def layer_errors(
    actual: Mapping[str, LowRank], expected: Mapping[str, LowRank], *, path: Path, reader: str, tolerance: float
) -> dict[str, float]:
    """The relative error of every layer that a reader found.

    Raises:
        LoRAError: if a layer is missing, if there is one too many and it is not zero, or if an error is above
            ``tolerance``. An update of zero may be missing.
    """
    if extra := [name for name, layer in actual.items() if name not in expected and layer.energy()]:
        raise LoRAError(f"{path}: {reader} finds an update of {extra[0]!r}, which the LoRA does not have.")
    # of a layer that the original fuses, a part that is zero leaves no trace
    if missing := [name for name, layer in expected.items() if name not in actual and layer.energy()]:
        raise LoRAError(
            f"{path}: {reader} finds {len(expected) - len(missing)} of {len(expected)} layers; missing is {missing[0]!r}."
        )
    errors = {name: relative_error(actual[name], layer) if name in actual else 0.0 for name, layer in expected.items()}
    name, error = max(errors.items(), key=lambda item: item[1])
    if not error <= tolerance:
        raise LoRAError(
            f"{path}: {reader} finds another update of {name!r} than the LoRA has: relative error {error:.1e}, and "
            f"{tolerance:.0e} is allowed. Rounding to bfloat16 alone makes up to 4e-3; more is a wrong strength."
        )
    return errors


def read_by_definition(
    path: Path, expected: Mapping[str, LowRank], *, key_map: KeyMap | None = None
) -> dict[str, LowRank]:
    """The updates that a file holds for the layers ``expected``, by the definition of its format.

    The other parts of a fused layer are returned, too. ``key_map`` adds names of layers to the built-in ones.

    Raises:
        LoRAError: if a key of the file belongs to none of those layers, or a layer is there twice.
    """
    tensors, header = read_tensors(path)
    layers, config = _group_by_stem(tensors, path), _config_of(expected, header, path)
    updates: dict[str, LowRank] = {}
    used: set[str] = set()
    key_maps = KEY_MAPS if key_map is None else (*KEY_MAPS, key_map)
    for name in expected:
        present = {stem: match for stem, match in _possible_stems(name, key_maps) if stem in layers}
        if len(present) > 1:
            raise LoRAError(f"{path} holds {name!r} {len(present)} times: as {' and as '.join(present)}.")
        for stem, match in present.items():
            if stem not in used:
                layer = _scaled_layer(name, layers[stem], config)
                updates |= {name: layer} if match is None else _cut_rows(layer, match)
            used.add(stem)
    if unused := layers.keys() - used:
        raise LoRAError(f"{path} holds {min(unused)!r}, which is no layer of the LoRA.")
    return updates


def reading_by(
    program: Program, path: Path, expected: Mapping[str, LowRank], *, key_map: KeyMap, tolerance: float
) -> str:
    """What a program does with a file of a family, by its rules; nothing, if it reads the whole file rightly.

    Raises:
        LoRAError: if the file holds a key that is no part of a LoRA.
    """
    tensors, header = read_tensors(path)
    header.pop(PEFT_CONFIG, None)  # only PEFT reads the file beside
    layers, config = _group_by_stem(tensors, path), _config_of(expected, header if program.reads_header else {}, path)
    matches = {name: match for name in expected if (match := key_map.match(name)) is not None}
    found = program.find(matches, tensors.keys(), key_map)
    if not found:
        return f"drops all {len(expected)} layers"
    if missing := [name for name in expected if name not in found]:
        return f"drops {len(missing)} of {len(expected)} layers, {missing[0]!r} first"
    strengths = [float(parts["alpha"]) / len(parts["down"]) for parts in layers.values() if "alpha" in parts]
    for name, (stem, style) in found.items():
        parts = dict(layers[stem])
        if style.one_strength and strengths:
            parts["alpha"] = torch.tensor(strengths[0] * len(parts["down"]))
        layer = _scaled_layer(name, parts, config)
        if style.names.is_original:
            layer = _cut_rows(layer, matches[name])[name]
        if not relative_error(layer, expected[name]) <= tolerance:
            return f"reads another update of {name!r}"
    return ""


def _config_of(names: Collection[str], header: Mapping[str, str], path: Path) -> AdapterConfig | None:
    config = read_config(header, path)
    return None if config is None else config.for_layers(names)


def _group_by_stem(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """The file's tensors by stem, then by role: down, up, mid, alpha."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            layers.setdefault(key.removesuffix(".alpha"), {})["alpha"] = tensor
        elif matched := _FACTOR.fullmatch(key):
            role = {"A": "down", "B": "up"}.get(matched["role"], matched["role"])
            layers.setdefault(matched["stem"], {})[role] = tensor
        elif ".lokr_" in key:
            raise LoRAError(
                f"{path} holds {key!r}: it is a LoKr, which no second reader here rebuilds. Verify what LoRA.load makes of it: "
                "LoRA.load(path).save(...)."
            )
        else:
            raise LoRAError(f"{path} holds {key!r}, which is no part of a LoRA.")
    return layers


def _possible_stems(name: str, key_maps: Sequence[KeyMap]) -> Iterator[tuple[str, KeyMatch | None]]:
    """Every key that a file may use for a layer, with the row of the key map if it is an original name."""
    names: list[tuple[str, KeyMatch | None]] = [(name, None)]
    names += [(match.original, match) for key_map in key_maps for match in key_map.matches(name)]
    for key, match in names:
        yield from ((prefix + key, match) for prefix in _DOTTED_PREFIXES)
        yield from ((prefix + key.replace(".", "_"), match) for prefix in _FLAT_PREFIXES)


def _scaled_layer(name: str, factors: Mapping[str, Tensor], config: AdapterConfig | None) -> LowRank:
    """A layer in float64, with ``alpha / rank`` in its factor ``up``."""
    down, up = factors["down"], factors["up"]
    rank = down.shape[0]
    up = up.squeeze(tuple(range(2, up.ndim)))
    if "mid" in factors:
        # down is 1 x 1, mid has the kernel: mid[r, s, k] down[s, i] summed over s gives a kernel of shape (r, i, k)
        inputs = down.double().reshape(rank, -1)
        down = (factors["mid"].double().movedim(1, -1) @ inputs).movedim(-1, 1)
    alpha: float = rank
    if config is not None:
        alpha = config.alpha_pattern.get(name) or config.alpha or rank
    if "alpha" in factors:
        alpha = float(factors["alpha"])
    return LowRank(down, up.double() * (alpha / (rank**0.5 if config is not None and config.use_rslora else rank)))


def _cut_rows(layer: LowRank, match: KeyMatch) -> dict[str, LowRank]:
    """The parts of a fused layer, by rows."""
    rows = layer.up
    if match.row.swaps(outputs=len(rows), inputs=layer.down.shape[1]):
        first, second = rows.chunk(2)
        rows = rows.new_empty(rows.shape)
        rows[: len(second)], rows[len(second) :] = second, first
    unit, start, parts = len(rows) // sum(match.row.split_sizes), 0, {}
    for name, size in zip(match.diffusers, match.row.split_sizes, strict=True):
        parts[name] = LowRank(layer.down, rows[start : start + size * unit])
        start += size * unit
    return parts
