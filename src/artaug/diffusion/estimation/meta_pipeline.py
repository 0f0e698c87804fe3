"""Pipelines without weights: their models are on torch's meta device, where a tensor has a shape and a type only."""

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, pipelines
from diffusers.hooks import apply_layerwise_casting
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import BatchEncoding, PreTrainedModel
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from artaug._internal.modules import is_quantized, named_modules, unwrap
from artaug._internal.weights import model_errors
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.registry import family_at
from artaug.errors import ModelError
from artaug.training.quantized import storage_tensors

_CLIP_LENGTH = 77
_LONGEST = 4096
"""Tokens of a prompt where a tokenizer's config sets no limit (or 1e30, as transformers writes it)."""


@dataclass(frozen=True)
class TokenizerStub:
    """A tokenizer without a vocabulary: every prompt has as many tokens as fit, all of them number 0."""

    model_max_length: int

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **_options: object,
    ) -> BatchEncoding:
        """``max_length`` tokens, else as many as the tokenizer takes, at most 4096."""
        length = min(self.model_max_length, _LONGEST) if max_length is None else max_length
        batch = 1 if isinstance(text, str) else len(text)
        input_ids = torch.zeros(batch, length, dtype=torch.long)
        tensors = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if return_tensors is not None:
            return BatchEncoding(tensors)
        lists = {name: tensor.tolist() for name, tensor in tensors.items()}
        return BatchEncoding({name: rows[0] for name, rows in lists.items()} if isinstance(text, str) else lists)

    def tokenize(self, _text: str) -> list[str]:
        """No words: diffusers looks for those of textual inversions among them."""
        return []

    def num_special_tokens_to_add(self) -> int:
        """None are added."""
        return 0

    def decode(self, _tokens: Sequence[int] | Tensor) -> str:
        """Tokens without a vocabulary mean nothing."""
        return ""

    def batch_decode(self, tokens: Sequence[Sequence[int]] | Tensor) -> list[str]:
        """As `decode`, for several prompts."""
        return [""] * len(tokens)


def meta_pipeline(
    source: str | os.PathLike[str] | DiffusionPipeline,
    *,
    dtype: torch.dtype,
    family: type[Family] | None = None,
) -> DiffusionPipeline:
    """Build a pipeline whose models are on the meta device: it can be called and takes no memory.

    Args:
        source: a folder or a name on the Hub, of which only configs are read, or a loaded pipeline, which stays as it is.
        dtype: of the weights.
        family: of the pipeline; None to recognise it.

    Raises:
        ModelError: if there is no pipeline, one artaug does not know, or a part whose config cannot be read.
    """
    if isinstance(source, DiffusionPipeline):
        components = {name: _meta_twin(component, dtype) for name, component in source.components.items()}
        return type(source)(**{**_options(source.config, components), **components})
    pipeline_class: Any = (family or family_at(source)).pipeline_class
    index = pipeline_class.load_config(source)
    # A component's entry is [library, class]; all other entries are options of the pipeline.
    classes = {name: entry for name, entry in index.items() if isinstance(entry, list | tuple) and len(entry) == 2}
    components = {name: _component(source, name, *entry, dtype=dtype) for name, entry in classes.items()}
    pipeline: DiffusionPipeline = pipeline_class(**{**_options(index, components), **components})
    return pipeline


def modules(pipeline: DiffusionPipeline) -> Iterator[tuple[str, nn.Module]]:
    """The components of a pipeline that have weights."""
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            yield name, component


def stored_bytes(module: nn.Module) -> int:
    """What a module's parameters and buffers take as they are stored: quantized ones as codes and scales."""
    tensors = (tensor for stored in (*module.parameters(), *module.buffers()) for tensor in storage_tensors(stored))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def text_shapes(family: Family) -> Mapping[str, tuple[int, ...]]:
    """`Family.text_shapes`, of a family whose pipeline is on the meta device.

    Raises:
        ModelError: if the family's encoders do not work there.
    """
    try:
        with _TrueOnMeta():
            return family.text_shapes()
    except (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"the shapes of what {type(family).__name__}.encode_prompts returns could not be found without weights "
            f"({type(error).__name__}: {error}). Give the family a method text_shapes() that returns them."
        ) from error


class _TrueOnMeta(TorchFunctionMode):
    """Answers questions about values, which the meta device does not have, with yes: does a mask keep every token?"""

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401 - any function of torch
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever it returns
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


