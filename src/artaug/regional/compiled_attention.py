"""Attention that depends on more than its tensors, inside compiled code: one operator, which the compiler does not look into.

What a layer attends to follows from the run, the layer and the call under way. A compiler that traced it would compile every
layer, layout and step anew. So compiled code calls an operator of the three tensors and of two numbers, which are tensors as
well, since those are inputs of a graph and no constants of it: the layer's, and the call's. All layers of one kind then share
one graph, whatever they attend to.
"""

import itertools
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional

from artaug.errors import GuideError
from artaug.regional.denoiser import AttentionFn
from artaug.regional.guided_call import CurrentCall

Autograd: TypeAlias = Any
"""Autograd's ctx, which takes any attribute."""
_LAYERS: "WeakValueDictionary[int, SteeredAttention]" = WeakValueDictionary()
"""The layers of all runs by number, as long as their runs last: an operator is given tensors only."""
_NUMBERS = itertools.count()
_UNCAPTURED = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)
"""A CUDA graph would repeat the attention of the call that it was captured in. Before torch 2.8 the numbers, which are not on
the GPU, keep it from being captured."""


class SteeredAttention:
    """The attention of one layer in one run, for compiled code and all other."""

    def __init__(self, attention_fn: AttentionFn, current: CurrentCall) -> None:
        """Attend with ``attention_fn``, which depends on the ``current`` call."""
        self.attention_fn: AttentionFn = attention_fn
        self.current: CurrentCall = current
        number = next(_NUMBERS)
        self.number: Tensor = torch.tensor(number, device="cpu")
        _LAYERS[number] = self

    # No shapes in annotations: blocks that are compiled trace through this function.
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if not torch.compiler.is_compiling():
            return self.attention_fn(query, key, value, attn_mask)
        if attn_mask is not None:  # the model's own: such a call holds no regions, and depends on its tensors alone
            return functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)
        out: Tensor = _attention(query, key, value, self.number, self.current.number)
        return out


def _layer(number: Tensor) -> SteeredAttention:
    if (layer := _LAYERS.get(int(number))) is None:
        raise GuideError(
            "a guided run has ended, and its compiled model goes on: a backward pass through regional attention belongs "
            "inside the guide's `with` block."
        )
    return layer


@torch.library.custom_op("artaug::regional_attention", mutates_args=(), tags=_UNCAPTURED)
def _attention(query: Tensor, key: Tensor, value: Tensor, layer: Tensor, call: Tensor) -> Tensor:
    attended = _layer(layer)
    with attended.current.back_at(call):
        out = attended.attention_fn(query, key, value, None)
    return _tokens_first(out)


@_attention.register_fake
def _(query: Tensor, _key: Tensor, value: Tensor, *_numbers: Tensor) -> Tensor:
    return _tokens_first(query.new_empty(*query.shape[:3], value.shape[-1]))


def _tokens_first(out: Tensor) -> Tensor:
    """The same, laid out in memory as (batch, tokens, heads, channels), as every model goes on; compiled code relies on it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@torch.library.custom_op("artaug::regional_attention_backward", mutates_args=(), tags=_UNCAPTURED)
def _attention_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, layer: Tensor, call: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    attended = _layer(layer)
    inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    # Within an operator autograd sees nothing, even with gradients enabled. Leaving inference mode brings it back.
    with torch.inference_mode(mode=False), attended.current.back_at(call):
        out = attended.attention_fn(inputs[0], inputs[1], inputs[2], None)
    dquery, dkey, dvalue = (tensor.contiguous() for tensor in torch.autograd.grad(out, inputs, dout))
    return dquery, dkey, dvalue


@_attention_backward.register_fake
def _(_dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *_numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save_inputs(ctx: Autograd, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001 - torch passes it by name
    ctx.save_for_backward(*inputs)


def _backward(ctx: Autograd, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    """Attend once more, with gradients: the operator has no graph, and saves memory for it."""
    return (*_attention_backward(dout, *ctx.saved_tensors), None, None)


_attention.register_autograd(_backward, setup_context=_save_inputs)
