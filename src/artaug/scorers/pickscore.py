"""PickScore: which of two pictures people would prefer for a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, final

from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug.scorers.encoders import DualEncoder
from artaug.scorers.loading import DEFAULT_OPTIONS, LoadOptions
from artaug.scoring import Scorer

if TYPE_CHECKING:
    from torch import nn

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""The CLIP that PickScore and HPSv2 were tuned from: their tokenizer, image processor and configuration."""


@checked
@final
@dataclass(frozen=True, kw_only=True, eq=False)
class PickScore(Scorer):
    """``exp(logit_scale) cos(picture, prompt)`` in a CLIP-H tuned on people's choices (Kirstain et al. 2023, eq. 1).

    About 18 to 24. Compare pictures of one prompt: with a gain g, people prefer the second picture with probability
    ``1 / (1 + exp(-g))``, so 0.2 is a moderate threshold and 1 a strong one.
    """

    encoder: DualEncoder
    """The tuned CLIP."""
    name: str = "PickScore"
    """The name in tables."""

    @classmethod
    def from_pretrained(
        cls,
        source: str = "yuvalkirstain/PickScore_v1",
        *,
        processor: str = CLIP_H,
        options: LoadOptions = DEFAULT_OPTIONS,
    ) -> Self:
        """Load the tuned CLIP, and the processor of the one it was tuned from; see `DualEncoder.from_pretrained`."""
        return cls(encoder=DualEncoder.from_pretrained(source, processor=processor, options=options))

    @property
    def models(self) -> "Sequence[nn.Module]":
        return self.encoder.models

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        return [self.encoder.temperature * cosine for cosine in self.encoder.cosines(images, prompts)]
