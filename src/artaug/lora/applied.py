"""Low-rank updates on the layers of a model, and the proof that the model called those layers.

An update replaces a layer's ``forward`` on the instance, around the one that is there. Compiled code looks a replaced
``forward`` up, so an update acts whether it was put on before or after the first compiled call; a hook put on after it
would never run. Two updates of one shape share one compilation.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from artaug._internal.modules import NamedModule, named_modules
from artaug.errors import LoRAError
from artaug.lora.formats.low_rank import LowRank
from artaug.lora.layers import low_rank_forward, weight_shape

_FUSED_PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""By the name of the layer that ``fuse_qkv_projections`` of diffusers makes, those that it stands for."""


@dataclass(eq=False)
class AppliedUpdate:
    """An update on one layer, as ``forward.update`` of the layer says."""

    down: Tensor
    """(rank, inputs, ...), in the type and on the device of the layer's inputs as far as they are known."""
    up: Tensor
    called: bool = False
    """Whether the layer has been called since."""


@contextmanager
def update_applied(
    layer: nn.Module,
    update: LowRank,
    *,
    dtype: torch.dtype | None,
    output_weights: Callable[[Tensor], Tensor | None] | None,
) -> Iterator[None]:
    """Add an update to the output of a layer inside the ``with`` block.

    Args:
        layer: a layer of the update's shape.
        update: what is added, at its full strength.
        dtype: that the layer computes in if its own parameters do not say. Inputs of another type are met as they come.
        output_weights: returns the weight of the update for an output, or None to skip it.
    """
    forward, replaced = layer.forward, vars(layer).get("forward")
    # In advance, since a change in the second step would be compiled again. Weights on the meta device are offloaded.
    device = getattr(getattr(layer, "weight", None), "device", torch.device("meta"))
    known = torch.empty(
        0,
        device=update.down.device if device.type == "meta" else device,
        dtype=compute_dtype(layer) or dtype or update.down.dtype,
    )
    applied = AppliedUpdate(*update.factors_like(known))

    # No shapes in annotations: blocks that are compiled trace through this function.
    def updated_forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the layer's own
        applied.called = True
        output = forward(*args, **kwargs)
        weights = None if output_weights is None else output_weights(output)
        if output_weights is not None and weights is None:
            return output
        inputs = args[0] if args else next(iter(kwargs.values()))
        if applied.down.device != inputs.device or applied.down.dtype != inputs.dtype:
            applied.down, applied.up = update.factors_like(inputs)
        change = low_rank_forward(layer, inputs, applied.down, applied.up)
        return output + (change if weights is None else weights.to(change) * change)

    updated_forward.update = applied  # type: ignore[attr-defined]
    layer.forward = updated_forward
    try:
        yield
    finally:
        del layer.forward
        if replaced is not None:
            layer.forward = replaced


def compute_dtype(module: nn.Module) -> torch.dtype | None:
    """The type that a module computes in: that of its first parameter that is stored plainly, None without one."""
    dtypes = (parameter.dtype for parameter in module.parameters() if type(parameter) is nn.Parameter)
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), None)


def check_called(module: nn.Module) -> None:
    """Refuse to go on if a layer under an update has not been called since the update was applied.

    It is called after the first step of a drawing and of a training.

    Raises:
        LoRAError: naming such layers.
    """
    if all(update.called for submodule in module.modules() if (update := _update_of(submodule)) is not None):
        return  # names, which take longer, are for the error only
    updates = {
        name.removesuffix(".base_layer"): update  # as PEFT names a layer that is being trained
        for name, item in named_modules(module).items()
        if (update := _update_of(item.module)) is not None
    }
    uncalled = [name for name, update in updates.items() if not update.called]
    raise LoRAError(
        f"{len(uncalled)} of {len(updates)} layers with a LoRA were not called in the first step (first: "
        f"{uncalled[0]!r}), so the LoRA has no effect there. Something computes in place of these layers: an attention "
        "processor of another library, fused projections, or code that was exported or compiled ahead of time. Use "
        f"the {type(module).__name__} without it."
    )


def _update_of(module: nn.Module) -> AppliedUpdate | None:
    return getattr(vars(module).get("forward"), "update", None)


def fused_layers(modules: Mapping[str, NamedModule]) -> dict[str, str]:
    """Layers that ``fuse_qkv_projections`` of diffusers put out of use, with the layers that stand for them."""
    return {
        f"{name}.{original}": f"{name}.{fused}"
        for name, fused, in_use in _fused_projections(modules)
        if in_use
        for original in _FUSED_PROJECTIONS[fused]
    }


def unused_layers(modules: Mapping[str, NamedModule]) -> set[str]:
    """Layers that ``fuse_qkv_projections`` made and that were left over when it was undone, as in U-Nets and SD3."""
    return {f"{name}.{fused}" for name, fused, in_use in _fused_projections(modules) if not in_use}


def _fused_projections(modules: Mapping[str, NamedModule]) -> Iterator[tuple[str, str, bool]]:
    """Attention layers with fused projections: their names, those of the projections, and whether these are in use."""
    for name, item in modules.items():
        attention: Any = item.module
        if getattr(attention, "fused_projections", False):
            # Attention of diffusers' newer kind looks at this flag and can be unfused. The older kind keeps flag and
            # layers for good, and its processor decides.
            processor = type(getattr(attention, "processor", None)).__name__
            in_use = hasattr(attention, "unfuse_projections") or processor.startswith("Fused")
            yield from ((name, fused, in_use) for fused in _FUSED_PROJECTIONS if hasattr(attention, fused))


def updatable_shapes(modules: Mapping[str, NamedModule]) -> dict[str, tuple[int, ...]]:
    """The shapes of the layers that a LoRA can update, by name without wrappers."""
    return {name: shape for name, item in modules.items() if (shape := weight_shape(item.module)) is not None}
