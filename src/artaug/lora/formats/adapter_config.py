"""PEFT's config of an adapter: the strength of a file, from ``adapter_config.json`` beside it or from its header."""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from artaug._internal.text import shorten
from artaug.errors import LoRAError
from artaug.lora.formats.patterns import match_patterns

ADAPTER_METADATA = "lora_adapter_metadata"
"""Header entry in which diffusers keeps the LoraConfig of PEFT as JSON."""
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""The two files of a PEFT adapter, always in one folder."""
PEFT_PREFIX = "base_model.model."
"""Of all keys in such a file."""

_COMPONENTS = ("transformer.", "unet.")
_TEXT_ENCODERS = ("text_encoder",)
_ALPHA_NAMES = {"LORA": "lora_alpha", "LOKR": "alpha"}
_MAX_CONFIG_BYTES = 10_000_000
_MAX_RANK = 1_000_000
_NEUTRAL = frozenset(
    {"r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "lora_bias", "fan_in_fan_out"}
    | {"init_lora_weights", "init_weights", "eva_config", "loftq_config", "qalora_group_size", "ensure_weight_tying"}
    | {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    }
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core"}
    | {"lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale"}
    | {"use_effective_conv2d", "decompose_both", "decompose_factor"}
)
"""Settings that change nothing of the update, or that this module or the tensors themselves account for.

``fan_in_fan_out`` is of transformers' Conv1D; of a linear layer PEFT ignores it. Biases are tensors of their own.
"""
_UNCHANGED_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Initializations that leave the weights of the model as they are; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do not."""


@dataclass(frozen=True, eq=False)
class AdapterConfig:
    """What a config says about the strength of each layer."""

    peft_type: str
    """``LORA`` or ``LOKR``."""
    rank: int | None
    """None if not stated."""
    alpha: float | None
    """None if not stated."""
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool

    def for_layers(self, names: Collection[str]) -> "AdapterConfig":
        """The same config with the layers' own names in place of the patterns, as `scale` needs it.

        Raises:
            LoRAError: for a pattern that cannot be matched.
        """
        return replace(
            self,
            rank_pattern=match_patterns(self.rank_pattern, names),
            alpha_pattern=match_patterns(self.alpha_pattern, names),
        )

    def scale(self, name: str, rank: int | None) -> float:
        """``alpha / rank`` of a layer, or ``alpha / sqrt(rank)`` with rsLoRA.

        Args:
            name: the module path.
            rank: of its factors; None for LoKr, whose factors do not show it.

        Raises:
            LoRAError: if the config states another rank, or no alpha.
        """
        stated = self.rank_pattern.get(name, self.rank)
        rank = rank or (None if stated is None else int(stated))
        if rank is None or (stated is not None and stated != rank):
            raise LoRAError(
                f"{name!r} has rank {rank}, and the adapter's config says {stated}, so its strength is unknown."
            )
        alpha = self.alpha_pattern.get(name, self.alpha)
        if alpha is None:
            raise LoRAError(f"the adapter's config states no alpha of {name!r}, so its strength is unknown.")
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def with_config_beside(path: Path, header: Mapping[str, str], keys: Collection[str]) -> dict[str, str]:
    """The header of a file, with PEFT's config as an entry ``adapter_config.json`` if that lies beside the file.

    Raises:
        LoRAError: if the config cannot be read, or the file holds keys that PEFT would not read.
    """
    config = path.with_name(PEFT_CONFIG)
    if path.name != PEFT_WEIGHTS or not config.is_file():
        return dict(header)
    foreign = next((key for key in keys if not key.startswith(PEFT_PREFIX)), None)
    if foreign is not None:
        raise LoRAError(
            f"{path} lies beside {PEFT_CONFIG} and holds {foreign!r}, which PEFT does not read: its keys begin with "
            f"{PEFT_PREFIX!r}. Give the file another name if the config is not its own."
        )
    try:
        if config.stat().st_size > _MAX_CONFIG_BYTES:
            raise LoRAError(f"{config} is larger than {_MAX_CONFIG_BYTES:,} bytes: it is no config of an adapter.")
        text = config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoRAError(f"{config} cannot be read ({error}), so the strength of the adapter is unknown.") from None
    settings = _parse_object(text, f"{config}")
    # what PEFT takes for settings that are left out
    return {**header, PEFT_CONFIG: json.dumps({"r": 8, _alpha_name(settings): 8, **settings})}


