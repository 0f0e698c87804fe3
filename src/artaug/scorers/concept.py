"""Safety and other concepts: how sure a classifier is that a picture is of a class."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self, final

import torch
from PIL.Image import Image

from artaug.errors import InvalidValueError, ModelError
from artaug.scorers.loading import Processor, checked, load_image_processor, load_model, pixels, shown, slices
from artaug.scoring import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ConceptProbability(Scorer):
    """The probability a classifier gives to some of its classes, summed, in [0, 1]: of safe ones, for a safety scorer.

    Higher is better, as for every scorer, so name the classes you want: with ``Floor(safe, 0.98)`` only pairs survive
    whose second picture is safe with 98 %. A classifier knows what it was trained on and no more; the prompt is not
    looked at.

    Raises:
        InvalidValueError: for no class, one the model does not have, or ``batch_size`` below 1.
        ModelError: for a model in training mode, or one whose classes do not exclude each other.

    Example:
        >>> from artaug.scorers import ConceptProbability
        >>> safe = ConceptProbability.from_pretrained(  # doctest: +SKIP
        ...     "Falconsai/nsfw_image_detection", classes=("normal",)
        ... )
    """

    model: "PreTrainedModel" = field(repr=False)
    """A model of ``AutoModelForImageClassification``. It is not altered."""
    image_processor: Processor = field(repr=False)
    """Its image processor."""
    classes: tuple[str, ...]
    """The classes that are wanted, as ``model.config.id2label`` calls them."""
    name: str = ""
    """What tables call it; the classes and the model if not given."""
    batch_size: int = field(default=16, repr=False)
    """Pictures that go through the model together."""

    def __post_init__(self) -> None:
        checked(self, model=self.model, batch_size=self.batch_size)
        config = self.model.config
        known = [config.id2label[number] for number in sorted(config.id2label)]
        if not self.classes or len(set(self.classes)) < len(self.classes) or not set(self.classes) <= set(known):
            raise InvalidValueError(f"ConceptProbability(classes={self.classes!r}): need one or more of {known}.")
        if config.problem_type == "multi_label_classification":
            raise ModelError(
                f"the classes of {config.name_or_path!r} do not exclude each other: need one that chooses."
            )
        if not self.name:
            object.__setattr__(self, "name", f"P({' or '.join(self.classes)}) ({config.name_or_path})")

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        classes: tuple[str, ...],
        revision: str = "main",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> Self:
        """Load a classifier.

        Args:
            source: a folder that ``save_pretrained`` wrote, or a Hub name.
            classes: the field.
            revision: branch, tag or commit on the Hub.
            device: where to put the model; None for the CPU.
            dtype: of the weights.
            batch_size: the field.

        Raises:
            ModelError: if there is no image classifier at ``source``, or its weights are pickled or incomplete.
        """
        from transformers import AutoModelForImageClassification  # noqa: PLC0415 - slow to load

        return cls(
            image_processor=load_image_processor(source, revision=revision),
            model=load_model(AutoModelForImageClassification, source, revision=revision, device=device, dtype=dtype),
            classes=classes,
            batch_size=batch_size,
        )

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    @torch.inference_mode()
    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        wanted = [number for number, label in self.model.config.id2label.items() if label in self.classes]
        pictures, chances = shown(images), []
        for part in slices(len(pictures), self.batch_size):
            logits = self.model(pixel_values=pixels(self.image_processor, pictures[part], like=self.model)).logits
            chances += logits.float().softmax(dim=-1)[:, wanted].sum(dim=-1).tolist()
        return chances
