"""CLIP-IQA: which of two opposite texts a picture is nearer to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, final

from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug.errors import InvalidValueError
from artaug.scorers.encoders import DualEncoder
from artaug.scorers.loading import DEFAULT_OPTIONS, LoadOptions
from artaug.scoring import Scorer

if TYPE_CHECKING:
    from torch import nn

_LOGIT_SCALE = 100


@checked
@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ClipIQA(Scorer):
    """``softmax(100 cos(picture, positive), 100 cos(picture, negative))[0]``, in [0, 1] (Wang et al. 2023).

    The picture's own prompt is not used. The default texts measure quality; others measure other properties: "Sharp
    photo." and "Blurry photo.", "Natural photo." and "Synthetic photo.". This is CLIP-IQA on an unmodified CLIP, as
    torchmetrics has it for models by name; the paper removes the position embeddings of an RN50, whose scores differ.

    Raises:
        InvalidValueError: for a blank text, or two equal ones.

    Example:
        >>> from artaug.scorers import ClipIQA
        >>> quality = ClipIQA.from_pretrained("openai/clip-vit-base-patch16")  # doctest: +SKIP
    """

    encoder: DualEncoder
    """The CLIP, which other scorers can share."""
    positive: str = "Good photo."
    """The text of pictures with a high score."""
    negative: str = "Bad photo."
    """The text of pictures with a low score."""

    def __post_init__(self) -> None:
        if not self.positive.strip() or not self.negative.strip() or self.positive == self.negative:
            raise InvalidValueError(f"ClipIQA({self.positive!r}, {self.negative!r}): need two different texts.")

    @classmethod
    def from_pretrained(
        cls,
        source: str = "openai/clip-vit-base-patch16",
        *,
        positive: str = "Good photo.",
        negative: str = "Bad photo.",
        options: LoadOptions = DEFAULT_OPTIONS,
    ) -> Self:
        """Load the CLIP, as `DualEncoder.from_pretrained` does; the texts are the fields."""
        return cls(encoder=DualEncoder.from_pretrained(source, options=options), positive=positive, negative=negative)

    @property
    def name(self) -> str:
        return f"CLIP-IQA ({self.positive!r} or {self.negative!r}, {self.encoder.name})"

    @property
    def models(self) -> "Sequence[nn.Module]":
        return self.encoder.models

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        if not images:
            return []
        texts = self.encoder.embed_texts([self.positive, self.negative])
        logits = _LOGIT_SCALE * self.encoder.embed_images(images) @ texts.T  # (pictures, 2)
        return [float(probability) for probability in logits.softmax(dim=-1)[:, 0]]