def read_config(header: Mapping[str, str], path: Path) -> AdapterConfig | None:
    """The config beside a file, as `with_config_beside` finds it, else that in the file's header; None if it has none.

    Raises:
        LoRAError: if it is broken, or of an adapter that is no LoRA and no LoKr.
    """
    entry = PEFT_CONFIG if PEFT_CONFIG in header else ADAPTER_METADATA
    text = header.get(entry)
    if text is None:
        return None
    everything = _parse_object(text, f"the header {entry!r} of {path}")
    settings = _of_denoiser(everything)
    if not settings:
        if everything:
            raise LoRAError(f"{path} has a header {entry!r} of a text encoder only, so its strength is unknown.")
        return None
    try:
        return _validated(settings)
    except LoRAError as error:
        raise LoRAError(f"{path} is not a LoRA artaug can read: {error}") from None


def _parse_object(text: str, source: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoRAError(f"{source} is no JSON ({error}), so its strength is unknown.") from None
    if not isinstance(settings, dict):
        raise LoRAError(f"{source} is no JSON object, so its strength is unknown.")
    return settings


def _of_denoiser(everything: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the denoiser, without the component in front of their names."""
    for component in _COMPONENTS:
        settings = {
            key.removeprefix(component): value for key, value in everything.items() if key.startswith(component)
        }
        if settings:
            return settings
    return {key: value for key, value in everything.items() if not key.startswith(_TEXT_ENCODERS)}


def _alpha_name(settings: Mapping[str, Any]) -> str:
    peft_type = settings.get("peft_type") or "LORA"
    if not isinstance(peft_type, str) or peft_type not in _ALPHA_NAMES:
        raise LoRAError(
            f"it is a PEFT adapter of type {_quote(peft_type)}, which artaug cannot read. Expected LORA or LOKR."
        )
    return _ALPHA_NAMES[peft_type]


def _validated(settings: Mapping[str, Any]) -> AdapterConfig:
    alpha_name = _alpha_name(settings)
    if settings.get("use_dora"):
        raise LoRAError("it is a DoRA (use_dora), which artaug cannot read. Expected a plain LoRA.")
    if settings.get("modules_to_save"):
        raise LoRAError(
            f"it replaces whole layers (modules_to_save: {_quote(settings['modules_to_save'])}), which no LoRA can. Expected a "
            "plain LoRA."
        )
    unknown = next((name for name, value in settings.items() if value and name not in _NEUTRAL), None)
    if unknown is not None:
        raise LoRAError(
            f"its config sets {_quote(unknown)} to {_quote(settings[unknown])}, which is more than a plain LoRA."
        )
    init = settings.get("init_lora_weights", True)
    if init is not None and init not in _UNCHANGED_BASE:
        raise LoRAError(
            f"it was initialized with {_quote(init)}, which changes the weights of the model, too: its factors alone are not the "
            "update. Convert it with PEFT first (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    rank = settings.get("r")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= _MAX_RANK):
        raise LoRAError(f"its rank r is {_quote(rank)}. Expected a whole number of at least 1, as of a layer.")
    use_rslora = settings.get("use_rslora") or False
    if not isinstance(use_rslora, bool):
        raise LoRAError(f"use_rslora is {_quote(use_rslora)}. Expected true or false.")
    alpha = check_alpha(settings[alpha_name], what=alpha_name) if alpha_name in settings else None
    return AdapterConfig(
        peft_type=settings.get("peft_type") or "LORA",
        rank=rank,
        alpha=alpha,
        rank_pattern=_checked_patterns(settings, "rank_pattern"),
        alpha_pattern=_checked_patterns(settings, "alpha_pattern"),
        use_rslora=use_rslora,
    )


def _checked_patterns(settings: Mapping[str, Any], name: str) -> dict[str, float]:
    patterns = {} if settings.get(name) is None else settings[name]
    if not isinstance(patterns, dict):
        raise LoRAError(f"its {name} is {_quote(patterns)}. Expected numbers by layer name.")
    return {key: check_alpha(value, what=f"{name} of {_quote(key)}") for key, value in patterns.items()}


def check_alpha(alpha: object, *, what: str) -> float:
    """Return an alpha as a float, if it is one that a layer can have.

    Raises:
        LoRAError: if it is no finite number other than 0.
    """
    try:
        number = float(alpha) if isinstance(alpha, int | float) and not isinstance(alpha, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number == 0:
        raise LoRAError(
            f"the {what} is {_quote(alpha)}, which leaves it no strength. Expected a finite number other than 0."
        )
    return number


def _quote(value: object) -> str:
    return shorten(repr(value), 120)
