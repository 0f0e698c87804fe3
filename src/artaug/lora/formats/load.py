"""Read a LoRA file in any format: from its tensors to updates by the denoiser's own module paths."""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from artaug._internal.files import load_tensors
from artaug.errors import LoRAError
from artaug.lora.formats.adapter_config import (
    PEFT_CONFIG,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    AdapterConfig,
    check_alpha,
    read_config,
    with_config_beside,
)
from artaug.lora.formats.key_maps import Format, KeyMap, KeyMatch
from artaug.lora.formats.lokr import LOKR_ROLES, is_complete_lokr, lokr_layer, lokr_rank
from artaug.lora.formats.low_rank import FACTOR_DTYPES, LowRank, from_file_factors
from artaug.lora.formats.resolve import FORMATS_BY_PREFIX, find_prefix, resolve_names

_log = logging.getLogger(__name__)

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
    **{f".lokr_{role}": role for role in LOKR_ROLES},
}
_OTHER_ADAPTERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "oft_": "OFT",
    "ia3_": "IA3",
    "modules_to_save": "a whole layer",
}
_TEXT_ENCODERS = re.compile(
    r"((base_model\.model|module|_orig_mod)\.)*"
    r"((lora|lycoris)_(te\d*|text_encoder(_\d)?|text_model)_|text_encoders?(_\d)?\.|text_model\."
    r"|(clip_[lgh]|t5xxl|qwen\w+|cond_stage_model|conditioner|bundle_emb)\.)"
)
"""Beginnings of keys of text encoders, as kohya, LyCORIS, diffusers, PEFT, ComfyUI and OneTrainer write them."""
_ADDITIONS = re.compile(r"(?P<stem>.+)\.(diff|diff_b|w_norm|b_norm|(lora_B(\.default)?|lora_up|lora\.up)\.bias)")
"""Tensors that are added to a weight or a bias. Zeros add nothing; some trainers write them for every layer."""
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_LONGEST_KEY = 500
"""Characters; of the keys of known models none has 150."""
_MAX_LOKR_NUMEL = 1 << 30
"""Most numbers of all factors that the layers of a LoKr file become: 4 GiB."""
_SMALLEST = 2.0**24 * torch.finfo(torch.float32).tiny
"""A factor with no larger element has lost bits of float32 to a tiny alpha."""
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80")


@dataclass(frozen=True, eq=False)
class ParsedLoRA:
    """The content of a LoRA file, and its format."""

    format: Format
    layers: Mapping[str, LowRank]
    """By module path of the denoiser, alpha folded in."""


