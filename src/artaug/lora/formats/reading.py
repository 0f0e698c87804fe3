"""From a file's tensors to updates by the denoiser's own module paths, whoever wrote them."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from artaug.errors import LoRAError
from artaug.lora.formats.convolutions import restored
from artaug.lora.formats.files import read_tensors
from artaug.lora.formats.key_maps import Format, KeyMap, KeyMatch
from artaug.lora.formats.known_maps import KEY_MAPS
from artaug.lora.formats.low_rank import LowRank

METADATA = "lora_adapter_metadata"

_PREFIXES = {
    "base_model.model.": Format.PEFT,
    "transformer.": Format.PEFT,
    "unet.": Format.PEFT,
    "lora_unet_": Format.KOHYA,
    "lora_transformer_": Format.ONETRAINER,
    "diffusion_model.": Format.COMFYUI,
    "": Format.DIFFSYNTH,
}
_FLAT = {Format.KOHYA, Format.ONETRAINER}
_ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_A.default.weight": "down",
    ".lora_down.weight": "down",
    ".lora.down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.default.weight": "up",
    ".lora_up.weight": "up",
    ".lora.up.weight": "up",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
}
_OTHERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "text_encoder": "a LoRA of a text encoder",
    "lora_te": "a LoRA of a text encoder",
}


@dataclass(frozen=True, eq=False)
class ParsedLoRA:
    """What a LoRA file turned out to be."""

    format: Format
    layers: Mapping[str, LowRank]
    """By module path of the denoiser, alpha folded in."""


def read(path: Path, *, key_map: KeyMap | None = None) -> ParsedLoRA:
    """Read a file in any known format, or raise; ``key_map`` settles which family it is for where keys do not.

    Raises:
        LoRAError: if the file is missing, is no safetensors file, or holds anything this reader does not know.
    """
    tensors, header = read_tensors(path)
    kind, parts = _parts(tensors, path)
    adapter = _adapter(header, path)
    layers = {name: _folded(name, one, adapter, path) for name, one in parts.items()}
    if kind is Format.PEFT:
        return ParsedLoRA(kind, layers)
    places = _places(layers, kind, key_map, path)
    found: dict[str, LowRank] = {}
    for name, layer in layers.items():
        place, original = places[name]
        split = _split(place, layer, path) if original else {_ours(place, name, kind): layer}
        if twice := found.keys() & split.keys():
            raise LoRAError(f"{path} updates {min(twice)!r} twice, the second time as {name!r}. Which is meant?")
        found |= split
    return ParsedLoRA(kind, found)


def _parts(tensors: Mapping[str, Tensor], path: Path) -> tuple[Format, dict[str, dict[str, Tensor]]]:
    """The tensors by layer, prefix off, with nothing missing and nothing left over."""
    for key, tensor in tensors.items():
        if what := next((what for mark, what in _OTHERS.items() if mark in key), None):
            raise LoRAError(
                f"{path} holds {key!r} of shape {tuple(tensor.shape)}: this is {what}, which artaug cannot read. "
                "Expected a plain LoRA of linear layers and convolutions."
            )
    prefix = next((one for one in _PREFIXES if tensors and all(key.startswith(one) for key in tensors)), "")
    parts: dict[str, dict[str, Tensor]] = {}
    odd = [] if tensors else ["no tensor at all"]
    for key, tensor in tensors.items():
        ending = next((one for one in _ENDINGS if key.endswith(one)), None)
        if ending is None:
            odd.append(key)
            continue
        part = parts.setdefault(key.removeprefix(prefix).removesuffix(ending), {})
        if _ENDINGS[ending] in part:
            raise LoRAError(f"{path} says twice what {key!r} says, under two names. Which is meant?")
        part[_ENDINGS[ending]] = tensor
    halves = {name for name, one in parts.items() if not {"down", "up"} <= one.keys()}
    odd += [key for key in tensors if any(key == f"{prefix}{name}{ending}" for name in halves for ending in _ENDINGS)]
    if odd:
        raise LoRAError(
            f"{path} is not a LoRA artaug can read: it holds {odd[0]!r}. Expected pairs like "
            "'transformer.transformer_blocks.0.attn.to_q.lora_A.weight' and '...lora_B.weight', nothing else."
        )
    return _PREFIXES[prefix], parts


def _adapter(header: Mapping[str, str], path: Path) -> dict[str, Any]:
    """What the file's header says about strength, by PEFT's own names."""
    try:
        adapter = json.loads(header.get(METADATA, "{}"))
    except json.JSONDecodeError as fault:
        raise LoRAError(
            f"{path} has a header {METADATA!r} that is no JSON ({fault}), so its strength is unknown."
        ) from None
    if not isinstance(adapter, dict):
        raise LoRAError(f"{path} has a header {METADATA!r} that is no JSON object, so its strength is unknown.")
    return {key.removeprefix("transformer.").removeprefix("unet."): stated for key, stated in adapter.items()}


def _folded(name: str, part: Mapping[str, Tensor], adapter: Mapping[str, Any], path: Path) -> LowRank:
    """One layer with its strength folded in: its own alpha first, then the file's, then alpha = rank."""
    try:
        layer = restored(part["down"], part["up"], part.get("mid"))
    except LoRAError as fault:
        raise LoRAError(f"{path} is not a LoRA artaug can read: {fault}") from None
    patterns = adapter.get("alpha_pattern", {})
    pattern = next((one for one in patterns if re.fullmatch(rf"(.*\.)?({one})", name)), None)  # PEFT's own rule
    alpha = adapter.get("lora_alpha", layer.rank) if pattern is None else patterns[pattern]
    if "alpha" in part:
        alpha = part["alpha"].item() if part["alpha"].numel() == 1 else math.nan
    if not (isinstance(alpha, int | float) and math.isfinite(alpha) and alpha):
        raise LoRAError(
            f"{path} is not a LoRA artaug can read: the alpha of {name!r} is {alpha!r}, which leaves it no strength. "
            "Expected a finite number other than 0."
        )
    scale = alpha / (layer.rank**0.5 if adapter.get("use_rslora") else layer.rank)
    if math.frexp(scale)[0] in {0.5, -0.5}:  # a power of two: exact in any precision
        return layer if scale == 1 else replace(layer, up=layer.up * scale)
    return replace(layer, up=layer.up.float() * scale)


