"""Tiny checkpoints of every model that the protocol loads, in its real class and file layout: nothing is downloaded."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Tokenizer,
)

from artaug import playground

SUGGESTED = {"reason": "it is dull", "box": [0, 0, 1000, 1000], "prompt": "vivid, softly lit, sharp, glowing"}
"""What the tiny critic answers, whatever it is shown: in words that the playground's model knows."""

_SIDE, _PATCH, _WIDTH = 28, 14, 64
_LONGEST = 32
_VISION = {
    "hidden_size": _WIDTH,
    "intermediate_size": 2 * _WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": _SIDE,
    "patch_size": _PATCH,
}
_CHAT_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_clip(folder: Path) -> str:
    """A CLIP with its image processor and tokenizer, whose words are the playground's."""
    tokenizer = _tokenizer()
    text = {
        **{name: size for name, size in _VISION.items() if name not in {"image_size", "patch_size"}},
        "vocab_size": len(tokenizer),
        "max_position_embeddings": _LONGEST,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=8)
    return _save(folder, _built(CLIPModel, config), _pictures(), tokenizer)


def write_dino(folder: Path) -> str:
    """A DINOv2 with its image processor."""
    sizes = {name: size for name, size in _VISION.items() if name != "intermediate_size"}
    return _save(folder, _built(Dinov2Model, Dinov2Config(**sizes, mlp_ratio=2)), _pictures())


