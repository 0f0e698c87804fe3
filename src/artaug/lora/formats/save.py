"""Write a LoRA in a format: from updates by module path to the tensors and the header of a file."""

import json
from collections.abc import Iterable, Mapping
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

from artaug.errors import LoRAError
from artaug.lora.formats.adapter_config import ADAPTER_METADATA
from artaug.lora.formats.key_maps import Format, KeyMap, KeyMatch
from artaug.lora.formats.known_maps import KEY_MAPS
from artaug.lora.formats.low_rank import LowRank, relative_error, to_file_factors

_UNET_PREFIXES = (
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "time_embedding.",
    "add_embedding.",
    "conv_in",
    "conv_out",
)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_CAST_ERROR = 0.01
"""Largest relative error of a layer's update that a cast may cause."""


def to_state_dict(
    layers: Mapping[str, LowRank],
    format: Format | str | None,  # noqa: A002 - the field's word
    *,
    key_map: KeyMap | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a file; without a format, in that of the family's users.

    Raises:
        LoRAError: if there is no such format, if the layers fit no family or several, if the family does not have that
            format, or if ``dtype`` cannot hold the layers.
    """
    if dtype is not None:
        layers = {name: _cast(name, layer, dtype) for name, layer in layers.items()}
    if format is None:
        format, key_map = _default_format(layers, key_map)  # noqa: A001 - the field's word
    if format not in set(Format):
        raise LoRAError(f"there is no format {format!r}: choose one of {', '.join(map(repr, map(str, Format)))}.")
    format = Format(format)  # noqa: A001 - the field's word
    if format is Format.PEFT:
        return _peft(layers, key_map)
    family = _find_key_map(layers, format, key_map)
    key_format = family.key_formats[format]
    named = _fuse_layers(layers, family) if key_format.original_names else layers
    tensors: dict[str, Tensor] = {}
    for name, layer in (_pad_ranks(named) if key_format.uniform_rank else named).items():
        stem = key_format.stem(name)
        tensors[stem + key_format.down], tensors[stem + key_format.up] = map(_detached, to_file_factors(layer))
        if key_format.alpha:  # alpha / rank = 1
            tensors[f"{stem}.alpha"] = torch.tensor(float(layer.rank))
    return tensors, {"format": "pt"}


def _default_format(layers: Mapping[str, LowRank], key_map: KeyMap | None) -> tuple[Format, KeyMap | None]:
    """The format that all families with these layers are read in, and the one of them to name the layers by.

    The U-Nets of Stable Diffusion share most names. sd-scripts trains one by the original names and the others by
    diffusers'; the programs that draw know diffusers' for all of them.
    """
    fitting = [key_map] if key_map is not None else [known for known in KEY_MAPS if all(map(known.match, layers))]
    defaults = {candidate.default_format for candidate in fitting}
    if len(defaults) != 1 or defaults == {Format.PEFT}:
        return Format.PEFT, key_map
    (default,) = defaults
    return default, min(fitting, key=lambda candidate: candidate.key_formats[default].original_names)


def _peft(layers: Mapping[str, LowRank], key_map: KeyMap | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All layers at one rank, and alpha equal to it: alpha / rank is 1 for every reader, also one that ignores alpha."""
    prefix = "unet." if any(name.startswith(_UNET_PREFIXES) for name in layers) else "transformer."
    if key_map is not None:
        _check_format(key_map, Format.PEFT)
        prefix = key_map.key_formats[Format.PEFT].prefix
    tensors: dict[str, Tensor] = {}
    for name, layer in _pad_ranks(layers).items():
        stem = f"{prefix}{name}"
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = map(_detached, to_file_factors(layer))
    rank = max(layer.rank for layer in layers.values())
    adapter = {f"{prefix}r": rank, f"{prefix}lora_alpha": rank, f"{prefix}target_modules": sorted(layers)}
    return tensors, {"format": "pt", ADAPTER_METADATA: json.dumps(adapter)}


def _pad_ranks(layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """All layers with the largest rank of any; the rows and columns added are zero."""
    rank = max(layer.rank for layer in layers.values())
    return {
        name: LowRank(
            torch.cat([layer.down, layer.down.new_zeros(rank - layer.rank, *layer.down.shape[1:])]),
            pad(layer.up, (0, rank - layer.rank)),
        )
        for name, layer in layers.items()
    }


def _cast(name: str, layer: LowRank, dtype: torch.dtype) -> LowRank:
    """A layer in another precision, if that can hold it."""
    if dtype not in _DTYPES:
        raise LoRAError(f"a LoRA file cannot be of {dtype}: not every reader takes it. Choose of {_DTYPES}.")
    down, up = layer.factors_like(layer.down.new_empty(0, dtype=dtype))
    finite = bool(down.isfinite().all() and up.isfinite().all())
    error = relative_error(LowRank(down, up), layer) if finite else 1.0
    if error > _MAX_CAST_ERROR:
        raise LoRAError(
            f"{name!r} would lose {error:.0%} of its update in {dtype}: its factors leave the range of that type. "
            "Save it in torch.bfloat16 or torch.float32."
        )
    return LowRank(down, up)


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()  # layers may share a tensor, and safetensors refuses that


def _find_key_map(layers: Mapping[str, LowRank], format_: Format, key_map: KeyMap | None) -> KeyMap:
    """The one family that has all these layers, if it has the format and the format supports the layers."""
    candidates = KEY_MAPS if key_map is None else (key_map,)
    fitting = [candidate for candidate in candidates if all(candidate.match(name) for name in layers)]
    if not fitting:
        families = ", ".join(candidate.name for candidate in candidates)
        raise LoRAError(
            f"no family artaug has names for ({families}) has all these layers; one of them is {next(iter(layers))!r}."
        )
    if len(fitting) > 1:
        names = ", ".join(candidate.name for candidate in fitting)
        raise LoRAError(
            f"these layers could be those of {names}, which have different names in {format_} files. "
            "Choose one, for example with key_map=artaug.lora.formats.FLUX1."
        )
    (family,) = fitting
    _check_format(family, format_)
    for name in layers:
        match = family.match(name)
        if match is not None and match.row.original in family.key_formats[format_].unsupported:
            raise LoRAError(
                f"a {format_} file cannot carry the update of {name!r}: not every program would read it correctly. "
                "Leave the layer out, or save in PEFT format."
            )
    return family


def _check_format(key_map: KeyMap, format_: Format) -> None:
    if format_ not in key_map.key_formats:
        raise LoRAError(
            f"artaug does not write {format_} files for {key_map.name}: no other reader has verified them. "
            f"Choose of: {', '.join(key_map.key_formats)}."
        )


def _fuse_layers(layers: Mapping[str, LowRank], key_map: KeyMap) -> dict[str, LowRank]:
    """The layers of the original model, by their original names."""
    layers_by_match: dict[KeyMatch, dict[str, LowRank]] = {}
    for name, layer in layers.items():
        match = key_map.match(name)
        if match is not None:
            layers_by_match.setdefault(match, {})[name] = layer
    return {match.original: _fuse(match, group) for match, group in layers_by_match.items()}


def _fuse(match: KeyMatch, layers: Mapping[str, LowRank]) -> LowRank:
    """One layer of the original from the parts of it that were trained; the others get zero rows.

    Its weight is the parts' weights below each other, so its exact update is ``block_diag(up_1, up_2, ...)`` times the
    rows of all ``down``: shapes (sum of outputs, sum of ranks) and (sum of ranks, inputs).
    """
    sizes = dict(zip(match.diffusers, match.row.split_sizes, strict=True))
    units = {layer.up.shape[0] / sizes[name] for name, layer in layers.items()}
    inputs = {layer.down.shape[1:] for layer in layers.values()}
    if len(units) > 1 or len(inputs) > 1 or not (unit := units.pop()).is_integer():
        shapes = {name: layer.shape for name, layer in layers.items()}
        raise LoRAError(f"{shapes} do not fit together in {match.original!r}: they belong to another model.")
    blocks = [layers[name].up if name in layers else torch.zeros(size * int(unit), 0) for name, size in sizes.items()]
    up_dtype = _promoted_dtype(layer.up for layer in layers.values())
    down_dtype = _promoted_dtype(layer.down for layer in layers.values())
    up = torch.block_diag(*(block.to("cpu", up_dtype) for block in blocks))
    down = torch.cat([layers[name].down.to("cpu", down_dtype) for name in sizes if name in layers])
    swapped = match.row.swaps(outputs=up.shape[0], inputs=down.shape[1])
    return LowRank(down, up.roll(up.shape[0] // 2, 0) if swapped else up)


def _promoted_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
