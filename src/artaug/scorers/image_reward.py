"""ImageReward: how much people would like a picture for its prompt, by a BLIP that attends to both together."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self, final

import torch
from PIL.Image import Image
from torch import Tensor, nn

from artaug._internal.annotations import checked
from artaug._internal.weights import model_errors
from artaug.errors import ModelError
from artaug.scorers.aesthetic import linear_head
from artaug.scorers.loading import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_OPTIONS,
    LoadOptions,
    TransformersProcessor,
    batch_slices,
    check_counts,
    check_model,
    load_tokenizer,
    load_weights,
    model_from_weights,
    pixel_values,
    to_rgb,
    tokenize,
)
from artaug.scoring import Scorer

if TYPE_CHECKING:
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

_REWARD_MEAN, _REWARD_STD = 0.16717362830052426, 1.0333394966054072  # as published, of the authors' pictures
_MAX_TOKENS = 35
_HEAD_DIM = 64  # of attention, in BERT base and in ViT-L
_UNUSED_KEYS = re.compile(r"blip\.(vision_proj|text_proj|itm_head)\.|blip\.text_encoder\.embeddings\.position_ids$")
_VISION_KEY_MAP = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.proj.", ".self_attn.projection."),
    (".attn.qkv.", ".self_attn.qkv."),
)


@checked
@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ImageReward(Scorer):
    """``(MLP(BLIP(picture, prompt)) - 0.167) / 1.033``, about -2.3 to 2 (Xu et al. 2023).

    Every token of the prompt attends to the picture's patches (BLIP ViT-L, BERT base); five linear layers on the first
    token's vector give the reward, which is standardized by its mean and deviation on the authors' pictures. Prompts are
    truncated to 35 tokens, with a warning.

    Raises:
        ModelError: for a model in training mode.
        InvalidValueError: if ``batch_size`` is below 1.
    """

    vision: "BlipVisionModel" = field(repr=False)
    """From pictures to patch vectors."""
    text: "BlipTextModel" = field(repr=False)
    """From tokens to vectors, with cross-attention to the patches."""
    head: nn.Module = field(repr=False)
    """From the first token's vector to the reward, before it is standardized."""
    image_processor: TransformersProcessor = field(repr=False)
    """That of CLIP: bicubic, center crop."""
    tokenizer: TransformersProcessor = field(repr=False)
    """That of uncased BERT."""
    name: str = "ImageReward"
    """The name in tables."""
    batch_size: int = field(default=DEFAULT_BATCH_SIZE, repr=False)
    """Pictures that go through the model together."""

    def __post_init__(self) -> None:
        for model in (self.vision, self.text):
            check_model(self, model=model, batch_size=self.batch_size)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        tokenizer: str = "google-bert/bert-base-uncased",
        options: LoadOptions = DEFAULT_OPTIONS,
    ) -> Self:
        """Load the weights of the authors, renamed for transformers' own BLIP.

        Args:
            source: a safetensors file with the keys of ``ImageReward.pt`` (``blip.visual_encoder.``,
                ``blip.text_encoder.``, ``mlp.``). What is published is pickled and refused; the error says how to
                convert it.
            tokenizer: a folder or a name on the Hub.
            options: revision of the tokenizer, device and dtype of both models, and batch size. The head stays on the
                CPU and is float32.

        Raises:
            ModelError: for a pickled file, or one whose weights are not exactly those of ImageReward.
        """
        from transformers import BlipTextModel, BlipVisionModel, CLIPImageProcessorPil  # noqa: PLC0415 - slow to load

        with model_errors(f"{str(source)!r} does not hold the weights of ImageReward"):
            vision, text, head = _split_weights(load_weights(source), source=source)
            vision_config, text_config = _vision_config(vision, source), _text_config(text, source)
            linear = linear_head(head, source=source)
        side = vision_config.image_size
        return cls(
            vision=model_from_weights(BlipVisionModel, vision_config, vision, options, source=source),
            text=model_from_weights(BlipTextModel, text_config, text, options, source=source, pooler=False),
            head=linear,
            image_processor=CLIPImageProcessorPil(
                size={"shortest_edge": side}, crop_size={"height": side, "width": side}
            ),
            tokenizer=load_tokenizer(tokenizer, revision=options.revision),
            batch_size=options.batch_size or DEFAULT_BATCH_SIZE,
        )

    @property
    def models(self) -> Sequence[nn.Module]:
        return (self.vision, self.text)

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    @torch.inference_mode()
    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        check_counts(images, prompts)
        rgb, rewards = to_rgb(images), []
        for batch in batch_slices(len(rgb), self.batch_size):
            patches = self.vision(pixel_values=pixel_values(self.image_processor, rgb[batch], model=self.vision))
            tokens = tokenize(self.tokenizer, prompts[batch], max_length=_MAX_TOKENS, model_name=self.name)
            output = self.text(
                input_ids=tokens["input_ids"].to(self.text.device),
                attention_mask=tokens["attention_mask"].to(self.text.device),
                encoder_hidden_states=patches.last_hidden_state,
                is_decoder=False,  # no causal mask: tokens attend in both directions
            )
            rewards += self.head(output.last_hidden_state[:, 0].float().cpu())[:, 0].tolist()
        return [(reward - _REWARD_MEAN) / _REWARD_STD for reward in rewards]


