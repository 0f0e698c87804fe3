"""Pictures and words as vectors: what CLIP scores, SigLIP scores, aesthetic heads and likeness are computed from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self, final

import torch
from PIL.Image import Image
from torch import Tensor

from artaug.errors import ModelError
from artaug.scorers.loading import (
    Processor,
    checked,
    load_config,
    load_image_processor,
    load_model,
    load_tokenizer,
    matched,
    pixels,
    shown,
    slices,
    tokens,
)

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedModel, SiglipModel

_KNOWN = ("clip", "siglip")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class DualEncoder:
    """CLIP or SigLIP: one tower for pictures, one for words, both into one space. Several scorers can share it.

    Vectors have length 1 and are float32 whatever the type of the weights. Prompts are padded to the length the model
    was trained on, without which SigLIP scores are wrong, and longer ones are cut with a warning that quotes the rest.

    Raises:
        ModelError: for a model of another kind, or one in training mode.
        InvalidValueError: if ``batch_size`` is below 1.
    """

    model: "CLIPModel | SiglipModel" = field(repr=False)
    """A ``CLIPModel`` or ``SiglipModel``, in evaluation mode. It is not altered."""
    image_processor: Processor = field(repr=False)
    """Its image processor; resizing by Pillow, as ``CLIPImageProcessorPil`` does, keeps to published scores."""
    tokenizer: Processor = field(repr=False)
    """Its tokenizer."""
    name: str = ""
    """What to call the model; its name or path if not given."""
    batch_size: int = field(default=16, repr=False)
    """Pictures, or prompts, that go through the model together."""

    def __post_init__(self) -> None:
        checked(self, model=self.model, batch_size=self.batch_size)
        _check_known(self.model.config.model_type, self.model.config.name_or_path)
        if not self.name:
            object.__setattr__(self, "name", self.model.config.name_or_path)

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        processor: str | None = None,
        revision: str = "main",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> Self:
        """Load both towers.

        Args:
            source: a folder that ``save_pretrained`` wrote, or a Hub name like ``"openai/clip-vit-large-patch14"``.
            processor: where the image processor and the tokenizer are, if not at ``source``; its main branch is read.
            revision: branch, tag or commit of ``source``.
            device: where to put the model; None for the CPU.
            dtype: of the weights.
            batch_size: the field.

        Raises:
            ModelError: if there is no CLIP or SigLIP at ``source``, or its weights are pickled or incomplete.
        """
        from transformers import AutoModel  # noqa: PLC0415 - slow to load

        _check_known(load_config(source, revision=revision).model_type, source)
        beside = revision if processor is None else "main"
        return cls(
            image_processor=load_image_processor(processor or source, revision=beside),
            tokenizer=load_tokenizer(processor or source, revision=beside),
            model=load_model(AutoModel, source, revision=revision, device=device, dtype=dtype),
            name=source if revision == "main" else f"{source}@{revision}",
            batch_size=batch_size,
        )

    @property
    def temperature(self) -> float:
        """``exp(logit_scale)``, by which the model multiplied cosines when it was trained; 100 for most CLIPs."""
        return float(self.model.logit_scale.detach().double().exp())

    @property
    def bias(self) -> float:
        """What SigLIP adds to scaled cosines; 0 for CLIP."""
        return float(self.model.logit_bias.detach()) if self.model.config.model_type == "siglip" else 0.0

    def cosines(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """How well each picture fits its prompt, in [-1, 1].

        Raises:
            InvalidValueError: if pictures and prompts differ in number, or for an image without pixels.
        """
        matched(images, prompts)
        products = self.embed_images(images) * self.embed_texts(prompts)
        return [float(product) for product in products.sum(dim=-1)]

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image]) -> Tensor:
        """A vector of length 1 for each picture: (pictures, features), float32, on the CPU.

        Raises:
            InvalidValueError: for an image without pixels, or of a mode that is no colour.
        """
        pictures = shown(images)
        rows = [
            self.model.get_image_features(pixel_values=pixels(self.image_processor, pictures[part], like=self.model))
            for part in slices(len(pictures), self.batch_size)
        ]
        return _unit([row.pooler_output for row in rows])  # transformers 5 returns more than the vectors

    @torch.inference_mode()
    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """A vector of length 1 for each prompt: (prompts, features), float32, on the CPU."""
        distinct = list(dict.fromkeys(prompts))  # a pair has one prompt
        limit = self.model.config.text_config.max_position_embeddings
        rows = []
        for part in slices(len(distinct), self.batch_size):
            inputs = tokens(self.tokenizer, distinct[part], limit=limit, reader=self.name)
            # No mask: SigLIP was trained to read its padding, and CLIP's causal text tower never looks at it.
            rows.append(self.model.get_text_features(input_ids=inputs["input_ids"].to(self.model.device)))
        vectors = _unit([row.pooler_output for row in rows])
        return vectors[[distinct.index(prompt) for prompt in prompts]]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ImageEncoder:
    """A model that only sees, such as DINOv2: its vectors say how alike two pictures look, in subject and layout.

    `artaug.EmbeddingSimilarity` compares pictures by it, or by a `DualEncoder`.

    Raises:
        ModelError: for a model in training mode.
        InvalidValueError: if ``batch_size`` is below 1.
    """

    model: "PreTrainedModel" = field(repr=False)
    """A model of ``AutoModel`` that takes pictures and returns ``pooler_output``, such as ``Dinov2Model``."""
    image_processor: Processor = field(repr=False)
    """Its image processor."""
    name: str = ""
    """What to call the model; its name or path if not given."""
    batch_size: int = field(default=16, repr=False)
    """Pictures that go through the model together."""

    def __post_init__(self) -> None:
        checked(self, model=self.model, batch_size=self.batch_size)
        if not self.name:
            object.__setattr__(self, "name", self.model.config.name_or_path)

    @classmethod
    def from_pretrained(
        cls,
        source: str = "facebook/dinov2-base",
        *,
        revision: str = "main",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> Self:
        """Load the model; the arguments are those of `DualEncoder.from_pretrained`.

        Raises:
            ModelError: if there is no model at ``source``, or its weights are pickled or incomplete.
        """
        from transformers import AutoModel  # noqa: PLC0415 - slow to load

        return cls(
            image_processor=load_image_processor(source, revision=revision),
            model=load_model(AutoModel, source, revision=revision, device=device, dtype=dtype),
            name=source if revision == "main" else f"{source}@{revision}",
            batch_size=batch_size,
        )

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image]) -> Tensor:
        """A vector of length 1 for each picture: (pictures, features), float32, on the CPU.

        Raises:
            InvalidValueError: for an image without pixels, or of a mode that is no colour.
            ModelError: if the model gives no vector for the whole picture.
        """
        pictures, rows = shown(images), []
        for part in slices(len(pictures), self.batch_size):
            seen = self.model(pixel_values=pixels(self.image_processor, pictures[part], like=self.model))
            if getattr(seen, "pooler_output", None) is None:
                raise ModelError(f"{self.name} gives no pooler_output, a vector for the whole picture. Take DINOv2.")
            rows.append(seen.pooler_output)
        return _unit(rows)


def _unit(rows: Sequence[Tensor]) -> Tensor:
    if not rows:
        return torch.zeros(0, 1)
    return torch.nn.functional.normalize(torch.cat(list(rows)).float().cpu(), dim=-1)


def _check_known(kind: str, source: str) -> None:
    if kind not in _KNOWN:
        raise ModelError(f"{source!r} is a {kind!r} model. Expected one of {', '.join(_KNOWN)}, with both its towers.")
