"""ImageReward in plain torch, with its authors' weight names: a ViT, a BERT with cross-attention to it, five layers."""

import math

import torch
from torch.nn.functional import gelu, layer_norm, softmax

VISION_DIM, TEXT_DIM, HEAD_DIM = 128, 64, 64
"""1024, 768 and 64 in the original."""


def image_reward_weights(*, words=120, layers=2, side=28, patch=14, seed=0):
    """Random weights under the authors' own names, unused ones included."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}

    def linear(name, outputs, inputs):
        weights[f"{name}.weight"] = torch.randn((outputs, inputs), generator=generator) / math.sqrt(inputs)
        weights[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.2

    def norm(name, width):
        weights[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        weights[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    weights[f"{vision}.cls_token"] = torch.randn((1, 1, VISION_DIM), generator=generator)
    weights[f"{vision}.pos_embed"] = torch.randn((1, 1 + (side // patch) ** 2, VISION_DIM), generator=generator)
    weights[f"{vision}.patch_embed.proj.weight"] = torch.randn((VISION_DIM, 3, patch, patch), generator=generator) / 20
    weights[f"{vision}.patch_embed.proj.bias"] = torch.randn(VISION_DIM, generator=generator)
    norm(f"{vision}.norm", VISION_DIM)
    for block in [f"{vision}.blocks.{number}" for number in range(layers)]:
        linear(f"{block}.attn.qkv", 3 * VISION_DIM, VISION_DIM)
        linear(f"{block}.attn.proj", VISION_DIM, VISION_DIM)
        linear(f"{block}.mlp.fc1", 4 * VISION_DIM, VISION_DIM)
        linear(f"{block}.mlp.fc2", VISION_DIM, 4 * VISION_DIM)
        norm(f"{block}.norm1", VISION_DIM)
        norm(f"{block}.norm2", VISION_DIM)
    weights[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    weights[f"{text}.embeddings.word_embeddings.weight"] = torch.randn((words, TEXT_DIM), generator=generator)
    weights[f"{text}.embeddings.position_embeddings.weight"] = torch.randn((40, TEXT_DIM), generator=generator)
    norm(f"{text}.embeddings.LayerNorm", TEXT_DIM)
    for layer in [f"{text}.encoder.layer.{number}" for number in range(layers)]:
        for part, width in (("attention", TEXT_DIM), ("crossattention", VISION_DIM)):
            linear(f"{layer}.{part}.self.query", TEXT_DIM, TEXT_DIM)
            linear(f"{layer}.{part}.self.key", TEXT_DIM, width)
            linear(f"{layer}.{part}.self.value", TEXT_DIM, width)
            linear(f"{layer}.{part}.output.dense", TEXT_DIM, TEXT_DIM)
            norm(f"{layer}.{part}.output.LayerNorm", TEXT_DIM)
        linear(f"{layer}.intermediate.dense", 4 * TEXT_DIM, TEXT_DIM)
        linear(f"{layer}.output.dense", TEXT_DIM, 4 * TEXT_DIM)
        norm(f"{layer}.output.LayerNorm", TEXT_DIM)
    linear("blip.vision_proj", 16, VISION_DIM)
    linear("blip.text_proj", 16, TEXT_DIM)
    for number, outputs, inputs in ((0, 32, TEXT_DIM), (2, 16, 32), (4, 8, 16), (6, 4, 8), (7, 1, 4)):
        linear(f"mlp.layers.{number}", outputs, inputs)
    return weights


def image_reward(weights, pixels, tokens):
    """The reward of one picture (1, 3, side, side) and the tokens of its prompt (1, tokens), without padding."""
    rows = _encode_text(weights, tokens, _encode_image(weights, pixels))[:, 0]
    for number in (0, 2, 4, 6, 7):
        rows = _linear(weights, f"mlp.layers.{number}", rows)
    return float((rows[0, 0] - 0.16717362830052426) / 1.0333394966054072)


def _encode_image(weights, pixels):
    prefix = "blip.visual_encoder"
    kernel, bias = (weights[f"{prefix}.patch_embed.proj.{part}"] for part in ("weight", "bias"))
    rows = torch.nn.functional.conv2d(pixels, kernel, bias, stride=kernel.shape[-1]).flatten(2).mT
    rows = torch.cat([weights[f"{prefix}.cls_token"], rows], dim=1) + weights[f"{prefix}.pos_embed"]
    for block in [f"{prefix}.blocks.{number}" for number in range(_count(weights, f"{prefix}.blocks."))]:
        fused = _linear(weights, f"{block}.attn.qkv", _norm(weights, f"{block}.norm1", rows, eps=1e-6))
        rows = rows + _linear(weights, f"{block}.attn.proj", _attend(*fused.chunk(3, dim=-1)))
        inner = gelu(_linear(weights, f"{block}.mlp.fc1", _norm(weights, f"{block}.norm2", rows, eps=1e-6)))
        rows = rows + _linear(weights, f"{block}.mlp.fc2", inner)
    return _norm(weights, f"{prefix}.norm", rows, eps=1e-6)


def _encode_text(weights, tokens, patches):
    prefix = "blip.text_encoder"
    rows = weights[f"{prefix}.embeddings.word_embeddings.weight"][tokens]
    rows = rows + weights[f"{prefix}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    rows = _norm(weights, f"{prefix}.embeddings.LayerNorm", rows)
    for layer in [f"{prefix}.encoder.layer.{number}" for number in range(_count(weights, f"{prefix}.encoder.layer."))]:
        for part in ("attention", "crossattention"):
            context = patches if part == "crossattention" else rows
            query = _linear(weights, f"{layer}.{part}.self.query", rows)
            key, value = (_linear(weights, f"{layer}.{part}.self.{name}", context) for name in ("key", "value"))
            mixed = _linear(weights, f"{layer}.{part}.output.dense", _attend(query, key, value))
            rows = _norm(weights, f"{layer}.{part}.output.LayerNorm", mixed + rows)
        inner = gelu(_linear(weights, f"{layer}.intermediate.dense", rows))
        rows = _norm(weights, f"{layer}.output.LayerNorm", _linear(weights, f"{layer}.output.dense", inner) + rows)
    return rows


def _attend(query, key, value):
    query, key, value = (rows.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for rows in (query, key, value))
    return (softmax(query @ key.mT / HEAD_DIM**0.5, dim=-1) @ value).transpose(1, 2).flatten(2)


def _count(weights, prefix):
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


def _linear(weights, name, rows):
    return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(weights, name, rows, *, eps=1e-12):
    return layer_norm(rows, rows.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=eps)
