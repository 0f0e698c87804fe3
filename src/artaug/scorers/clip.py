"""CLIPScore and SigLIP: how well a picture fits its prompt."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, final

from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug.errors import ModelError
from artaug.scorers.encoders import DualEncoder
from artaug.scorers.loading import DEFAULT_OPTIONS, LoadOptions
from artaug.scoring import Scorer

if TYPE_CHECKING:
    from torch import nn


@checked
@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ClipScore(Scorer):
    """``100 max(cos(picture, prompt), 0)`` in the space of a CLIP, in [0, 100] (Hessel et al. 2021, their w = 100).

    The paper has w = 2.5 and puts "A photo depicts" before the prompt; 100 and the bare prompt are what most tables, and
    torchmetrics, report. Scores of different CLIPs do not compare, so the name says which: pictures that fit have about
    30 under ViT-B/32, 25 under ViT-L/14, 35 under ViT-H/14.

    Example:
        >>> from artaug.scorers import ClipScore, LoadOptions
        >>> score = ClipScore.from_pretrained(options=LoadOptions(batch_size=32))  # doctest: +SKIP
    """

    encoder: DualEncoder
    """The CLIP, which other scorers can share."""

    @classmethod
    def from_pretrained(
        cls, source: str = "openai/clip-vit-large-patch14", *, options: LoadOptions = DEFAULT_OPTIONS
    ) -> Self:
        """Load the CLIP; see `DualEncoder.from_pretrained`."""
        return cls(encoder=DualEncoder.from_pretrained(source, options=options))

    @property
    def name(self) -> str:
        return f"CLIPScore ({self.encoder.name})"

    @property
    def models(self) -> "Sequence[nn.Module]":
        return self.encoder.models

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        # "not cosine < 0" instead of max(cosine, 0), which would turn NaN into 0: NaN passes through and is reported.
        return [cosine * 100 if not cosine < 0 else 0.0 for cosine in self.encoder.cosines(images, prompts)]


@checked
@final
@dataclass(frozen=True, kw_only=True, eq=False)
class SiglipScore(Scorer):
    """``sigmoid(t cos(picture, prompt) + b)``, with t and b learned by a SigLIP (Zhai et al. 2023, eq. 1), in [0, 1].

    The probability that the prompt belongs to the picture, each pair by itself. It is strict: a picture that fits can
    have 0.01. Prompts are padded to the length the model was trained on (64 tokens) and read without a mask.

    Raises:
        ModelError: for an encoder that is not a SigLIP and so has no b.
    """

    encoder: DualEncoder
    """The SigLIP, or a SigLIP 2 of fixed resolution."""

    def __post_init__(self) -> None:
        if self.encoder.model.config.model_type != "siglip":
            raise ModelError(
                f"{self.encoder.name!r} is not a SigLIP, so its cosines are not probabilities. Use ClipScore."
            )

    @classmethod
    def from_pretrained(
        cls, source: str = "google/siglip-so400m-patch14-384", *, options: LoadOptions = DEFAULT_OPTIONS
    ) -> Self:
        """Load the SigLIP; see `DualEncoder.from_pretrained`."""
        return cls(encoder=DualEncoder.from_pretrained(source, options=options))

    @property
    def name(self) -> str:
        return f"SigLIP ({self.encoder.name})"

    @property
    def models(self) -> "Sequence[nn.Module]":
        return self.encoder.models

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        scale, bias = self.encoder.temperature, self.encoder.bias
        logits = [scale * cosine + bias for cosine in self.encoder.cosines(images, prompts)]
        # sigmoid(x) = (1 + tanh(x / 2)) / 2, which does not overflow for large negative x as exp(-x) does.
        return [0.5 * (1 + math.tanh(logit / 2)) for logit in logits]
