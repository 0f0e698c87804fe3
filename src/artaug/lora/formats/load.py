"""Read a LoRA file in any format: from its tensors to updates by the denoiser's own module paths."""

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

from artaug._internal.files import load_tensors
from artaug.errors import LoRAError
from artaug.lora.formats.key_maps import Format, KeyMap, KeyMatch
from artaug.lora.formats.known_maps import KEY_MAPS
from artaug.lora.formats.low_rank import LowRank, from_file_factors

ADAPTER_METADATA = "lora_adapter_metadata"
"""Header entry in which diffusers keeps the LoraConfig of PEFT as JSON."""

_PREFIXES = {
    "base_model.model.": Format.PEFT,
    "transformer.": Format.PEFT,
    "unet.": Format.PEFT,
    "lora_unet_": Format.KOHYA,
    "lora_transformer_": Format.ONETRAINER,
    "diffusion_model.": Format.COMFYUI,
    "": Format.DIFFSYNTH,
}
_FLAT_FORMATS = {Format.KOHYA, Format.ONETRAINER}
_SUFFIXES = {
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
_OTHER_ADAPTERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "text_encoder": "a LoRA of a text encoder",
    "lora_te": "a LoRA of a text encoder",
}


_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80")


@dataclass(frozen=True, eq=False)
class ParsedLoRA:
    """The content of a LoRA file, and its format."""

    format: Format
    layers: Mapping[str, LowRank]
    """By module path of the denoiser, alpha folded in."""


@dataclass(frozen=True)
class _ResolvedKey:
    """The row of the key map that a layer of a file belongs to."""

    match: KeyMatch
    original: bool
    """The file uses the original name or an alias of it, so that the layer may be several of diffusers' layers."""


