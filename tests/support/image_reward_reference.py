"""ImageReward as its authors lay it out and compute it, in plain torch: a ViT, a BERT that looks at it, five layers."""

import math

import torch
from torch.nn.functional import gelu, layer_norm, softmax

SEEN, READ, HEAD_SIZE = 128, 64, 64
"""Widths, 1024 and 768 in the original, of heads of 64 numbers there and here."""


def image_reward_weights(*, words=120, layers=2, side=28, patch=14, seed=0):
    """Random weights under the authors' own names, those that take no part included."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}

    def linear(name, wide, narrow):
        weights[f"{name}.weight"] = torch.randn((wide, narrow), generator=draw) / math.sqrt(narrow)
        weights[f"{name}.bias"] = torch.randn(wide, generator=draw) * 0.2

    def norm(name, width):
        weights[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=draw)
        weights[f"{name}.bias"] = 0.2 * torch.randn(width, generator=draw)

    see, read = "blip.visual_encoder", "blip.text_encoder"
    weights[f"{see}.cls_token"] = torch.randn((1, 1, SEEN), generator=draw)
    weights[f"{see}.pos_embed"] = torch.randn((1, 1 + (side // patch) ** 2, SEEN), generator=draw)
    weights[f"{see}.patch_embed.proj.weight"] = torch.randn((SEEN, 3, patch, patch), generator=draw) / 20
    weights[f"{see}.patch_embed.proj.bias"] = torch.randn(SEEN, generator=draw)
    norm(f"{see}.norm", SEEN)
    for block in [f"{see}.blocks.{number}" for number in range(layers)]:
        linear(f"{block}.attn.qkv", 3 * SEEN, SEEN)
        linear(f"{block}.attn.proj", SEEN, SEEN)
        linear(f"{block}.mlp.fc1", 4 * SEEN, SEEN)
        linear(f"{block}.mlp.fc2", SEEN, 4 * SEEN)
        norm(f"{block}.norm1", SEEN)
        norm(f"{block}.norm2", SEEN)
    weights[f"{read}.embeddings.position_ids"] = torch.arange(40)[None]
    weights[f"{read}.embeddings.word_embeddings.weight"] = torch.randn((words, READ), generator=draw)
    weights[f"{read}.embeddings.position_embeddings.weight"] = torch.randn((40, READ), generator=draw)
    norm(f"{read}.embeddings.LayerNorm", READ)
    for layer in [f"{read}.encoder.layer.{number}" for number in range(layers)]:
        for part, width in (("attention", READ), ("crossattention", SEEN)):
            linear(f"{layer}.{part}.self.query", READ, READ)
            linear(f"{layer}.{part}.self.key", READ, width)
            linear(f"{layer}.{part}.self.value", READ, width)
            linear(f"{layer}.{part}.output.dense", READ, READ)
            norm(f"{layer}.{part}.output.LayerNorm", READ)
        linear(f"{layer}.intermediate.dense", 4 * READ, READ)
        linear(f"{layer}.output.dense", READ, 4 * READ)
        norm(f"{layer}.output.LayerNorm", READ)
    linear("blip.vision_proj", 16, SEEN)
    linear("blip.text_proj", 16, READ)
    for number, wide, narrow in ((0, 32, READ), (2, 16, 32), (4, 8, 16), (6, 4, 8), (7, 1, 4)):
        linear(f"mlp.layers.{number}", wide, narrow)
    return weights


def image_reward(weights, pixels, tokens):
    """The reward of one picture (1, 3, side, side) and the tokens of its prompt (1, words), all of them words."""
    rows = _read(weights, tokens, _see(weights, pixels))[:, 0]
    for number in (0, 2, 4, 6, 7):
        rows = _linear(weights, f"mlp.layers.{number}", rows)
    return float((rows[0, 0] - 0.16717362830052426) / 1.0333394966054072)


def _see(weights, pixels):
    place = "blip.visual_encoder"
    kernel, shift = (weights[f"{place}.patch_embed.proj.{part}"] for part in ("weight", "bias"))
    rows = torch.nn.functional.conv2d(pixels, kernel, shift, stride=kernel.shape[-1]).flatten(2).mT
    rows = torch.cat([weights[f"{place}.cls_token"], rows], dim=1) + weights[f"{place}.pos_embed"]
    for block in [f"{place}.blocks.{number}" for number in range(_count(weights, f"{place}.blocks."))]:
        fused = _linear(weights, f"{block}.attn.qkv", _norm(weights, f"{block}.norm1", rows, eps=1e-6))
        rows = rows + _linear(weights, f"{block}.attn.proj", _attend(*fused.chunk(3, dim=-1)))
        inner = gelu(_linear(weights, f"{block}.mlp.fc1", _norm(weights, f"{block}.norm2", rows, eps=1e-6)))
        rows = rows + _linear(weights, f"{block}.mlp.fc2", inner)
    return _norm(weights, f"{place}.norm", rows, eps=1e-6)


def _read(weights, tokens, patches):
    place = "blip.text_encoder"
    rows = weights[f"{place}.embeddings.word_embeddings.weight"][tokens]
    rows = rows + weights[f"{place}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    rows = _norm(weights, f"{place}.embeddings.LayerNorm", rows)
    for layer in [f"{place}.encoder.layer.{number}" for number in range(_count(weights, f"{place}.encoder.layer."))]:
        for part in ("attention", "crossattention"):
            context = patches if part == "crossattention" else rows
            query = _linear(weights, f"{layer}.{part}.self.query", rows)
            key, value = (_linear(weights, f"{layer}.{part}.self.{one}", context) for one in ("key", "value"))
            mixed = _linear(weights, f"{layer}.{part}.output.dense", _attend(query, key, value))
            rows = _norm(weights, f"{layer}.{part}.output.LayerNorm", mixed + rows)
        inner = gelu(_linear(weights, f"{layer}.intermediate.dense", rows))
        rows = _norm(weights, f"{layer}.output.LayerNorm", _linear(weights, f"{layer}.output.dense", inner) + rows)
    return rows


def _attend(query, key, value):
    query, key, value = (rows.unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2) for rows in (query, key, value))
    return (softmax(query @ key.mT / HEAD_SIZE**0.5, dim=-1) @ value).transpose(1, 2).flatten(2)


def _count(weights, place):
    return len({name.removeprefix(place).split(".")[0] for name in weights if name.startswith(place)})


def _linear(weights, name, rows):
    return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(weights, name, rows, *, eps=1e-12):
    return layer_norm(rows, rows.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=eps)
