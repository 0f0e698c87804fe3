"""ImageReward: how well people would like a picture for its prompt, read by one BLIP that sees both at once."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self, final

import torch
from PIL.Image import Image
from torch import Tensor, nn

from artaug.errors import ModelError
from artaug.scorers.aesthetic import linear_head
from artaug.scorers.loading import (
    Processor,
    build,
    checked,
    load_tokenizer,
    matched,
    pixels,
    read_tensors,
    shown,
    slices,
    tokens,
)
from artaug.scoring import Scorer

if TYPE_CHECKING:
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
_LONGEST = 35
_HEAD_SIZE = 64  # of BERT base and of ViT-L
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj|itm_head)\.|blip\.text_encoder\.embeddings\.position_ids$")
_VISION_PARTS = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.proj.", ".self_attn.projection."),
    (".attn.qkv.", ".self_attn.qkv."),
)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ImageReward(Scorer):
    """``(MLP(BLIP(picture, prompt)) - 0.167) / 1.033``, about -2.3 to 2 (Xu et al. 2023).

    The picture's patches are looked at by every word of the prompt (BLIP ViT-L, BERT base); five linear layers on the
    first word's vector give the reward, and the mean and spread of the authors' own pictures make it standard. Prompts
    are cut to 35 tokens, with a warning.

    Raises:
        ModelError: for a model in training mode.
        InvalidValueError: if ``batch_size`` is below 1.
    """

    vision: "BlipVisionModel" = field(repr=False)
    """From pictures to patches."""
    text: "BlipTextModel" = field(repr=False)
    """From words to vectors, looking at the patches."""
    head: nn.Module = field(repr=False)
    """From the first word's vector to the reward, before it is made standard."""
    image_processor: Processor = field(repr=False)
    """That of CLIP: bicubic, the middle square."""
    tokenizer: Processor = field(repr=False)
    """That of BERT, in lower case."""
    name: str = "ImageReward"
    """What tables call it."""
    batch_size: int = field(default=16, repr=False)
    """Pictures that go through the model together."""

    def __post_init__(self) -> None:
        for model in (self.vision, self.text):
            checked(self, model=model, batch_size=self.batch_size)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        tokenizer: str = "google-bert/bert-base-uncased",
        revision: str = "main",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> Self:
        """Load the weights of the authors, renamed for transformers' own BLIP.

        Args:
            source: a safetensors file with the keys of ``ImageReward.pt`` (``blip.visual_encoder.``,
                ``blip.text_encoder.``, ``mlp.``). What is published is pickled and refused; the error says how to
                convert it.
            tokenizer: a folder or a name on the Hub.
            revision: of the tokenizer.
            device: where to put the models; None for the CPU. The head stays on the CPU.
            dtype: of the models; the head is float32.
            batch_size: the field.

        Raises:
            ModelError: for a pickled file, or one whose weights are not exactly those of ImageReward.
        """
        from transformers import BlipTextModel, BlipVisionModel, CLIPImageProcessorPil  # noqa: PLC0415 - slow to load

        vision, text, head = _parts(read_tensors(source), source=source)
        seeing, reading = _vision_config(vision, source), _text_config(text, source)
        side = {"height": seeing.image_size, "width": seeing.image_size}
        return cls(
            vision=build(BlipVisionModel, seeing, vision, source=source, device=device, dtype=dtype),
            text=build(BlipTextModel, reading, text, source=source, device=device, dtype=dtype, pooler=False),
            head=linear_head(head, source=source),
            image_processor=CLIPImageProcessorPil(size={"shortest_edge": seeing.image_size}, crop_size=side),
            tokenizer=load_tokenizer(tokenizer, revision=revision),
            batch_size=batch_size,
        )

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    @torch.inference_mode()
    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        matched(images, prompts)
        pictures, rewards = shown(images), []
        for part in slices(len(pictures), self.batch_size):
            patches = self.vision(pixel_values=pixels(self.image_processor, pictures[part], like=self.vision))
            words = tokens(self.tokenizer, prompts[part], limit=_LONGEST, reader=self.name)
            read = self.text(
                input_ids=words["input_ids"].to(self.text.device),
                attention_mask=words["attention_mask"].to(self.text.device),
                encoder_hidden_states=patches.last_hidden_state,
                is_decoder=False,  # words see each other both ways
            )
            rewards += self.head(read.last_hidden_state[:, 0].float().cpu())[:, 0].tolist()
        return [(reward - _MEAN) / _STD for reward in rewards]


def _parts(
    tensors: dict[str, Tensor], *, source: str | Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The weights of what sees, of what reads and of the head, under the names of transformers."""
    vision, text, head = {}, {}, {}
    for name, tensor in tensors.items():
        if name.startswith("blip.visual_encoder."):
            vision[_seen_as(name.removeprefix("blip.visual_encoder."))] = tensor
        elif name.startswith("mlp."):
            head[name.removeprefix("mlp.")] = tensor
        elif not _UNUSED.match(name):
            if not name.startswith("blip.text_encoder."):
                raise ModelError(f"{str(source)!r} has {name!r}, which ImageReward has not.")
            text[name.removeprefix("blip.text_encoder.")] = tensor
    return vision, text, head


def _seen_as(name: str) -> str:
    for part, other in _VISION_PARTS:
        name = name.replace(part, other)
    return re.sub(r"^norm\.", "post_layernorm.", name)


def _vision_config(tensors: dict[str, Tensor], source: str | Path) -> "BlipVisionConfig":
    """Sizes, read off the weights, of a BLIP whose layers normalize as the authors', not as transformers' default."""
    from transformers import BlipVisionConfig  # noqa: PLC0415 - slow to load

    patches = _weight(tensors, "embeddings.patch_embedding.weight", source)
    places = _weight(tensors, "embeddings.position_embedding", source)
    between = _weight(tensors, "encoder.layers.0.mlp.fc1.weight", source)
    return BlipVisionConfig(
        hidden_size=patches.shape[0],
        intermediate_size=between.shape[0],
        num_hidden_layers=_layers(tensors),
        num_attention_heads=patches.shape[0] // _HEAD_SIZE,
        image_size=patches.shape[-1] * math.isqrt(places.shape[1] - 1),
        patch_size=patches.shape[-1],
        layer_norm_eps=1e-6,
    )


def _text_config(tensors: dict[str, Tensor], source: str | Path) -> "BlipTextConfig":
    """Sizes, read off the weights, of a BERT with as many heads as the authors', not as transformers' default."""
    from transformers import BlipTextConfig  # noqa: PLC0415 - slow to load

    words = _weight(tensors, "embeddings.word_embeddings.weight", source)
    return BlipTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        encoder_hidden_size=_weight(tensors, "encoder.layer.0.crossattention.self.key.weight", source).shape[1],
        intermediate_size=_weight(tensors, "encoder.layer.0.intermediate.dense.weight", source).shape[0],
        num_hidden_layers=_layers(tensors),
        num_attention_heads=words.shape[1] // _HEAD_SIZE,
        max_position_embeddings=_weight(tensors, "embeddings.position_embeddings.weight", source).shape[0],
    )


def _layers(tensors: dict[str, Tensor]) -> int:
    numbers = [re.match(r"encoder\.layers?\.(\d+)\.", name) for name in tensors]
    return 1 + max(int(found[1]) for found in numbers if found)


def _weight(tensors: dict[str, Tensor], name: str, source: str | Path) -> Tensor:
    if name not in tensors:
        raise ModelError(f"{str(source)!r} lacks the weights of ImageReward, {name!r} for one.")
    return tensors[name]