def _options(index: Mapping[str, Any], components: Mapping[str, object]) -> dict[str, Any]:
    """The entries of a pipeline's index that are no components: whether it is distilled, and the like."""
    return {name: entry for name, entry in index.items() if not name.startswith("_") and name not in components}


def _meta_twin(component: Any, dtype: torch.dtype) -> object:  # noqa: ANN401 - whatever a pipeline is made of
    """The same component without its weights; tokenizers and schedulers have none.

    Raises:
        ModelError: for a component with weights of which no twin can be made.
    """
    if isinstance(component, nn.Module):
        component = unwrap(component)
    if isinstance(component, ModelMixin):
        config = {name: entry for name, entry in component.config.items() if name != "quantization_config"}
        if adapters := component.__dict__.get("peft_config"):
            raise ModelError(
                f"{type(component).__name__} carries PEFT adapters ({', '.join(adapters)}), which training refuses: unload "
                "them."
            )
        twin = _on_meta(type(component), config, dtype)
        _copy_weight_casting(component, twin, dtype)
        return twin
    if isinstance(component, PreTrainedModel):
        return _on_meta(type(component), component.config, dtype)
    if isinstance(component, nn.Module):
        raise ModelError(
            f"a {type(component).__name__} is no model of diffusers or transformers, so artaug cannot make one without "
            "weights from its config. Estimate by the folder or the name on the Hub that the pipeline is from."
        )
    return component


def _copy_weight_casting(module: nn.Module, twin: nn.Module, dtype: torch.dtype) -> None:
    """Let a twin's layers store fewer bytes and unpack them in every call, where those of ``module`` do.

    Diffusers' layerwise casting does, and so do layers of torchao: autograd keeps what they unpack. Weights that stay
    packed until the backward pass is over (bitsandbytes, quanto) are not covered here.
    """
    for name, item in named_modules(module).items():
        layer = item.module
        hook: Any = getattr(getattr(layer, "_diffusers_hook", None), "hooks", {}).get("layerwise_casting")
        weight = getattr(layer, "weight", None)
        storage_dtype = None if hook is None else hook.storage_dtype
        if is_quantized(weight) and type(weight).__module__.startswith("torchao."):
            storage_dtype = torch.float8_e4m3fn  # one byte, and a type that torch can cast
        if storage_dtype is not None:
            apply_layerwise_casting(twin.get_submodule(name), storage_dtype, dtype, skip_modules_pattern=None)


_LIBRARIES = ("diffusers", "transformers")
"""Those that a pipeline's index may name beside parts of diffusers' own pipelines."""


def _component(
    source: str | os.PathLike[str], name: str, library: str | None, class_name: str | None, *, dtype: torch.dtype
) -> object:
    """One component of the pipeline at ``source``, from its own config."""
    if library is None or class_name is None:
        return None
    if not hasattr(pipelines, library) and library not in _LIBRARIES:  # an import runs code, and the index may name any
        raise ModelError(f"{name!r} of {str(source)!r} is of the library {library!r}. Expected one of {_LIBRARIES}.")
    with model_errors(f"the config of {name!r} of {str(source)!r} cannot be read"):
        package = getattr(pipelines, library) if hasattr(pipelines, library) else importlib.import_module(library)
        component_class: Any = getattr(package, class_name, None)
        if _is_subclass(component_class, ModelMixin):
            return _on_meta(component_class, component_class.load_config(source, subfolder=name), dtype)
        if _is_subclass(component_class, SchedulerMixin):
            return component_class.from_pretrained(source, subfolder=name)
        if _is_subclass(component_class, PreTrainedModel):
            config = component_class.config_class.from_pretrained(source, subfolder=name)
            return _on_meta(component_class, config, dtype)
        max_length = get_tokenizer_config(source, subfolder=name).get("model_max_length", _CLIP_LENGTH)
        return TokenizerStub(int(max_length))


def _is_subclass(component_class: object, base: type) -> bool:
    return isinstance(component_class, type) and issubclass(component_class, base)


def _on_meta(model_class: Any, config: Any, dtype: torch.dtype) -> nn.Module:  # noqa: ANN401 - of diffusers, transformers
    """A model from its config, on the meta device and ready to predict."""
    with torch.device("meta"):
        module: nn.Module = (
            model_class.from_config(config) if issubclass(model_class, ModelMixin) else model_class(config)
        )
    # The plain method: those of diffusers and transformers warn of what only matters to weights.
    return nn.Module.to(module, dtype=dtype).eval().requires_grad_(requires_grad=False)
