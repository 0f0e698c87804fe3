"""From updates by module path to the tensors and the header of a file, in the format asked for."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from artaug.errors import LoRAError
from artaug.lora.formats.convolutions import stored
from artaug.lora.formats.key_maps import Format, KeyFormat, KeyMap, KeyMatch
from artaug.lora.formats.known_maps import KEY_MAPS
from artaug.lora.formats.low_rank import LowRank, relative_error
from artaug.lora.formats.reading import METADATA

_UNET = ("down_blocks.", "mid_block.", "up_blocks.", "time_embedding.", "add_embedding.", "conv_in", "conv_out")
_PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
_LOSS = 0.01


def to_state_dict(
    layers: Mapping[str, LowRank],
    kind: Format | str,
    *,
    key_map: KeyMap | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a file.

    Raises:
        LoRAError: if there is no such format, the family cannot be told from the layers or does not have that format, or
            ``dtype`` cannot hold the layers.
    """
    if dtype is not None:
        layers = {name: _rounded(name, layer, dtype) for name, layer in layers.items()}
    if kind not in set(Format):
        raise LoRAError(f"there is no format {kind!r}: choose one of {', '.join(map(repr, map(str, Format)))}.")
    kind = Format(kind)
    if kind is Format.PEFT:
        return _peft(layers, key_map)
    found = _written(layers, kind, key_map)
    key_format = found.key_formats[kind]
    tensors: dict[str, Tensor] = {}
    named = _fused(layers, found) if key_format.original_names else layers
    for name, layer in (_padded(named) if key_format.uniform_rank else named).items():
        base = key_format.stem(name)
        tensors[base + key_format.down], tensors[base + key_format.up] = map(_kept, stored(layer))
        if key_format.alpha:
            tensors[f"{base}.alpha"] = torch.tensor(float(layer.rank))
    return tensors, {"format": "pt"}


def _peft(layers: Mapping[str, LowRank], key_map: KeyMap | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """One rank for all, zeros behind the smaller ones, and alpha equal to it: no reader can get the strength wrong."""
    prefix = "unet." if any(name.startswith(_UNET) for name in layers) else "transformer."
    if key_map is not None:
        prefix = key_map.key_formats[Format.PEFT].prefix
    tensors: dict[str, Tensor] = {}
    for name, layer in _padded(layers).items():
        base = f"{prefix}{name}"
        tensors[f"{base}.lora_A.weight"], tensors[f"{base}.lora_B.weight"] = map(_kept, stored(layer))
    rank = max(layer.rank for layer in layers.values())
    adapter = {f"{prefix}r": rank, f"{prefix}lora_alpha": rank, f"{prefix}target_modules": sorted(layers)}
    return tensors, {"format": "pt", METADATA: json.dumps(adapter)}


def _padded(layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """All layers with the largest rank of any, zeros behind the smaller ones."""
    rank = max(layer.rank for layer in layers.values())
    return {
        name: LowRank(
            torch.cat([layer.down, layer.down.new_zeros(rank - layer.rank, *layer.down.shape[1:])]),
            pad(layer.up, (0, rank - layer.rank)),
        )
        for name, layer in layers.items()
    }


def _rounded(name: str, layer: LowRank, dtype: torch.dtype) -> LowRank:
    """A layer in another precision, if that keeps it."""
    if dtype not in _PRECISIONS:
        raise LoRAError(f"a LoRA file cannot be of {dtype}: not every reader takes it. Choose of {_PRECISIONS}.")
    down, up = layer.down.to(dtype), layer.up.to(dtype)
    finite = bool(down.isfinite().all() and up.isfinite().all())
    lost = relative_error(LowRank(down, up), layer) if finite else 1.0
    if lost > _LOSS:
        raise LoRAError(
            f"{name!r} would lose {lost:.0%} of its update in {dtype}, whose range its factors leave. "
            "Save it in torch.bfloat16 or torch.float32."
        )
    return LowRank(down, up)


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()  # layers may share a tensor, and safetensors refuses that


def _written(layers: Mapping[str, LowRank], kind: Format, key_map: KeyMap | None) -> KeyMap:
    """The one family that has all these layers, in a format it has."""
    fitting = [one for one in KEY_MAPS if all(one.match(name) for name in layers)]
    if key_map is not None:
        fitting = [key_map] if all(key_map.match(name) for name in layers) else []
    if not fitting:
        families = ", ".join(one.name for one in ((key_map,) if key_map else KEY_MAPS))
        raise LoRAError(f"no family artaug has names for ({families}) has all these layers, as {next(iter(layers))!r}.")
    if len(fitting) > 1:
        names = ", ".join(one.name for one in fitting)
        raise LoRAError(
            f"these layers could be those of {names}, which {kind} files call differently. "
            "Say which: key_map=artaug.lora.formats.FLUX1, say."
        )
    (found,) = fitting
    if kind not in found.key_formats:
        raise LoRAError(
            f"artaug does not write {kind} files for {found.name}: no other reader was there to prove them right. "
            f"Choose of: {', '.join(found.key_formats)}."
        )
    _refuse_unread(layers, found, found.key_formats[kind], kind)
    return found


def _refuse_unread(layers: Mapping[str, LowRank], key_map: KeyMap, key_format: KeyFormat, kind: Format) -> None:
    for name in layers:
        place = key_map.match(name)
        if place is not None and place.row.original in key_format.unsupported:
            raise LoRAError(
                f"a {kind} file cannot carry the update of {name!r}: diffusers would not read it right. "
                "Leave the layer out, or save in PEFT format."
            )


def _fused(layers: Mapping[str, LowRank], key_map: KeyMap) -> dict[str, LowRank]:
    """The layers of the original: parts put side by side as blocks, with zeros for the parts that were not trained."""
    parts: dict[KeyMatch, dict[str, LowRank]] = {}
    for name, layer in layers.items():
        place = key_map.match(name)
        if place is not None:
            parts.setdefault(place, {})[name] = layer
    return {place.original: _joined(place, given) for place, given in parts.items()}


def _joined(place: KeyMatch, given: Mapping[str, LowRank]) -> LowRank:
    split_sizes = dict(zip(place.diffusers, place.row.split_sizes, strict=True))
    units = {layer.up.shape[0] / split_sizes[name] for name, layer in given.items()}
    inputs = {layer.down.shape[1:] for layer in given.values()}
    if len(units) > 1 or len(inputs) > 1 or not (unit := units.pop()).is_integer():
        shapes = {name: layer.shape for name, layer in given.items()}
        raise LoRAError(f"{shapes} do not fit together in {place.original!r}: they belong to another model.")
    blocks = [
        given[name].up if name in given else torch.zeros(share * int(unit), 0) for name, share in split_sizes.items()
    ]
    wide = _widest([layer.up for layer in given.values()])
    up = torch.block_diag(*(block.to("cpu", wide) for block in blocks))
    down_kind = _widest([layer.down for layer in given.values()])
    down = torch.cat([given[name].down.to("cpu", down_kind) for name in split_sizes if name in given])
    return LowRank(down, up.roll(up.shape[0] // 2, 0) if place.row.swapped else up)


def _widest(tensors: list[Tensor]) -> torch.dtype:
    kind = tensors[0].dtype
    for tensor in tensors[1:]:
        kind = torch.promote_types(kind, tensor.dtype)
    return kind
