"""Quantized base models, and the same values as plain weights: an oracle for training on them."""

from hashlib import sha256

import torch
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
        quantize_(
            module, TORCHAO[kind](), filter_fn=lambda layer, name: isinstance(layer, nn.Linear) and "blocks" in name
        )
        return pipeline
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and "blocks" in name:
            module.set_submodule(name, _bitsandbytes(layer, kind.removeprefix("bitsandbytes ")).eval())
    return pipeline


def dequantized(pipeline):
    """The same pipeline with plain weights of the values that the quantized ones stand for."""
    module = pipeline.transformer
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None).eval()
            plain.weight.data = _values(layer.weight).detach().float()
            if layer.bias is not None:
                plain.bias.data = layer.bias.detach().float()
            module.set_submodule(name, plain)
    return pipeline


def stored_digest(module):
    """A digest of the tensors the module is stored in, types included."""
    digest = sha256()
    for name, parameter in module.named_parameters():
        for part in storage_tensors(parameter):
            digest.update(f"{name}{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _bitsandbytes(linear, kind):
    import bitsandbytes  # noqa: PLC0415 - not on every machine with a GPU that tests run on

    size, bias = (linear.in_features, linear.out_features), linear.bias is not None
    if kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(*size, bias=bias, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(*size, bias=bias, quant_type=kind, compute_dtype=torch.float32)
        layer.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type=kind)
    if bias:
        layer.bias = linear.bias
    return layer.to("cpu")


def _values(weight):
    if (state := getattr(weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415 - see above

        return dequantize_4bit(weight, state)
    if (scales := getattr(weight, "SCB", None)) is not None:
        return weight.float() * scales.view(-1, 1) / 127
    return weight.dequantize() if hasattr(weight, "__tensor_flatten__") else weight
