"""Pipelines whose parts are of several precisions, as SD3.5 is published: tensors are converted where they go from part to part.

Some pipelines of diffusers do that themselves, others take it for granted that all parts are of one precision.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from artaug.diffusion.offload import encoders_of, has_quantized_weights

_PRECISIONS = {torch.float32, torch.float16, torch.bfloat16}


@contextmanager
def mixed_precision(pipeline: Any, denoiser: nn.Module) -> Iterator[None]:  # noqa: ANN401 - any diffusers pipeline
    """Convert, in a ``with`` block, what the denoiser, and the VAE's encoder and decoder, are given to their own precision.

    Nothing is done where all parts are of one precision, or for a part that is quantized, which its library converts for.
    """
    parts: list[Any] = [denoiser, *encoders_of(pipeline)]
    if len({part.dtype for part in parts}) == 1 or any(part.dtype not in _PRECISIONS for part in parts):
        yield
        return
    vae: Any = getattr(pipeline, "vae", None)
    entries = [(denoiser, denoiser), (vae, getattr(vae, "post_quant_conv", None)), (vae, getattr(vae, "decoder", None))]
    entries.append((vae, getattr(vae, "encoder", None)))
    with ExitStack() as hooks:
        part: Any
        for part, entry in entries:
            if isinstance(entry, nn.Module) and not has_quantized_weights(entry):
                hook = entry.register_forward_pre_hook(_Conversion(part.dtype), with_kwargs=True)
                hooks.callback(hook.remove)
        yield


class _Conversion:
    """A hook that converts floating-point inputs of a module."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(self, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:  # noqa: ANN401 - what torch passes
        converted: tuple[Any, Any] = tree_map(self._convert, (args, kwargs))
        return converted

    def _convert(self, value: object) -> object:
        return value.to(self._dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
