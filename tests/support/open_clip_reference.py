"""CLIP in plain torch with open_clip's weight names, for which HPSv2 checkpoints are written."""

import math

import torch
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention


def open_clip_weights(*, width=64, layers=2, side=28, patch=14, joint=8, words=190, longest=32, seed=0):
    """Random weights under open_clip's own names."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator) * (0.3 / math.sqrt(shape[-1] / 8) if len(shape) > 1 else 0.2)

    weights = {
        "logit_scale": torch.tensor(4.6),
        "positional_embedding": random(longest, width),
        "text_projection": random(width, joint),
        "token_embedding.weight": random(words, width),
        "visual.class_embedding": random(width),
        "visual.conv1.weight": random(width, 3, patch, patch),
        "visual.positional_embedding": random(1 + (side // patch) ** 2, width),
        "visual.proj": random(width, joint),
    }
    norms = ["ln_final", "visual.ln_pre", "visual.ln_post"]
    for prefix in [f"{tower}transformer.resblocks.{number}." for tower in ("", "visual.") for number in range(layers)]:
        for name, shape in {
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width),
            "attn.out_proj.bias": (width,),
            "mlp.c_fc.weight": (4 * width, width),
            "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (width, 4 * width),
            "mlp.c_proj.bias": (width,),
        }.items():
            weights[prefix + name] = random(*shape)
        norms += [f"{prefix}ln_1", f"{prefix}ln_2"]
    return weights | {
        f"{name}.{part}": random(width) + (part == "weight") for name in norms for part in ("weight", "bias")
    }


def encode_image(weights, pixels, *, heads):
    """The picture's embedding, of length 1."""
    patch = weights["visual.conv1.weight"].shape[-1]
    patches = torch.nn.functional.conv2d(pixels, weights["visual.conv1.weight"], stride=patch).flatten(2).mT
    first = weights["visual.class_embedding"].expand(len(patches), 1, -1)
    rows = torch.cat([first, patches], dim=1) + weights["visual.positional_embedding"]
    rows = _blocks(weights, "visual.", _norm(weights, "visual.ln_pre", rows), heads=heads, causal=False)
    return _unit(_norm(weights, "visual.ln_post", rows[:, 0]) @ weights["visual.proj"])


def encode_text(weights, tokens, *, heads):
    """The prompt's embedding, of length 1, taken at the last token that is not padding (here the last of each row)."""
    rows = weights["token_embedding.weight"][tokens] + weights["positional_embedding"][: tokens.shape[1]]
    rows = _norm(weights, "ln_final", _blocks(weights, "", rows, heads=heads, causal=True))
    return _unit(rows[:, -1] @ weights["text_projection"])


def _blocks(weights, tower, rows, *, heads, causal):
    count = sum(name.startswith(f"{tower}transformer.resblocks.") and name.endswith("ln_1.bias") for name in weights)
    for number in range(count):
        prefix = f"{tower}transformer.resblocks.{number}."
        normed = _norm(weights, f"{prefix}ln_1", rows)
        fused = normed @ weights[f"{prefix}attn.in_proj_weight"].T + weights[f"{prefix}attn.in_proj_bias"]
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in fused.chunk(3, dim=-1))
        mixed = scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2).flatten(2)
        rows = rows + _linear(weights, f"{prefix}attn.out_proj", mixed)
        inner = gelu(_linear(weights, f"{prefix}mlp.c_fc", _norm(weights, f"{prefix}ln_2", rows)))
        rows = rows + _linear(weights, f"{prefix}mlp.c_proj", inner)
    return rows


def _linear(weights, name, rows):
    return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(weights, name, rows):
    return layer_norm(rows, rows.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def _unit(rows):
    return rows / rows.norm(dim=-1, keepdim=True)