def load_lora(
    path: Path, *, key_map: KeyMap | None = None, alpha: float | None = None, denoiser_only: bool = False
) -> ParsedLoRA:
    """Read a file in any known format, or the folder of a PEFT adapter.

    Args:
        path: the file or folder.
        key_map: the family, where the keys fit several.
        alpha: of all layers, for a file that does not state it.
        denoiser_only: leave out the layers of text encoders.

    Raises:
        LoRAError: if the file is missing, is no safetensors file, or holds anything this reader does not know.
    """
    tensors, header = read_tensors(path)
    format_, layers = _read_layers(tensors, read_config(header, path), path, alpha=alpha, denoiser_only=denoiser_only)
    updates: dict[str, LowRank] = {}
    for name, resolved in resolve_names(layers, format_, key_map, path).items():
        layer = layers[name]
        parts_of_layer = {resolved: layer} if isinstance(resolved, str) else _split_fused(resolved, layer, path)
        if duplicates := updates.keys() & parts_of_layer.keys():
            raise LoRAError(
                f"{path} updates {min(duplicates)!r} twice, the second time as {name!r}. Remove one of the two."
            )
        updates |= parts_of_layer
    return ParsedLoRA(format_, updates)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file that change something, in types one can compute with, and its header.

    Where the file is one of a PEFT adapter, its config is in the header, too. Factors of 8 bits become
    bfloat16, which is exact. Zeros that would be added to a weight or a bias are left out.

    Raises:
        LoRAError: if the file is missing, cut short, a pickle, or no safetensors file for another reason, or if it holds a
            tensor that is no factor of a LoRA.
    """
    if path.is_dir():
        if not (path / PEFT_WEIGHTS).is_file():
            raise LoRAError(
                f"{path} is not a LoRA file: it is a folder without {PEFT_WEIGHTS}, so no adapter of PEFT either. Expected a "
                "safetensors file."
            )
        path = path / PEFT_WEIGHTS
    if not path.exists():
        raise LoRAError(
            f"there is no file {path}. Expected a safetensors file; one on the Hub is read by artaug.hub.pull."
        )
    try:
        tensors, header = load_tensors(path)
    except OSError as error:
        if _is_pickle(path):
            raise LoRAError(
                f"{path} is a pickle, which can run any code when it is opened, so artaug does not open it. "
                "Convert it to safetensors on a machine where that code can do no harm."
            ) from None
        raise LoRAError(f"{path} is not a LoRA file: {error}. Expected a safetensors file.") from None
    readable = {key: _readable(key, tensor, path) for key, tensor in tensors.items()}
    return _without_zero_additions(readable, path), with_config_beside(path, header, readable)


def _readable(key: str, tensor: Tensor, path: Path) -> Tensor:
    """A tensor in a type one can compute with, and with the same numbers."""
    if len(key) > _LONGEST_KEY:
        raise LoRAError(f"{path} holds {key[:_LONGEST_KEY]!r} and more, which is the name of no layer.")
    if tensor.dtype in _FLOAT8:
        return tensor.bfloat16()
    if tensor.dtype in FACTOR_DTYPES or (tensor.dtype in _INTEGERS and key.endswith(".alpha")):
        return tensor
    raise LoRAError(
        f"{path} is not a LoRA artaug can read: {key!r} is of {tensor.dtype}. Expected floating-point numbers of 8, 16, 32 "
        "or 64 bits."
    )


def _without_zero_additions(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors without those that add zeros to a weight or a bias, and without the alpha of layers of only those."""
    others = {key for key in tensors if _TEXT_ENCODERS.match(key)}  # left out or refused as a whole, later
    additions = {key: match["stem"] for key in tensors.keys() - others if (match := _ADDITIONS.fullmatch(key))}
    for key in additions:
        if tensors[key].any():
            raise LoRAError(
                f"{path} holds {key!r}, which adds to a whole weight or to a bias. A LoRA cannot, so artaug does not read "
                "it. Expected pairs of low-rank factors; zeros there are left out."
            )
    rest = {key: tensor for key, tensor in tensors.items() if key not in additions}
    factored = {key[: -len(suffix)] for key in rest if (suffix := _suffix(key)) not in {None, ".alpha"}}
    lone_alphas = {f"{stem}.alpha" for stem in additions.values() if stem not in factored}
    return {key: tensor for key, tensor in rest.items() if key not in lone_alphas}


def _is_pickle(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4).startswith(_PICKLE_MAGIC)


def _read_layers(
    tensors: Mapping[str, Tensor], config: AdapterConfig | None, path: Path, *, alpha: float | None, denoiser_only: bool
) -> tuple[Format, dict[str, LowRank]]:
    """The layers by their names in the file, with their strength."""
    tensors = _without_text_encoders(tensors, path, denoiser_only=denoiser_only)
    prefix, layers = _group_by_layer(tensors, path)
    states_alpha = config is not None or any("alpha" in parts for parts in layers.values())
    if alpha is not None and states_alpha:
        raise LoRAError(
            f"{path} states its strength, and alpha={alpha} was given, too. Leave it out, and scale the LoRA."
        )
    if prefix == PEFT_PREFIX and alpha is None and not states_alpha:
        raise LoRAError(
            f"{path} is an adapter of PEFT without its {PEFT_CONFIG}, so its strength is unknown. Put that file beside it "
            f"(it has to be called {PEFT_WEIGHTS}), or give lora_alpha: LoRA.load(..., alpha=16)."
        )
    try:
        if config is not None:
            config = config.for_layers(layers)
        numel, read = 0, {}
        for name, parts in layers.items():
            read[name] = layer = _fold_alpha(name, parts, config, alpha)
            if "down" not in parts:
                numel += layer.down.numel() + layer.up.numel()
                _check_lokr_numel(numel)
    except LoRAError as error:
        raise LoRAError(f"{path} is not a LoRA artaug can read: {error}") from None
    return FORMATS_BY_PREFIX[prefix], read


def _check_lokr_numel(numel: int) -> None:
    if numel > _MAX_LOKR_NUMEL:
        raise LoRAError(
            f"it is a LoKr that takes more than {_MAX_LOKR_NUMEL:,} numbers as a LoRA, because its matrices are "
            "whole. Add it to a checkpoint with the program that trained it."
        )


def _without_text_encoders(tensors: Mapping[str, Tensor], path: Path, *, denoiser_only: bool) -> dict[str, Tensor]:
    others = [key for key in tensors if _TEXT_ENCODERS.match(key)]
    if others and not denoiser_only:
        raise LoRAError(
            f"{path} holds {others[0]!r} of a LoRA of a text encoder, {len(others)} tensors in all, and artaug updates only "
            "the denoiser. Leave them out with denoiser_only=True; pictures will differ from those of the whole file."
        )
    if others:
        _log.warning("%s: %d tensors of text encoders are left out; first is %r", path, len(others), others[0])
    return {key: tensor for key, tensor in tensors.items() if not _TEXT_ENCODERS.match(key)}


