"""Tiny real models for scorers: random weights from configs, image processors without torchvision."""

import string

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from support.tiny_clip import LONGEST, clip_tokenizer

SIDE = 28
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 14,
}


def tiny_clip(*, seed=0, act="quick_gelu"):
    """A CLIP, its image processor and its tokenizer."""
    words = clip_tokenizer()
    text = {**TEXT, "vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config={**text, "hidden_act": act}, vision_config={**VISION, "hidden_act": act}, projection_dim=8
    )
    return random_model(CLIPModel, config, seed), clip_pictures(), words


def tiny_siglip(*, seed=0):
    """A SigLIP, its image processor and its tokenizer."""
    words = letters(pad="</s>")
    text = {**TEXT, "vocab_size": len(words), "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1}
    config = SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=VISION)
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return random_model(SiglipModel, config, seed), images, words


def tiny_dino(*, seed=0):
    """A DINOv2 and its image processor."""
    config = Dinov2Config(**{**VISION, "mlp_ratio": 2})
    return random_model(Dinov2Model, config, seed), clip_pictures()


def tiny_classifier(*, seed=0):
    """An image classifier of three classes, and its image processor."""
    labels = dict(enumerate(["normal", "drawing", "unsafe"]))
    config = ViTConfig(**VISION, id2label=labels, label2id={label: index for index, label in labels.items()})
    images = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return random_model(ViTForImageClassification, config, seed), images


def saved(folder, *parts):
    """Save a model and its processors to one folder, as published checkpoints are."""
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)


def clip_pictures():
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def letters(*, pad, begin=None, end="</s>"):
    """A tokenizer with a token for every letter."""
    special = list(dict.fromkeys(["<unk>", pad, end, *([begin] if begin else [])]))
    pieces = [*special, *string.printable[:95]]
    core = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    ids = {piece: pieces.index(piece) for piece in special}
    core.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}" if begin else f"$A {end}", special_tokens=list(ids.items())
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token=pad, eos_token=end, model_max_length=LONGEST
    )


def random_model(model_class, config, seed):
    """A model with weights so large that different pictures and prompts give different outputs."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class(config).eval()
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * (0.3 if weight.ndim else 1) + (weight.ndim == 1) * 0.1)
    return model


TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LONGEST,
}
