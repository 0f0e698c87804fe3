"""HPSv2: a CLIP tuned on people's rankings of pictures, loaded from a checkpoint in open_clip's names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, final

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from artaug._internal.annotations import checked
from artaug._internal.weights import model_errors
from artaug.errors import ModelError
from artaug.scorers.encoders import DualEncoder
from artaug.scorers.loading import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_OPTIONS,
    LoadOptions,
    load_config,
    load_image_processor,
    load_tokenizer,
    load_weights,
    model_from_weights,
)
from artaug.scorers.pickscore import CLIP_H
from artaug.scoring import Scorer

# open_clip's names, as patterns, and their replacements in transformers' CLIPModel.
_KEY_MAP = (
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
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # transformers' own spelling
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
)
_LAYER_KEY_MAP = (
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
)
_TRANSPOSED = ("text_projection", "visual.proj")
_BUFFERS = ("attn_mask",)


@checked
@final
@dataclass(frozen=True, kw_only=True, eq=False)
class HPSv2(Scorer):
    """``cos(picture, prompt)`` in a CLIP-H tuned on rankings: HPS v2 and v2.1 (Wu et al. 2023), about 0.20 to 0.35.

    Papers print it times 100. Scores of v2 and of v2.1 do not compare. Unlike the other CLIPs it gets all of a picture
    that is not square, between black bars.
    """

    encoder: DualEncoder
    """The tuned CLIP, with a `Letterbox` for an image processor."""
    name: str = "HPSv2"
    """The name in tables; ``from_pretrained`` adds the name of the file, which says whether it is v2 or v2.1."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        clip: str = CLIP_H,
        options: LoadOptions = DEFAULT_OPTIONS,
    ) -> Self:
        """Load the tuned weights into the CLIP they were tuned from.

        Args:
            source: a safetensors file with the keys of ``state_dict`` in ``HPS_v2.1_compressed.pt``, which are
                open_clip's. What is published is pickled and refused; the error says how to convert it.
            clip: where the configuration, the tokenizer and the image processor are; its own weights are not read.
            options: revision of ``clip``, device, dtype and batch size.

        Raises:
            ModelError: for a pickled file, or one whose weights are not exactly those of ``clip``.
        """
        from transformers import CLIPModel  # noqa: PLC0415 - slow to load

        with model_errors(f"{str(source)!r} does not hold the weights of a CLIP of open_clip"):
            weights = from_open_clip(load_weights(source), source=source)
        config = load_config(clip, revision=options.revision)
        image_processor = load_image_processor(clip, revision=options.revision)
        with model_errors(f"{clip!r} is not of a CLIP"):
            letterbox = Letterbox(
                size_px=config.vision_config.image_size,
                mean=tuple(image_processor.image_mean),
                std=tuple(image_processor.image_std),
            )
        encoder = DualEncoder(
            model=model_from_weights(CLIPModel, config, weights, options, source=source),
            image_processor=letterbox,
            tokenizer=load_tokenizer(clip, revision=options.revision),
            name=Path(source).stem,
            batch_size=options.batch_size or DEFAULT_BATCH_SIZE,
        )
        return cls(encoder=encoder, name=f"HPSv2 ({Path(source).stem})")

    @property
    def models(self) -> Sequence[nn.Module]:
        return self.encoder.models

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        return self.encoder.cosines(images, prompts)


@checked
@final
@dataclass(frozen=True, kw_only=True)
class Letterbox:
    """An image processor that keeps all of a picture: resized to fit a square (bicubic, antialiased), the rest is black."""

    size_px: int
    """Side of the square."""
    mean: tuple[float, ...]
    """Subtracted from each channel, of values in [0, 1], after padding."""
    std: tuple[float, ...]
    """Each channel is divided by it."""

    def __call__(
        self, images: Sequence[Image], *, return_tensors: str = "pt", input_data_format: str = "channels_last"
    ) -> dict[str, Tensor]:
        """``pixel_values`` of RGB pictures, (pictures, 3, size_px, size_px), as image processors of transformers return them."""
        squares = torch.stack([self._pad_to_square(image) for image in images])
        mean, std = (torch.tensor(channels)[:, None, None] for channels in (self.mean, self.std))
        return {"pixel_values": (squares - mean) / std}

    def _pad_to_square(self, image: Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)
        scale = self.size_px / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        if (width, height) != image.size:
            pixels = torch.nn.functional.interpolate(
                pixels[None], (height, width), mode="bicubic", antialias=True, align_corners=False
            )[0]
        left, top = (self.size_px - width) // 2, (self.size_px - height) // 2
        right, bottom = self.size_px - width - left, self.size_px - height - top
        return torch.nn.functional.pad(pixels, (left, right, top, bottom))


def from_open_clip(weights: dict[str, Tensor], *, source: str | Path) -> dict[str, Tensor]:
    """Rename the weights of an open_clip CLIP to those of transformers' ``CLIPModel``.

    The fused projection of queries, keys and values is split; the output projections are transposed, as open_clip
    multiplies by them from the right.

    Raises:
        ModelError: naming a weight that no CLIP of open_clip has.
    """
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name in _BUFFERS:
            continue
        key = _transformers_key(name)
        if key is None:
            raise ModelError(f"{str(source)!r} has {name!r}, which no CLIP of open_clip has.")
        if fused := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", key):
            for projection, third in zip("qkv", weight.chunk(3), strict=True):
                renamed[f"{fused[1]}.self_attn.{projection}_proj.{fused[2]}"] = third.contiguous()
        else:
            renamed[key] = weight.T.contiguous() if name in _TRANSPOSED else weight
    return renamed


def _transformers_key(name: str) -> str | None:
    for pattern, replacement in _KEY_MAP:
        if re.match(pattern, name):
            key = re.sub(pattern, replacement, name)
            for original, renamed in _LAYER_KEY_MAP:
                key = key.replace(original, renamed)
            return key
    return None