def write_llava(folder: Path, *, reply: str | None = None, seed: int = 0) -> str:
    """A LLaVA with its processor and a token for every byte; with ``reply``, that is what it answers to everything."""
    special = list(_CHAT_SPECIAL)
    pieces = [*special, *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[],
        eos_token=special[2],
        extra_special_tokens=special[1:],
    )
    if reply is not None:
        tokenizer.add_tokens([reply])
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=16384,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(_SIDE // _PATCH) ** 2,
        vision_feature_layer=-1,
    )
    model = _built(LlavaForConditionalGeneration, config, seed=seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    if reply is not None:
        _set_reply(model, tokenizer, reply)
    processor = LlavaProcessor(
        _pictures(),
        tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        chat_template=_CHAT,
        num_additional_image_tokens=1,
    )
    return _save(folder, model, processor)


def write_critic(folder: Path) -> str:
    """A LLaVA that answers everything with one suggestion for all of the picture."""
    return write_llava(folder, reply=json.dumps({"summary": "dull", "suggestions": [SUGGESTED]}))


def write_aesthetic(path: Path) -> Path:
    """A head of linear layers on the vectors of `write_clip`, as LAION's is on those of its CLIP."""
    return _save_weights(
        path, {"layers.0.weight": (4, 8), "layers.0.bias": (4,), "layers.2.weight": (1, 4), "layers.2.bias": (1,)}
    )


def write_hps(path: Path) -> Path:
    """The CLIP of `write_clip` in the names of open_clip, in which HPSv2 is published."""
    words = len(_tokenizer())
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "positional_embedding": (_LONGEST, _WIDTH),
        "text_projection": (_WIDTH, 8),
        "token_embedding.weight": (words, _WIDTH),
        "visual.class_embedding": (_WIDTH,),
        "visual.conv1.weight": (_WIDTH, 3, _PATCH, _PATCH),
        "visual.positional_embedding": (1 + (_SIDE // _PATCH) ** 2, _WIDTH),
        "visual.proj": (_WIDTH, 8),
    }
    for block in ("transformer.resblocks.0", "visual.transformer.resblocks.0"):
        shapes |= {
            f"{block}.attn.in_proj_weight": (3 * _WIDTH, _WIDTH),
            f"{block}.attn.in_proj_bias": (3 * _WIDTH,),
            **_linear(f"{block}.attn.out_proj", _WIDTH, _WIDTH),
            **_linear(f"{block}.mlp.c_fc", 2 * _WIDTH, _WIDTH),
            **_linear(f"{block}.mlp.c_proj", _WIDTH, 2 * _WIDTH),
            **_norm(f"{block}.ln_1", _WIDTH),
            **_norm(f"{block}.ln_2", _WIDTH),
        }
    for norm in ("ln_final", "visual.ln_pre", "visual.ln_post"):
        shapes |= _norm(norm, _WIDTH)
    return _save_weights(path, shapes)


def write_image_reward(path: Path) -> Path:
    """ImageReward in its authors' names: a ViT of two heads, a BERT of one with cross-attention, and five linear layers."""
    words = len(_tokenizer())
    pixels, width = 2 * _WIDTH, _WIDTH
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    block, layer = f"{vision}.blocks.0", f"{text}.encoder.layer.0"
    shapes: dict[str, tuple[int, ...]] = {
        f"{vision}.cls_token": (1, 1, pixels),
        f"{vision}.pos_embed": (1, 1 + (_SIDE // _PATCH) ** 2, pixels),
        f"{vision}.patch_embed.proj.weight": (pixels, 3, _PATCH, _PATCH),
        f"{vision}.patch_embed.proj.bias": (pixels,),
        f"{text}.embeddings.word_embeddings.weight": (words, width),
        f"{text}.embeddings.position_embeddings.weight": (40, width),
        **_linear(f"{block}.attn.qkv", 3 * pixels, pixels),
        **_linear(f"{block}.attn.proj", pixels, pixels),
        **_linear(f"{block}.mlp.fc1", 4 * pixels, pixels),
        **_linear(f"{block}.mlp.fc2", pixels, 4 * pixels),
        **_linear(f"{layer}.intermediate.dense", 4 * width, width),
        **_linear(f"{layer}.output.dense", width, 4 * width),
    }
    for attention, keys in (("attention", width), ("crossattention", pixels)):
        shapes |= _linear(f"{layer}.{attention}.self.query", width, width)
        shapes |= _linear(f"{layer}.{attention}.self.key", width, keys)
        shapes |= _linear(f"{layer}.{attention}.self.value", width, keys)
        shapes |= _linear(f"{layer}.{attention}.output.dense", width, width)
        shapes |= _norm(f"{layer}.{attention}.output.LayerNorm", width)
    for norm, size in (
        (f"{vision}.norm", pixels),
        (f"{block}.norm1", pixels),
        (f"{block}.norm2", pixels),
        (f"{text}.embeddings.LayerNorm", width),
        (f"{layer}.output.LayerNorm", width),
    ):
        shapes |= _norm(norm, size)
    for number, outputs, inputs in ((0, 32, width), (2, 16, 32), (4, 8, 16), (6, 4, 8), (7, 1, 4)):
        shapes |= _linear(f"mlp.layers.{number}", outputs, inputs)
    return _save_weights(path, shapes)


def _tokenizer() -> Any:  # noqa: ANN401 - of transformers
    return AutoTokenizer.from_pretrained(playground.WEIGHTS / "tokenizer")


def _linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _save_weights(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """Write random weights: matrices that keep the size of what they multiply, gains around 1, the rest around 0."""
    generator = torch.Generator().manual_seed(0)

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        numbers = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            return numbers / math.sqrt(math.prod(shape[1:]))
        return 0.1 * numbers + (1.0 if name.endswith("weight") or not shape else 0.0)

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: drawn(name, shape) for name, shape in shapes.items()}, path)
    return path


def _built(model_class: Any, config: Any, *, seed: int = 0) -> Any:  # noqa: ANN401 - of transformers, which is untyped here
    """A model with weights so large that different pictures and prompts give different outputs."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model: nn.Module = model_class(config).eval()
        for name, weight in model.named_parameters():
            is_gain = weight.ndim < 2 and not name.endswith("bias")
            weight.copy_(0.3 * torch.randn(weight.shape) + (1.0 if is_gain else 0.0))
    return model


def _pictures() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": _SIDE}, crop_size={"height": _SIDE, "width": _SIDE})


def _save(folder: Path, *parts: Any) -> str:  # noqa: ANN401 - models and processors
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)


def _set_reply(model: Any, tokenizer: Any, reply: str) -> None:  # noqa: ANN401 - of transformers
    """Set the weights so that the reply, which is one token, follows a line break, and the end of text follows the reply.

    The layers add nothing to the residual stream, so the head sees only the embedding of the last token.
    """
    (reply_token,), (line_break,) = tokenizer.encode(reply), tokenizer.encode("\n")
    language = model.model.language_model
    with torch.no_grad():
        for layer in language.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = language.embed_tokens.weight
        embeddings[[line_break, reply_token]] = torch.eye(embeddings.shape[1])[:2] * 10
        language.norm.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[reply_token] = embeddings[line_break]
        model.lm_head.weight[tokenizer.eos_token_id] = embeddings[reply_token]
