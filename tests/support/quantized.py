"""Quantized bases of a pipeline, and the same numbers as plain weights: an oracle for what learns on them."""

from hashlib import sha256

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

from artaug.training.quantized import storage_tensors

TORCHAO = {
    "torchao int8": Int8WeightOnlyConfig,
    "torchao float8": Float8WeightOnlyConfig,
    "torchao int8 activations": Int8DynamicActivationInt8WeightConfig,
}
BITSANDBYTES = ("nf4", "fp4", "int8")


def fp8_stored(pipeline, *, compute=torch.float32):
    """Weights in fp8 that diffusers' hooks cast for every call."""
    pipeline.transformer.to(compute).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
    return pipeline


def quantized(pipeline, kind):
    """The pipeline with the linear layers of its blocks quantized, as a library's loader leaves them."""
    module = pipeline.transformer
    if kind == "fp8 stored":
        return fp8_stored(pipeline)
    if kind in TORCHAO:
        quantize_(module, TORCHAO[kind](), filter_fn=lambda one, name: isinstance(one, nn.Linear) and "blocks" in name)
        return pipeline
    for name, one in list(module.named_modules()):
        if isinstance(one, nn.Linear) and "blocks" in name:
            module.set_submodule(name, _bitsandbytes(one, kind.removeprefix("bitsandbytes ")).eval())
    return pipeline


def dequantized(pipeline):
    """The same pipeline with plain weights of the values that the quantized ones stand for."""
    module = pipeline.transformer
    for name, one in list(module.named_modules()):
        if isinstance(one, nn.Linear):
            plain = nn.Linear(one.in_features, one.out_features, bias=one.bias is not None).eval()
            plain.weight.data = _numbers(one.weight).detach().float()
            if one.bias is not None:
                plain.bias.data = one.bias.detach().float()
            module.set_submodule(name, plain)
    return pipeline


def stored_digest(module):
    """What the module is stored as, types included."""
    told = sha256()
    for name, one in module.named_parameters():
        for part in storage_tensors(one):
            told.update(f"{name}{part.dtype}{tuple(part.shape)}".encode())
            told.update(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return told.hexdigest()


def _bitsandbytes(linear, kind):
    size, bias = (linear.in_features, linear.out_features), linear.bias is not None
    if kind == "int8":
        made = bitsandbytes.nn.Linear8bitLt(*size, bias=bias, has_fp16_weights=False)
        made.weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        made = bitsandbytes.nn.Linear4bit(*size, bias=bias, quant_type=kind, compute_dtype=torch.float32)
        made.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type=kind)
    if bias:
        made.bias = linear.bias
    return made.to("cpu")


def _numbers(weight):
    if (state := getattr(weight, "quant_state", None)) is not None:
        return dequantize_4bit(weight, state)
    if (scales := getattr(weight, "SCB", None)) is not None:
        return weight.float() * scales.view(-1, 1) / 127
    return weight.dequantize() if hasattr(weight, "__tensor_flatten__") else weight
