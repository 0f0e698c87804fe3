"""Concept probability: the probability that a classifier gives to some classes, for safety and other concepts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self, final

import torch
from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug.errors import InvalidValueError, ModelError
from artaug.scorers.loading import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_OPTIONS,
    LoadOptions,
    TransformersProcessor,
    check_model,
    load_image_processor,
    load_model,
    pixel_batches,
)
from artaug.scoring import Scorer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@checked
@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ConceptProbability(Scorer):
    """The probability that a classifier gives to some of its classes, summed, in [0, 1]; of safe ones, for safety.

    Higher is better, as for every scorer, so name the classes you want: ``Floor(safe, 0.98)`` keeps only pairs whose
    second picture is safe with a probability of 98 %. A classifier knows only what it was trained on; the prompt is not
    used.

    Raises:
        InvalidValueError: without classes, for a class the model does not have, or ``batch_size`` below 1.
        ModelError: for a model in training mode, or a multi-label classifier.

    Example:
        >>> from artaug.scorers import ConceptProbability
        >>> safe = ConceptProbability.from_pretrained(  # doctest: +SKIP
        ...     "Falconsai/nsfw_image_detection", classes=("normal",)
        ... )
    """

    model: "PreTrainedModel" = field(repr=False)
    """A model of ``AutoModelForImageClassification``. It is not altered."""
    image_processor: TransformersProcessor = field(repr=False)
    """Its image processor."""
    classes: tuple[str, ...]
    """The classes whose probabilities are summed, as ``model.config.id2label`` calls them."""
    name: str = ""
    """The name in tables; the classes and the model if not given."""
    batch_size: int = field(default=DEFAULT_BATCH_SIZE, repr=False)
    """Pictures that go through the model together."""

    def __post_init__(self) -> None:
        check_model(self, model=self.model, batch_size=self.batch_size)
        config = self.model.config
        labels = [config.id2label[index] for index in sorted(config.id2label)]
        if not self.classes or len(set(self.classes)) < len(self.classes) or not set(self.classes) <= set(labels):
            raise InvalidValueError(f"ConceptProbability(classes={self.classes!r}): need one or more of {labels}.")
        if config.problem_type == "multi_label_classification":
            raise ModelError(
                f"{config.name_or_path!r} is a multi-label classifier, whose probabilities do not add up: need a single-label one."
            )
        if not self.name:
            object.__setattr__(self, "name", f"P({' or '.join(self.classes)}) ({config.name_or_path})")

    @classmethod
    def from_pretrained(cls, source: str, *, classes: tuple[str, ...], options: LoadOptions = DEFAULT_OPTIONS) -> Self:
        """Load a classifier.

        Args:
            source: a folder that ``save_pretrained`` wrote, or a Hub name.
            classes: the field.
            options: revision, device, dtype and batch size.

        Raises:
            ModelError: if there is no image classifier at ``source``, or its weights are pickled or incomplete.
        """
        from transformers import AutoModelForImageClassification  # noqa: PLC0415 - slow to load

        return cls(
            image_processor=load_image_processor(source, revision=options.revision),
            model=load_model(AutoModelForImageClassification, source, options),
            classes=classes,
            batch_size=options.batch_size or DEFAULT_BATCH_SIZE,
        )

    @property
    def models(self) -> "Sequence[nn.Module]":
        return (self.model,)

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    @torch.inference_mode()
    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        indices = [index for index, label in self.model.config.id2label.items() if label in self.classes]
        scores = []
        for pixels in pixel_batches(self.image_processor, images, model=self.model, batch_size=self.batch_size):
            probabilities = self.model(pixel_values=pixels).logits.float().softmax(dim=-1)
            scores += probabilities[:, indices].sum(dim=-1).tolist()
        return scores