def load_lora(path: Path, *, key_map: KeyMap | None = None) -> ParsedLoRA:
    """Read a file in any known format; ``key_map`` states the family where the keys fit several.

    Raises:
        LoRAError: if the file is missing, is no safetensors file, or holds anything this reader does not know.
    """
    tensors, header = read_tensors(path)
    format_, factors = _group_by_layer(tensors, path)
    adapter = _adapter_config(header, path)
    layers = {name: _fold_alpha(name, parts, adapter, path) for name, parts in factors.items()}
    if format_ is Format.PEFT:
        return ParsedLoRA(format_, layers)
    resolved = _resolve_names(layers, format_, key_map, path)
    updates: dict[str, LowRank] = {}
    for name, layer in layers.items():
        match = resolved[name].match
        if resolved[name].original:
            parts_of_layer = _split_fused(match, layer, path)
        else:
            parts_of_layer = {_diffusers_name(match, name, format_): layer}
        if duplicates := updates.keys() & parts_of_layer.keys():
            raise LoRAError(
                f"{path} updates {min(duplicates)!r} twice, the second time as {name!r}. Remove one of the two."
            )
        updates |= parts_of_layer
    return ParsedLoRA(format_, updates)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, and its header.

    Raises:
        LoRAError: if the file is missing, cut short, a pickle, or no safetensors file for another reason.
    """
    try:
        return load_tensors(path)
    except OSError as error:
        if _is_pickle(path):
            raise LoRAError(
                f"{path} is a pickle, which can run any code when it is opened, so artaug does not open it. "
                "Convert it to safetensors on a machine where that code can do no harm."
            ) from None
        raise LoRAError(f"{path} is not a LoRA file: {error}. Expected a safetensors file.") from None


def _is_pickle(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4).startswith(_PICKLE_MAGIC)


def _group_by_layer(tensors: Mapping[str, Tensor], path: Path) -> tuple[Format, dict[str, dict[str, Tensor]]]:
    """The tensors by layer name without prefix, then by role; every key must belong to a complete layer."""
    for key, tensor in tensors.items():
        if adapter := next((name for mark, name in _OTHER_ADAPTERS.items() if mark in key), None):
            raise LoRAError(
                f"{path} holds {key!r} of shape {tuple(tensor.shape)}: this is {adapter}, which artaug cannot read. "
                "Expected a plain LoRA of linear layers and convolutions."
            )
    prefix = next((prefix for prefix in _PREFIXES if tensors and all(key.startswith(prefix) for key in tensors)), "")
    layers: dict[str, dict[str, Tensor]] = {}
    unknown = [] if tensors else ["no tensor at all"]
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
        if suffix is None:
            unknown.append(key)
            continue
        parts = layers.setdefault(key.removeprefix(prefix).removesuffix(suffix), {})
        if _SUFFIXES[suffix] in parts:
            raise LoRAError(f"{path} holds the tensor of {key!r} twice, under two names. Remove one of the two.")
        parts[_SUFFIXES[suffix]] = tensor
    incomplete = {name for name, parts in layers.items() if not {"down", "up"} <= parts.keys()}
    incomplete_keys = {f"{prefix}{name}{suffix}" for name in incomplete for suffix in _SUFFIXES}
    unknown += [key for key in tensors if key in incomplete_keys]
    if unknown:
        raise LoRAError(
            f"{path} is not a LoRA artaug can read: it holds {unknown[0]!r}. Expected pairs like "
            "'transformer.transformer_blocks.0.attn.to_q.lora_A.weight' and '...lora_B.weight', nothing else."
        )
    return _PREFIXES[prefix], layers


def _adapter_config(header: Mapping[str, str], path: Path) -> dict[str, Any]:
    """PEFT's LoraConfig from the file's header, without the component in front of its keys."""
    try:
        adapter = json.loads(header.get(ADAPTER_METADATA, "{}"))
    except json.JSONDecodeError as error:
        raise LoRAError(
            f"{path} has a header {ADAPTER_METADATA!r} that is no JSON ({error}), so its strength is unknown."
        ) from None
    if not isinstance(adapter, dict):
        raise LoRAError(f"{path} has a header {ADAPTER_METADATA!r} that is no JSON object, so its strength is unknown.")
    return {key.removeprefix("transformer.").removeprefix("unet."): value for key, value in adapter.items()}


def _fold_alpha(name: str, parts: Mapping[str, Tensor], adapter: Mapping[str, Any], path: Path) -> LowRank:
    """One layer, its factor ``up`` multiplied by ``alpha / rank``, or by ``alpha / sqrt(rank)`` with rsLoRA.

    Alpha is, in this order: the scalar beside the layer (kohya), the first matching ``alpha_pattern`` or ``lora_alpha``
    of the header (PEFT), the rank. PEFT itself takes alpha = 8 without a header, diffusers alpha = rank.
    """
    try:
        layer = from_file_factors(parts["down"], parts["up"], parts.get("mid"))
    except LoRAError as error:
        raise LoRAError(f"{path} is not a LoRA artaug can read: {error}") from None
    patterns = adapter.get("alpha_pattern", {})
    # PEFT matches a pattern against the end of a module path, from a dot on
    pattern = next((pattern for pattern in patterns if re.fullmatch(rf"(.*\.)?({pattern})", name)), None)
    alpha = adapter.get("lora_alpha", layer.rank) if pattern is None else patterns[pattern]
    if "alpha" in parts:
        alpha = parts["alpha"].item() if parts["alpha"].numel() == 1 else math.nan
    if not (isinstance(alpha, int | float) and math.isfinite(alpha) and alpha):
        raise LoRAError(
            f"{path} is not a LoRA artaug can read: the alpha of {name!r} is {alpha!r}, which leaves it no strength. "
            "Expected a finite number other than 0."
        )
    scale = alpha / (layer.rank**0.5 if adapter.get("use_rslora") else layer.rank)
    if math.frexp(scale)[0] in {0.5, -0.5}:  # a power of two: the product is exact in any precision
        return layer if scale == 1 else replace(layer, up=layer.up * scale)
    return replace(layer, up=layer.up.float() * scale)


def _resolve_names(
    layers: Mapping[str, LowRank], format_: Format, key_map: KeyMap | None, path: Path
) -> dict[str, _ResolvedKey]:
    """The rows of all names in a file, from the one family that has them all.

    Families that give the names the same meaning are not ambiguous.
    """
    candidates = KEY_MAPS if key_map is None else (key_map,)
    readings: dict[tuple[str, ...], dict[str, _ResolvedKey]] = {}
    fitting, missing = [], ""
    for candidate in candidates:
        rows = {name: candidate.resolve(name, flat=format_ in _FLAT_FORMATS) for name in layers}
        resolved = {name: _ResolvedKey(*row) for name, row in rows.items() if row is not None}
        if len(resolved) < len(layers):
            missing = missing or next(name for name in layers if name not in resolved)
        elif key_map is not None or all(_fits_aspect(row, layers[name]) for name, row in resolved.items()):
            fitting.append(candidate.name)
            readings[_meaning(resolved, format_)] = resolved
    if len(readings) == 1:
        return next(iter(readings.values()))
    if readings:
        raise LoRAError(
            f"{path} could be a LoRA of {' or '.join(fitting)}. "
            "Choose one, for example with key_map=artaug.lora.formats.FLUX1."
        )
    families = ", ".join(candidate.name for candidate in candidates)
    raise LoRAError(
        f"{path} is a {format_} file of a model artaug does not know ({families}): first unknown is "
        f"{missing or next(iter(layers))!r}, or its shape is."
    )


def _meaning(resolved: Mapping[str, _ResolvedKey], format_: Format) -> tuple[str, ...]:
    """The module paths of diffusers that the names of a file stand for."""
    paths: list[str] = []
    for name, row in resolved.items():
        paths += row.match.diffusers if row.original else (_diffusers_name(row.match, name, format_),)
    return tuple(paths)


def _fits_aspect(resolved: _ResolvedKey, layer: LowRank) -> bool:
    aspect = resolved.match.row.aspect
    return not resolved.original or aspect is None or aspect == Fraction(layer.up.shape[0], layer.down.shape[1])


def _diffusers_name(match: KeyMatch, name: str, format_: Format) -> str:
    """The module path that a name of diffusers with dots or underscores stands for."""
    flat = format_ in _FLAT_FORMATS
    return next(path for path in match.diffusers if (path.replace(".", "_") if flat else path) == name)


def _split_fused(match: KeyMatch, layer: LowRank, path: Path) -> dict[str, LowRank]:
    """A layer of the original as diffusers' layers: each takes its rows of ``up``.

    If ``up`` is block-diagonal, as `to_state_dict` writes it, most columns are zero in a part's rows. A part keeps only
    the columns that are not, and the rows of ``down`` that belong to them, so it has the rank that it was trained with.
    """
    outputs, units = layer.up.shape[0], sum(match.row.split_sizes)
    if outputs % units or (match.row.swapped and outputs % 2):
        raise LoRAError(
            f"{path} updates {match.original!r} with {outputs} outputs, which are no multiple of {units}, the parts "
            "that it is split into. Is it of another model?"
        )
    up = layer.up.roll(outputs // 2, 0) if match.row.swapped else layer.up
    blocks = up.split([size * outputs // units for size in match.row.split_sizes])
    parts = {}
    for name, block in zip(match.diffusers, blocks, strict=True):
        used = block.any(0) if len(blocks) > 1 else torch.ones(layer.rank, dtype=torch.bool)
        if used.any():
            parts[name] = LowRank(layer.down[used], block[:, used])
    if parts:
        return parts
    # an update of zero still names its layers
    return {name: LowRank(layer.down[:1], block[:, :1]) for name, block in zip(match.diffusers, blocks, strict=True)}
