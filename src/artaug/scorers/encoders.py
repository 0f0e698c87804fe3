"""Pictures and prompts as vectors: the encoders that CLIP scores, aesthetic heads and similarities are computed from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self, final

import torch
from PIL.Image import Image
from torch import Tensor, nn

from artaug._internal.annotations import checked
from artaug.errors import ModelError
from artaug.scorers.loading import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_OPTIONS,
    LoadOptions,
    TransformersProcessor,
    batch_slices,
    check_counts,
    check_model,
    load_config,
    load_image_processor,
    load_model,
    load_tokenizer,
    pixel_batches,
    tokenize,
)

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedModel, SiglipModel

_MODEL_TYPES = ("clip", "siglip")


@checked
@final
@dataclass(frozen=True, kw_only=True, eq=False)
class DualEncoder:
    """CLIP or SigLIP: an image tower and a text tower into one space. Several scorers can share it.

    Vectors have length 1 and are float32 whatever the dtype of the weights. Prompts are read in lower case and padded to
    the length the model was trained on, without which SigLIP scores are wrong; longer ones are truncated with a warning.

    Raises:
        ModelError: for a model of another type, or one in training mode.
        InvalidValueError: if ``batch_size`` is below 1.
    """

    model: "CLIPModel | SiglipModel" = field(repr=False)
    """A ``CLIPModel`` or ``SiglipModel``, in evaluation mode. It is not altered."""
    image_processor: TransformersProcessor = field(repr=False)
    """Its image processor; one that resizes by Pillow, such as ``CLIPImageProcessorPil``, gives the published scores."""
    tokenizer: TransformersProcessor = field(repr=False)
    """Its tokenizer."""
    name: str = ""
    """The model's name in tables; its name or path if not given."""
    batch_size: int = field(default=DEFAULT_BATCH_SIZE, repr=False)
    """Pictures, or prompts, that go through the model together."""

    def __post_init__(self) -> None:
        check_model(self, model=self.model, batch_size=self.batch_size)
        _check_model_type(self.model.config.model_type, self.model.config.name_or_path)
        if not self.name:
            object.__setattr__(self, "name", self.model.config.name_or_path)

    @classmethod
    def from_pretrained(
        cls, source: str, *, processor: str | None = None, options: LoadOptions = DEFAULT_OPTIONS
    ) -> Self:
        """Load both towers.

        Args:
            source: a folder that ``save_pretrained`` wrote, or a Hub name like ``"openai/clip-vit-large-patch14"``.
            processor: where the image processor and the tokenizer are, if not at ``source``; its main branch is read.
            options: revision of ``source``, device, dtype and batch size.

        Raises:
            ModelError: if there is no CLIP or SigLIP at ``source``, or its weights are pickled or incomplete.
        """
        from transformers import AutoModel  # noqa: PLC0415 - slow to load

        _check_model_type(load_config(source, revision=options.revision).model_type, source)
        processor_revision = options.revision if processor is None else "main"
        return cls(
            image_processor=load_image_processor(processor or source, revision=processor_revision),
            tokenizer=load_tokenizer(processor or source, revision=processor_revision),
            model=load_model(AutoModel, source, options),
            name=options.label(source),
            batch_size=options.batch_size or DEFAULT_BATCH_SIZE,
        )

    @property
    def models(self) -> Sequence[nn.Module]:
        """Its model, see `artaug.Scorer.models`."""
        return (self.model,)

    @property
    def temperature(self) -> float:
        """``exp(logit_scale)``, the factor of the cosines in training; 100 for most CLIPs."""
        return float(self.model.logit_scale.detach().cpu().double().exp())

    @property
    def bias(self) -> float:
        """What SigLIP adds to scaled cosines; 0 for CLIP."""
        return float(self.model.logit_bias.detach()) if self.model.config.model_type == "siglip" else 0.0

    @property
    def _reads_lower_case(self) -> bool:
        """Whether the model was trained on lower case and its tokenizer does not see to it.

        The tokenizers of CLIP and of the first SigLIP do. SigLIP 2 of fixed resolution has SigLIP's ``model_type`` and
        Gemma's tokenizer, which keeps the case (huggingface/transformers#43101, NVlabs/RADIO#142).
        """
        return self.model.config.model_type == "siglip" and type(self.tokenizer).__name__ != "SiglipTokenizer"

    def cosines(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """The cosine of each picture and its prompt, in [-1, 1].

        Raises:
            InvalidValueError: if pictures and prompts differ in number, or for an image without pixels.
        """
        check_counts(images, prompts)
        products = self.embed_images(images) * self.embed_texts(prompts)  # (pairs, features), both of length 1
        return [float(cosine) for cosine in products.sum(dim=-1)]

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image]) -> Tensor:
        """A vector of length 1 for each picture: (pictures, features), float32, on the CPU.

        Raises:
            InvalidValueError: for an image without pixels, or of a mode without colours.
        """
        outputs = [
            self.model.get_image_features(pixel_values=pixels)
            for pixels in pixel_batches(self.image_processor, images, model=self.model, batch_size=self.batch_size)
        ]
        return _normalize([output.pooler_output for output in outputs])  # transformers 5 returns an output object

    @torch.inference_mode()
    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """A vector of length 1 for each prompt: (prompts, features), float32, on the CPU."""
        if self._reads_lower_case:
            prompts = [prompt.lower() for prompt in prompts]
        distinct = list(dict.fromkeys(prompts))  # the two pictures of a pair share a prompt: encode it once
        max_length = self.model.config.text_config.max_position_embeddings
        outputs = []
        for batch in batch_slices(len(distinct), self.batch_size):
            inputs = tokenize(self.tokenizer, distinct[batch], max_length=max_length, model_name=self.name)
            # No attention mask: SigLIP was trained to attend to its padding, and CLIP's causal tower never sees it.
            outputs.append(self.model.get_text_features(input_ids=inputs["input_ids"].to(self.model.device)))
        vectors = _normalize([output.pooler_output for output in outputs])
        return vectors[[distinct.index(prompt) for prompt in prompts]]