def _suffix(key: str) -> str | None:
    return next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)


def _group_by_layer(tensors: Mapping[str, Tensor], path: Path) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """The prefix of all keys, and the tensors by layer name without it, then by role; every layer is complete."""
    for key, tensor in tensors.items():
        if adapter := next((name for mark, name in _OTHER_ADAPTERS.items() if mark in key), None):
            raise LoRAError(
                f"{path} holds {key!r} of shape {tuple(tensor.shape)}: this is {adapter}, which artaug cannot read. "
                "Expected a plain LoRA of linear layers and convolutions."
            )
    prefix = find_prefix(tensors)
    layers: dict[str, dict[str, Tensor]] = {}
    unknown = next(_unknown_keys(tensors, prefix, layers, path), None) if tensors else "no tensor at all"
    if unknown is not None:
        raise LoRAError(
            f"{path} is not a LoRA artaug can read: it holds {unknown!r}. Expected pairs like "
            "'transformer.transformer_blocks.0.attn.to_q.lora_A.weight' and '...lora_B.weight', or all factors of a LoKr layer, "
            "nothing else."
        )
    return prefix, layers


def _unknown_keys(
    tensors: Mapping[str, Tensor], prefix: str, layers: dict[str, dict[str, Tensor]], path: Path
) -> Iterator[str]:
    """Fill ``layers``; the keys that are part of no layer, then those of layers that are not complete."""
    key_by_layer: dict[str, str] = {}
    for key, tensor in tensors.items():
        suffix = _suffix(key)
        if suffix is None:
            yield key
            continue
        name, role = key.removeprefix(prefix).removesuffix(suffix), _SUFFIXES[suffix]
        parts = layers.setdefault(name, {})
        if role in parts:
            raise LoRAError(f"{path} holds the tensor of {key!r} twice, under two names. Remove one of the two.")
        parts[role] = tensor
        key_by_layer.setdefault(name, key)
    for name, parts in layers.items():
        roles = parts.keys() - {"alpha"}
        if not (roles in ({"down", "up"}, {"down", "up", "mid"}) or is_complete_lokr(roles)):
            yield key_by_layer[name]


def _fold_alpha(name: str, parts: Mapping[str, Tensor], config: AdapterConfig | None, alpha: float | None) -> LowRank:
    """One layer, its factor ``up`` multiplied by ``alpha / rank``, or by ``alpha / sqrt(rank)`` with rsLoRA.

    Alpha is, in this order: the scalar beside the layer (kohya), that of PEFT's config, what the caller says, the rank.
    """
    is_lokr = "down" not in parts
    layer = lokr_layer(parts) if is_lokr else from_file_factors(parts["down"], parts["up"], parts.get("mid"))
    rank = lokr_rank(parts) if is_lokr else layer.rank
    if "alpha" in parts:
        # of two whole matrices LyCORIS ignores alpha, and some trainers write 1e10
        number = parts["alpha"].item() if parts["alpha"].numel() == 1 else parts["alpha"].tolist()
        scale = 1.0 if rank is None else check_alpha(number, what=f"alpha of {name!r}") / rank
    elif config is not None:
        if is_lokr != (config.peft_type == "LOKR"):
            raise LoRAError(f"its config says {config.peft_type}, and the factors of {name!r} are {sorted(parts)}.")
        scale = config.scale(name, None if is_lokr else rank)
    else:
        scale = 1.0 if alpha is None or rank is None else check_alpha(alpha, what="given alpha") / rank
    scaled = layer.scaled(scale)
    if scaled.up.abs().max() < _SMALLEST and layer.up.any():
        raise LoRAError(f"the strength of {name!r} is {scale:.3g}, which leaves it no strength in float32.")
    return scaled


def _split_fused(match: KeyMatch, layer: LowRank, path: Path) -> dict[str, LowRank]:
    """A layer of the original as diffusers' layers: each takes its rows of ``up``.

    If ``up`` is block-diagonal, as `to_state_dict` writes it, most columns are zero in a part's rows. A part keeps only
    the columns that are not, and the rows of ``down`` that belong to them, so it has the rank that it was trained with.
    """
    outputs, units = layer.up.shape[0], sum(match.row.split_sizes)
    swapped = match.row.swaps(outputs=outputs, inputs=layer.down.shape[1])
    if outputs % units or (swapped and outputs % 2):
        raise LoRAError(
            f"{path} updates {match.original!r} with {outputs} outputs, which are no multiple of {units}, the parts "
            "that it is split into. Is it of another model?"
        )
    up = layer.up.roll(outputs // 2, 0) if swapped else layer.up
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