def _places(
    layers: Mapping[str, LowRank], kind: Format, key_map: KeyMap | None, path: Path
) -> dict[str, tuple[KeyMatch, bool]]:
    """What every name in the file means, by the one family that has them all."""
    meanings: dict[tuple[str, ...], dict[str, tuple[KeyMatch, bool]]] = {}
    fitting, missing = [], ""
    for one in KEY_MAPS if key_map is None else (key_map,):
        read = {name: one.resolve(name, flat=kind in _FLAT) for name in layers}
        known = {name: place for name, place in read.items() if place is not None}
        if len(known) < len(layers):
            missing = missing or next(name for name in layers if name not in known)
        elif key_map is not None or all(_has_aspect(place, layers[name]) for name, place in known.items()):
            fitting.append(one.name)
            meant = [
                place.diffusers if another else (_ours(place, name, kind),) for name, (place, another) in known.items()
            ]
            meanings[tuple(part for parts in meant for part in parts)] = known
    if len(meanings) == 1:
        return next(iter(meanings.values()))
    if meanings:
        raise LoRAError(
            f"{path} could be a LoRA of {' or '.join(fitting)}. Say which: key_map=artaug.lora.formats.FLUX1, say."
        )
    families = ", ".join(one.name for one in (KEY_MAPS if key_map is None else (key_map,)))
    raise LoRAError(
        f"{path} is a {kind} file of a model artaug does not know ({families}): first unknown is "
        f"{missing or next(iter(layers))!r}, or its shape is."
    )


def _has_aspect(place: tuple[KeyMatch, bool], layer: LowRank) -> bool:
    row, original = place[0].row, place[1]
    return not original or row.aspect is None or row.aspect == Fraction(layer.up.shape[0], layer.down.shape[1])


def _ours(place: KeyMatch, name: str, kind: Format) -> str:
    """The one part of a place that a diffusers name means."""
    return next(one for one in place.diffusers if (one.replace(".", "_") if kind in _FLAT else one) == name)


def _split(place: KeyMatch, layer: LowRank, path: Path) -> dict[str, LowRank]:
    """A layer of the original as its parts, each with the columns of ``up`` that reach it, so blocks come apart."""
    height, total = layer.up.shape[0], sum(place.row.split_sizes)
    if height % total or (place.row.swapped and height % 2):
        raise LoRAError(
            f"{path} updates {place.original!r} with {height} outputs, which do not divide into {total} shares."
        )
    up = layer.up.roll(height // 2, 0) if place.row.swapped else layer.up
    pieces = up.split([share * height // total for share in place.row.split_sizes])
    found = {}
    for name, piece in zip(place.diffusers, pieces, strict=True):
        reached = piece.any(0) if len(pieces) > 1 else torch.ones(layer.rank, dtype=torch.bool)
        if reached.any():
            found[name] = LowRank(layer.down[reached], piece[:, reached])
    return found or {
        name: LowRank(layer.down[:1], piece[:, :1]) for name, piece in zip(place.diffusers, pieces, strict=True)
    }