@checked
@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ImageEncoder:
    """A model of pictures alone, such as DINOv2: its vectors say how alike two pictures are, in subject and layout.

    `artaug.EmbeddingSimilarity` compares pictures by it, or by a `DualEncoder`.

    Raises:
        ModelError: for a model in training mode, or one that reads texts as well.
        InvalidValueError: if ``batch_size`` is below 1.
    """

    model: "PreTrainedModel" = field(repr=False)
    """A model of ``AutoModel`` that takes pictures and returns ``pooler_output``, such as ``Dinov2Model``."""
    image_processor: TransformersProcessor = field(repr=False)
    """Its image processor."""
    name: str = ""
    """The model's name in tables; its name or path if not given."""
    batch_size: int = field(default=DEFAULT_BATCH_SIZE, repr=False)
    """Pictures that go through the model together."""

    def __post_init__(self) -> None:
        check_model(self, model=self.model, batch_size=self.batch_size)
        if self.model.main_input_name != "pixel_values":
            raise ModelError(f"{type(self.model).__name__} reads more than pictures. Expected a model such as DINOv2.")
        if not self.name:
            object.__setattr__(self, "name", self.model.config.name_or_path)

    @classmethod
    def from_pretrained(cls, source: str = "facebook/dinov2-base", *, options: LoadOptions = DEFAULT_OPTIONS) -> Self:
        """Load the model.

        Raises:
            ModelError: if there is no model at ``source``, or its weights are pickled or incomplete.
        """
        from transformers import AutoModel  # noqa: PLC0415 - slow to load

        return cls(
            image_processor=load_image_processor(source, revision=options.revision),
            model=load_model(AutoModel, source, options),
            name=options.label(source),
            batch_size=options.batch_size or DEFAULT_BATCH_SIZE,
        )

    @property
    def models(self) -> Sequence[nn.Module]:
        """Its model, see `artaug.Scorer.models`."""
        return (self.model,)

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image]) -> Tensor:
        """A vector of length 1 for each picture: (pictures, features), float32, on the CPU.

        Raises:
            InvalidValueError: for an image without pixels, or of a mode without colours.
            ModelError: if the model gives no vector for the whole picture.
        """
        vectors = []
        for pixels in pixel_batches(self.image_processor, images, model=self.model, batch_size=self.batch_size):
            output = self.model(pixel_values=pixels)
            if getattr(output, "pooler_output", None) is None:
                raise ModelError(
                    f"{self.name} gives no pooler_output, a vector for the whole picture. Use a model that does, such "
                    "as DINOv2."
                )
            vectors.append(output.pooler_output)
        return _normalize(vectors)


def _normalize(batches: Sequence[Tensor]) -> Tensor:
    if not batches:
        return torch.zeros(0, 1)
    return torch.nn.functional.normalize(torch.cat(list(batches)).float().cpu(), dim=-1)


def _check_model_type(model_type: str, source: str) -> None:
    if model_type not in _MODEL_TYPES:
        raise ModelError(
            f"{source!r} is a {model_type!r} model. Expected one of {', '.join(_MODEL_TYPES)}, with both its towers."
        )
