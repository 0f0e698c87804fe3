"""Weights of a CLIP under the names that open_clip gives them, renamed as transformers has them."""

import re
from pathlib import Path

from torch import Tensor

from artaug.errors import ModelError

_PLACES = (
    (r"^logit_scale$", "logit_scale"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.weight$", "text_model.embeddings.token_embedding.weight"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.weight$", "vision_model.embeddings.patch_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # as transformers spells it
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
)
_LAYER_PARTS = (
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
)
_TRANSPOSED = ("text_projection", "visual.proj")
_NOT_WEIGHTS = ("attn_mask",)


def from_open_clip(tensors: dict[str, Tensor], *, source: str | Path) -> dict[str, Tensor]:
    """Rename the weights of a CLIP of open_clip: queries, keys and values part, projections are transposed.

    Raises:
        ModelError: naming a weight that no CLIP of open_clip has.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in _NOT_WEIGHTS:
            continue
        place = _place(name)
        if place is None:
            raise ModelError(f"{str(source)!r} has {name!r}, which no CLIP of open_clip has.")
        if fused := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", place):
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{fused[1]}.self_attn.{part}_proj.{fused[2]}"] = third.contiguous()
        else:
            renamed[place] = tensor.T.contiguous() if name in _TRANSPOSED else tensor
    return renamed


def _place(name: str) -> str | None:
    for pattern, place in _PLACES:
        if re.match(pattern, name):
            renamed = re.sub(pattern, place, name)
            for part, other in _LAYER_PARTS:
                renamed = renamed.replace(part, other)
            return renamed
    return None
