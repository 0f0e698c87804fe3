"""Which layers the names in a LoRA file stand for: prefixes and wrappers off, then the key maps decide."""

import functools
import re
from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

from artaug._internal.modules import WRAPPED_NAMES
from artaug.errors import LoRAError
from artaug.lora.formats.adapter_config import PEFT_PREFIX
from artaug.lora.formats.key_maps import Format, KeyMap, KeyMatch
from artaug.lora.formats.known_maps import KEY_MAPS
from artaug.lora.formats.low_rank import LowRank

Resolved: TypeAlias = str | KeyMatch
"""The denoiser's module path, or a layer by its original name, which may be several of the denoiser's."""

FORMATS_BY_PREFIX = {
    PEFT_PREFIX: Format.PEFT,
    "transformer.": Format.PEFT,
    "unet.": Format.PEFT,
    "lora_unet_": Format.KOHYA,
    "lora_transformer_": Format.ONETRAINER,
    "lycoris_": Format.ONETRAINER,
    "diffusion_model.": Format.COMFYUI,
    "": Format.DIFFSYNTH,
}
"""The first that all keys of a file begin with is its format."""
_FLAT_FORMATS = {Format.KOHYA, Format.ONETRAINER}
# What programs leave in front of each other's names. Public reports: Comfy-Org/ComfyUI#4347, invoke-ai/InvokeAI#8986.
_NESTED_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "module.",
)
_NESTED_FLAT_PREFIXES = ("base_model_model_", "model_diffusion_model_", "diffusion_model_", "module_")
# What torch.compile, FSDP and activation checkpointing put into the names of what they wrap (kohya-ss/sd-scripts#1024).
_WRAPPERS = "|".join(sorted(WRAPPED_NAMES))


def find_prefix(keys: Collection[str]) -> str:
    """The prefix in `FORMATS_BY_PREFIX` of all keys of a file."""
    return next((prefix for prefix in FORMATS_BY_PREFIX if keys and all(key.startswith(prefix) for key in keys)), "")


def resolve_names(
    layers: Mapping[str, LowRank], format_: Format, key_map: KeyMap | None, path: Path
) -> dict[str, Resolved]:
    """What every name in a file stands for, by the one family that has them all.

    The names are tried as they are, and then without what wrappers and other programs put into them. Families that give
    them the same meaning are not ambiguous. In PEFT files an unknown model's names are its module paths.

    Raises:
        LoRAError: if no family has all names, or several have and mean different layers.
    """
    candidates = KEY_MAPS if key_map is None else (key_map,)
    bare = {name: _unwrap(name, flat=format_ in _FLAT_FORMATS) for name in layers}
    for names in ({name: name for name in layers}, bare):
        if format_ is Format.PEFT and any(all(map(candidate.match, names.values())) for candidate in candidates):
            return dict(names)
        readings = _readings(layers, names, format_, candidates, check_aspect=key_map is None)
        if len(readings) == 1:
            (_, resolved) = readings.popitem()[1]
            return resolved
        if readings:
            raise LoRAError(
                f"{path} could be a LoRA of {' or '.join(family for family, _ in readings.values())}. "
                "Choose one, for example with key_map=artaug.lora.formats.FLUX1."
            )
    foreign = next((name for name in layers if bare[name] != name or _is_original(name, candidates)), None)
    if format_ is Format.PEFT and key_map is None and foreign is None:
        return {name: name for name in layers}
    families = ", ".join(candidate.name for candidate in candidates)
    unknown = foreign or next(
        (
            name
            for name in layers
            if not any(candidate.resolve(bare[name], flat=format_ in _FLAT_FORMATS) for candidate in candidates)
        ),
        next(iter(layers)),
    )
    raise LoRAError(
        f"{path} is a {format_} file of a model artaug does not know ({families}): first unknown is {unknown!r}, or its "
        "shape is. Load it with the key map of its model, key_map=..., or save it again from the model without wrappers."
    )


def _readings(
    layers: Mapping[str, LowRank],
    names: Mapping[str, str],
    format_: Format,
    candidates: Iterable[KeyMap],
    *,
    check_aspect: bool,
) -> dict[tuple[str, ...], tuple[str, dict[str, Resolved]]]:
    """The families that have all names, each with what it makes of them, by the module paths that they stand for."""
    resolve = functools.partial(_resolve, flat=format_ in _FLAT_FORMATS)
    readings: dict[tuple[str, ...], tuple[str, dict[str, Resolved]]] = {}
    for candidate in candidates:
        resolved: dict[str, Resolved] = {}
        for name, layer in layers.items():
            found = resolve(candidate, names[name])
            if found is None or (check_aspect and not _fits_aspect(found, layer)):
                break
            resolved[name] = found
        else:
            meaning = tuple(
                path
                for found in resolved.values()
                for path in ((found,) if isinstance(found, str) else found.diffusers)
            )
            readings.setdefault(meaning, (candidate.name, resolved))
    return readings


def _resolve(key_map: KeyMap, name: str, *, flat: bool) -> Resolved | None:
    row = key_map.resolve(name, flat=flat)
    if row is None:
        return None
    match, original = row
    if original:
        return match
    return next(path for path in match.diffusers if (path.replace(".", "_") if flat else path) == name)


def _fits_aspect(found: Resolved, layer: LowRank) -> bool:
    aspect = None if isinstance(found, str) else found.row.aspect
    return aspect is None or aspect == Fraction(layer.up.shape[0], layer.down.shape[1])


def _is_original(name: str, candidates: Iterable[KeyMap]) -> bool:
    """Whether this is an original name and nothing else; short ones, such as ``img_in``, may be any model's."""
    return name.count(".") > 1 and any(
        isinstance(_resolve(candidate, name, flat=False), KeyMatch) and not candidate.match(name)
        for candidate in candidates
    )


def _unwrap(name: str, *, flat: bool) -> str:
    """A name without wrappers and nested prefixes.

    >>> _unwrap("base_model.model._orig_mod.transformer_blocks.0._orig_mod.attn.to_q", flat=False)
    'transformer_blocks.0.attn.to_q'
    >>> _unwrap("_orig_mod_down_blocks_0__orig_mod_conv1", flat=True)
    'down_blocks_0_conv1'
    """
    separator = "_" if flat else "."
    mark = re.escape(separator)
    prefixes = _NESTED_FLAT_PREFIXES if flat else _NESTED_PREFIXES
    name = re.sub(rf"(^|{mark})({_WRAPPERS})(?={mark}|$)", "", name).lstrip(separator)
    while prefix := next((prefix for prefix in prefixes if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name
