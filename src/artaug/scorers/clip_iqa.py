"""CLIP-IQA: which of two opposite words a picture is nearer to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

import torch
from PIL.Image import Image

from artaug.errors import InvalidValueError
from artaug.scorers.encoders import DualEncoder
from artaug.scoring import Scorer

_SHARPNESS = 100


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ClipIQA(Scorer):
    """``softmax(100 cos(picture, wanted), 100 cos(picture, unwanted))``, the first of both, in [0, 1] (Wang et al. 2023).

    The prompt is not looked at. With the words left as they are it judges quality; others ask other things: "Sharp photo."
    and "Blurry photo.", "Natural photo." and "Synthetic photo.". This is CLIP-IQA on a CLIP as it is, as torchmetrics
    has it for models by name; the paper takes the position embeddings out of an RN50, whose scores are others.

    Raises:
        InvalidValueError: for a blank word, or twice the same.

    Example:
        >>> from artaug.scorers import ClipIQA
        >>> quality = ClipIQA.from_pretrained("openai/clip-vit-base-patch16", device="cuda")  # doctest: +SKIP
    """

    encoder: DualEncoder
    """The CLIP, which other scorers can share."""
    wanted: str = "Good photo."
    unwanted: str = "Bad photo."

    def __post_init__(self) -> None:
        if not self.wanted.strip() or not self.unwanted.strip() or self.wanted == self.unwanted:
            raise InvalidValueError(f"ClipIQA({self.wanted!r}, {self.unwanted!r}): need two different texts.")

    @classmethod
    def from_pretrained(
        cls,
        source: str = "openai/clip-vit-base-patch16",
        *,
        wanted: str = "Good photo.",
        unwanted: str = "Bad photo.",
        revision: str = "main",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> Self:
        """Load the CLIP; the other arguments and the errors are those of `DualEncoder.from_pretrained`.

        Args:
            source: a folder or a name on the Hub.
            wanted: the field.
            unwanted: the field.
            revision: of the CLIP.
            device: where to put it; None for the CPU.
            dtype: of its weights.
            batch_size: of the CLIP.
        """
        encoder = DualEncoder.from_pretrained(
            source, revision=revision, device=device, dtype=dtype, batch_size=batch_size
        )
        return cls(encoder=encoder, wanted=wanted, unwanted=unwanted)

    @property
    def name(self) -> str:
        return f"CLIP-IQA ({self.wanted!r} or {self.unwanted!r}, {self.encoder.name})"

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        if not images:
            return []
        words = self.encoder.embed_texts([self.wanted, self.unwanted])
        logits = _SHARPNESS * self.encoder.embed_images(images) @ words.T
        return [float(chance) for chance in logits.softmax(dim=-1)[:, 0]]
