"""Pipelines without weights: parts as their configs say, on the meta device, where a tensor is a shape and a type."""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, pipelines
from diffusers.hooks import apply_layerwise_casting
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from artaug.diffusion.families.base import Family
from artaug.diffusion.families.flux.family import Flux
from artaug.diffusion.families.flux2.family import Flux2Family
from artaug.diffusion.families.qwen_image.family import QwenImage
from artaug.diffusion.families.registry import family_at
from artaug.diffusion.families.sd3.family import StableDiffusion3
from artaug.diffusion.families.unet.sd15 import StableDiffusion
from artaug.diffusion.families.unet.sdxl import StableDiffusionXL
from artaug.diffusion.families.z_image.family import ZImage
from artaug.errors import ModelError
from artaug.training.quantized import is_quantized, storage_tensors

_CLIP_READS = 77


@dataclass(frozen=True)
class Reader:
    """What a dry run asks of a tokenizer: no vocabulary is read."""

    model_max_length: int


def weightless(source: str | os.PathLike[str] | DiffusionPipeline, *, dtype: torch.dtype) -> DiffusionPipeline:
    """A pipeline that can be called and weighs nothing: its models are on the meta device.

    Args:
        source: a folder or a name on the Hub, of which only configs are read, or a loaded pipeline, which stays as it is.
        dtype: of the weights.

    Raises:
        ModelError: if there is no pipeline, one artaug does not know, or a part whose config cannot be read.
    """
    if isinstance(source, DiffusionPipeline):
        settings = dict(source.config)
        parts = {name: _twin(part, dtype) for name, part in source.components.items()}
        return type(source)(**{**_options(settings, parts), **parts})
    kind: Any = family_at(source).pipeline_class
    index = kind.load_config(source)
    told = {name: one for name, one in index.items() if isinstance(one, list | tuple) and len(one) == 2}
    parts = {name: _part(source, name, *one, dtype=dtype) for name, one in told.items()}
    pipeline: DiffusionPipeline = kind(**{**_options(index, parts), **parts})
    return pipeline


def modules(pipeline: DiffusionPipeline) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a pipeline that have weights."""
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            yield name, part


def stored_bytes(module: nn.Module) -> int:
    """What a module's parameters and buffers take as they are stored: quantized ones as codes and scales."""
    parts = (part for one in (*module.parameters(), *module.buffers()) for part in storage_tensors(one))
    return sum(part.numel() * part.element_size() for part in parts)


def text_shapes(family: Family) -> Mapping[str, tuple[int, ...]]:
    """Shapes of what a prompt of the longest length becomes, one row of it.

    Raises:
        ModelError: for a family of somebody else's.
    """
    for kind, shapes in _TEXT.items():
        if isinstance(family, kind):
            return shapes(family, family.pipeline)
    known = ", ".join(kind.__name__ for kind in _TEXT)
    raise ModelError(
        f"what a {type(family).__name__} gives its denoiser is not known before prompts are encoded, so its training "
        f"cannot be estimated. Known are: {known}."
    )


def _options(index: Mapping[str, Any], parts: Mapping[str, object]) -> dict[str, Any]:
    """The settings in a pipeline's index that are no parts: whether it is distilled, and the like."""
    return {name: one for name, one in index.items() if not name.startswith("_") and name not in parts}


def _twin(part: Any, dtype: torch.dtype) -> object:  # noqa: ANN401 - whatever a pipeline is made of
    """The same part without its weights; tokenizers and schedulers have none.

    Raises:
        ModelError: for a part with weights of which no twin can be made.
    """
    part = getattr(part, "_orig_mod", part)  # as torch.compile wraps it
    if isinstance(part, ModelMixin):
        config = {name: one for name, one in part.config.items() if name != "quantization_config"}
        if present := part.__dict__.get("peft_config"):
            raise ModelError(
                f"{type(part).__name__} carries PEFT adapters ({', '.join(present)}), which training refuses: unload them."
            )
        twin = _made(type(part), config, dtype)
        _unpack_alike(part, twin, dtype)
        return twin
    if isinstance(part, PreTrainedModel):
        return _made(type(part), part.config, dtype)
    if isinstance(part, nn.Module):
        raise ModelError(
            f"a {type(part).__name__} is no model of diffusers or transformers, so artaug cannot make one without weights "
            "from its config. Estimate by the folder or the name on the Hub that the pipeline is from."
        )
    return part