def _split_weights(
    weights: dict[str, Tensor], *, source: str | Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The weights of the vision model, the text model and the head, under transformers' names."""
    vision, text, head = {}, {}, {}
    for name, weight in weights.items():
        if name.startswith("blip.visual_encoder."):
            vision[_vision_key(name.removeprefix("blip.visual_encoder."))] = weight
        elif name.startswith("mlp."):
            head[name.removeprefix("mlp.")] = weight
        elif not _UNUSED_KEYS.match(name):
            if not name.startswith("blip.text_encoder."):
                raise ModelError(f"{str(source)!r} has {name!r}, which ImageReward does not have.")
            text[name.removeprefix("blip.text_encoder.")] = weight
    return vision, text, head


def _vision_key(name: str) -> str:
    for original, renamed in _VISION_KEY_MAP:
        name = name.replace(original, renamed)
    return re.sub(r"^norm\.", "post_layernorm.", name)


def _vision_config(weights: dict[str, Tensor], source: str | Path) -> "BlipVisionConfig":
    """The configuration that fits the weights, with the authors' layer norm epsilon, not transformers' default."""
    from transformers import BlipVisionConfig  # noqa: PLC0415 - slow to load

    patch_embedding = _weight(weights, "embeddings.patch_embedding.weight", source)  # (hidden, 3, patch, patch)
    positions = _weight(weights, "embeddings.position_embedding", source)  # (1, 1 + patches, hidden)
    return BlipVisionConfig(
        hidden_size=patch_embedding.shape[0],
        intermediate_size=_weight(weights, "encoder.layers.0.mlp.fc1.weight", source).shape[0],
        num_hidden_layers=_layer_count(weights),
        num_attention_heads=patch_embedding.shape[0] // _HEAD_DIM,
        image_size=patch_embedding.shape[-1] * math.isqrt(positions.shape[1] - 1),
        patch_size=patch_embedding.shape[-1],
        layer_norm_eps=1e-6,
    )


def _text_config(weights: dict[str, Tensor], source: str | Path) -> "BlipTextConfig":
    """The configuration that fits the weights, with the authors' number of heads, not transformers' default."""
    from transformers import BlipTextConfig  # noqa: PLC0415 - slow to load

    embedding = _weight(weights, "embeddings.word_embeddings.weight", source)  # (vocabulary, hidden)
    return BlipTextConfig(
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        encoder_hidden_size=_weight(weights, "encoder.layer.0.crossattention.self.key.weight", source).shape[1],
        intermediate_size=_weight(weights, "encoder.layer.0.intermediate.dense.weight", source).shape[0],
        num_hidden_layers=_layer_count(weights),
        num_attention_heads=embedding.shape[1] // _HEAD_DIM,
        max_position_embeddings=_weight(weights, "embeddings.position_embeddings.weight", source).shape[0],
    )


def _layer_count(weights: dict[str, Tensor]) -> int:
    matches = [re.match(r"encoder\.layers?\.(\d+)\.", name) for name in weights]
    return 1 + max(int(match[1]) for match in matches if match)


def _weight(weights: dict[str, Tensor], name: str, source: str | Path) -> Tensor:
    if name not in weights:
        raise ModelError(f"{str(source)!r} lacks the weights of ImageReward, {name!r} for one.")
    return weights[name]
