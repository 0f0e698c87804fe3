"""CLIPScore and SigLIP: how well a picture fits its words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

import torch
from PIL.Image import Image

from artaug.errors import ModelError
from artaug.scorers.encoders import DualEncoder
from artaug.scoring import Scorer


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ClipScore(Scorer):
    """``100 max(cos(picture, prompt), 0)`` in the space of a CLIP, in [0, 100] (Hessel et al. 2021, their w = 100).

    The paper has w = 2.5 and puts "A photo depicts" before the words; 100 and the bare words are what most tables, and
    torchmetrics, report. Scores of different CLIPs do not compare, so the name says which: fitting pictures have about
    30 under ViT-B/32, 25 under ViT-L/14, 35 under ViT-H/14.

    Example:
        >>> from artaug.scorers import ClipScore
        >>> score = ClipScore.from_pretrained("openai/clip-vit-large-patch14", device="cuda")  # doctest: +SKIP
    """

    encoder: DualEncoder
    """The CLIP, which other scorers can share."""

    @classmethod
    def from_pretrained(
        cls,
        source: str = "openai/clip-vit-large-patch14",
        *,
        revision: str = "main",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> Self:
        """Load the CLIP; arguments and errors are those of `DualEncoder.from_pretrained`."""
        return cls(
            encoder=DualEncoder.from_pretrained(
                source, revision=revision, device=device, dtype=dtype, batch_size=batch_size
            )
        )

    @property
    def name(self) -> str:
        return f"CLIPScore ({self.encoder.name})"

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        # NaN, which max() would hide, passes through to be caught.
        return [cosine * 100 if not cosine < 0 else 0.0 for cosine in self.encoder.cosines(images, prompts)]


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class SiglipScore(Scorer):
    """``sigmoid(t cos(picture, prompt) + b)``, t and b learnt by a SigLIP (Zhai et al. 2023, eq. 1), in [0, 1].

    The probability that the words belong to the picture, each pair by itself, and strict: 0.01 can be a fitting picture.
    Prompts are padded to the length the model was trained on (64 tokens) and read without a mask.

    Raises:
        ModelError: for an encoder that is no SigLIP, which has learnt no b.
    """

    encoder: DualEncoder
    """The SigLIP, or a SigLIP 2 of fixed resolution."""

    def __post_init__(self) -> None:
        if self.encoder.model.config.model_type != "siglip":
            raise ModelError(f"{self.encoder.name!r} is no SigLIP, so its cosines are no probabilities. Use ClipScore.")

    @classmethod
    def from_pretrained(
        cls,
        source: str = "google/siglip-so400m-patch14-384",
        *,
        revision: str = "main",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> Self:
        """Load the SigLIP; arguments and errors are those of `DualEncoder.from_pretrained`."""
        return cls(
            encoder=DualEncoder.from_pretrained(
                source, revision=revision, device=device, dtype=dtype, batch_size=batch_size
            )
        )

    @property
    def name(self) -> str:
        return f"SigLIP ({self.encoder.name})"

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        scale, bias = self.encoder.temperature, self.encoder.bias
        logits = [scale * cosine + bias for cosine in self.encoder.cosines(images, prompts)]
        return [_sigmoid(logit) for logit in logits]


def _sigmoid(logit: float) -> float:
    return 0.5 * (1 + math.tanh(logit / 2))