def _unpack_alike(part: nn.Module, twin: nn.Module, dtype: torch.dtype) -> None:
    """Have a twin's layers store fewer bytes and unpack them in every call, where those of ``part`` do.

    Diffusers' layerwise casting does, and so do layers of torchao: what they unpack is theirs as long as autograd wants
    it. What stays packed until the backward pass is over (bitsandbytes, quanto) is not seen here.
    """
    for name, one in part.named_modules():
        hook: Any = getattr(getattr(one, "_diffusers_hook", None), "hooks", {}).get("layerwise_casting")
        weight = getattr(one, "weight", None)
        stored = None if hook is None else hook.storage_dtype
        if is_quantized(weight) and type(weight).__module__.startswith("torchao."):
            stored = torch.float8_e4m3fn  # a byte, and one torch can cast
        if stored is not None:
            apply_layerwise_casting(twin.get_submodule(name), stored, dtype, skip_modules_pattern=None)


def _part(
    source: str | os.PathLike[str], name: str, library: str | None, class_name: str | None, *, dtype: torch.dtype
) -> object:
    """One part of the pipeline at ``source``, from its own config."""
    if library is None or class_name is None:
        return None
    home = getattr(pipelines, library) if hasattr(pipelines, library) else importlib.import_module(library)
    kind: Any = getattr(home, class_name, None)
    try:
        if _is(kind, ModelMixin):
            return _made(kind, kind.load_config(source, subfolder=name), dtype)
        if _is(kind, SchedulerMixin):
            return kind.from_pretrained(source, subfolder=name)
        if _is(kind, PreTrainedModel):
            return _made(kind, kind.config_class.from_pretrained(source, subfolder=name), dtype)
        longest = get_tokenizer_config(source, subfolder=name).get("model_max_length", _CLIP_READS)
        return Reader(int(longest))
    except (OSError, ValueError) as fault:
        raise ModelError(f"the config of {name!r} of {str(source)!r} cannot be read: {fault}") from fault


def _is(kind: object, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)


def _made(kind: Any, config: Any, dtype: torch.dtype) -> nn.Module:  # noqa: ANN401 - diffusers' or transformers'
    """A model from its config, on the meta device and ready to predict."""
    with torch.device("meta"):
        module: nn.Module = kind.from_config(config) if issubclass(kind, ModelMixin) else kind(config)
    # The plain method: those of diffusers and transformers warn of what only matters to weights.
    return nn.Module.to(module, dtype=dtype).eval().requires_grad_(requires_grad=False)


def _flux(family: Family, pipeline: Any) -> Mapping[str, tuple[int, ...]]:  # noqa: ANN401 - parts differ
    config = pipeline.transformer.config
    return {
        "prompt_embeds": (family.max_sequence_length, config.joint_attention_dim),
        "pooled_prompt_embeds": (config.pooled_projection_dim,),
    }


def _flux2(family: Family, pipeline: Any) -> Mapping[str, tuple[int, ...]]:  # noqa: ANN401 - likewise
    return {"prompt_embeds": (family.max_sequence_length, pipeline.transformer.config.joint_attention_dim)}


def _sd3(family: Family, pipeline: Any) -> Mapping[str, tuple[int, ...]]:  # noqa: ANN401 - likewise
    config, longest = pipeline.transformer.config, family.max_sequence_length
    return {
        "prompt_embeds": (pipeline.tokenizer_max_length + longest, config.joint_attention_dim),
        "pooled_prompt_embeds": (config.pooled_projection_dim,),
    }


def _masked(family: Family, width: int) -> Mapping[str, tuple[int, ...]]:
    longest = family.max_sequence_length
    return {"prompt_embeds": (longest, width), "prompt_embeds_mask": (longest,)}


def _clip(_family: Family, pipeline: Any) -> Mapping[str, tuple[int, ...]]:  # noqa: ANN401 - likewise
    return {"prompt_embeds": (pipeline.tokenizer.model_max_length, pipeline.unet.config.cross_attention_dim)}


def _two_clips(family: Family, pipeline: Any) -> Mapping[str, tuple[int, ...]]:  # noqa: ANN401 - likewise
    pooled: int = pipeline.text_encoder_2.config.projection_dim
    return {**_clip(family, pipeline), "pooled_prompt_embeds": (pooled,)}


_TEXT: Mapping[Any, Callable[[Family, Any], Mapping[str, tuple[int, ...]]]] = {
    Flux: _flux,
    Flux2Family: _flux2,
    QwenImage: lambda family, pipeline: _masked(family, pipeline.transformer.config.joint_attention_dim),
    StableDiffusion: _clip,
    StableDiffusion3: _sd3,
    StableDiffusionXL: _two_clips,
    ZImage: lambda family, pipeline: _masked(family, pipeline.transformer.config.cap_feat_dim),
}
"""What each family's `Family.encode_prompts` gives, by the shape of a row."""
