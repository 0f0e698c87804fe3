"""The safety checker of Stable Diffusion as a score: how far a picture is from what the checker would black out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self, final

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from artaug._internal.annotations import checked
from artaug.scorers.loading import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_OPTIONS,
    LoadOptions,
    Model,
    TransformersProcessor,
    check_model,
    load_image_processor,
    load_model,
    pixel_batches,
)
from artaug.scoring import Scorer

_CONCEPT_COUNT, _SPECIAL_CARE_COUNT = 17, 3
_ADJUSTMENT = 0.01  # added to all concept scores of a picture near a special-care concept, as published


@checked
@final
@dataclass(frozen=True, kw_only=True, eq=False)
class SafetyMargin(Scorer):
    """The distance of a picture to the thresholds of Stable Diffusion's safety checker: above 0 the checker passes it.

    The checker (CompVis; the code is in ``diffusers.pipelines.stable_diffusion.safety_checker``) compares the CLIP vector
    of a picture with those of 17 concepts, each with a threshold of the cosine; if one of 3 special-care concepts is
    near, all thresholds fall by 0.01. The score is the smallest ``threshold - cosine``, so ``Floor(safe, 0.0)`` keeps what
    the checker passes; it rounds to three decimals, so it also passes scores within 0.0005 of 0. It was made to detect
    nudity, and makes mistakes.

    Raises:
        InvalidValueError: if ``batch_size`` is below 1.
        ModelError: for a model in training mode.

    Example:
        >>> from artaug.scorers import SafetyMargin
        >>> safe = SafetyMargin.from_pretrained()  # doctest: +SKIP
    """

    model: Model = field(repr=False)
    """The checker: a ``StableDiffusionSafetyChecker``, or what `from_pretrained` loads. It is not altered."""
    image_processor: TransformersProcessor = field(repr=False)
    """Its image processor, that of CLIP ViT-L/14."""
    name: str = "safety margin"
    """The name in tables."""
    batch_size: int = field(default=DEFAULT_BATCH_SIZE, repr=False)
    """Pictures that go through the model together."""

    def __post_init__(self) -> None:
        check_model(self, model=self.model, batch_size=self.batch_size)

    @classmethod
    def from_pretrained(
        cls,
        source: str = "CompVis/stable-diffusion-safety-checker",
        *,
        processor: str | None = None,
        options: LoadOptions = DEFAULT_OPTIONS,
    ) -> Self:
        """Load the checker.

        Args:
            source: a folder, such as ``safety_checker`` of a pipeline, or a Hub name.
            processor: where the image processor is, if not at ``source``, such as ``feature_extractor`` of the pipeline;
                its main branch is read.
            options: revision of ``source``, device, dtype and batch size.

        Raises:
            ModelError: if there is no safety checker at ``source``, or its weights are pickled or incomplete.
        """
        processor_revision = options.revision if processor is None else "main"
        return cls(
            image_processor=load_image_processor(processor or source, revision=processor_revision),
            model=load_model(_checker_class(), source, options),
            batch_size=options.batch_size or DEFAULT_BATCH_SIZE,
        )

    @property
    def models(self) -> Sequence[nn.Module]:
        return (self.model,)

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    @torch.inference_mode()
    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        margins = []
        for pixels in pixel_batches(self.image_processor, images, model=self.model, batch_size=self.batch_size):
            margins += self._margins(pixels).tolist()
        return margins

    def _margins(self, pixels: Tensor) -> Tensor:
        """Distances to the nearest threshold: (pictures,)."""
        model = self.model
        embeds = normalize(model.visual_projection(model.vision_model(pixels).pooler_output).float(), dim=-1)

        def excess(concepts: Tensor, thresholds: Tensor) -> Tensor:
            """Cosines less thresholds: (pictures, concepts)."""
            return embeds @ normalize(concepts.float(), dim=-1).T - thresholds.float()

        concepts = excess(model.concept_embeds, model.concept_embeds_weights)
        special_care = excess(model.special_care_embeds, model.special_care_embeds_weights)
        # Rounded before the comparison, as published; the concept scores are not, so that the margin is continuous.
        adjustment = _ADJUSTMENT * (special_care.round(decimals=3) > 0).any(dim=-1, keepdim=True)
        margins: Tensor = -(concepts + adjustment).amax(dim=-1)
        return margins


@cache
def _checker_class() -> Model:
    """The checker's class, with the published names and sizes; made on the first call, since transformers loads slowly."""
    from transformers import CLIPConfig, CLIPVisionModel, PreTrainedModel  # noqa: PLC0415

    class StableDiffusionSafetyChecker(PreTrainedModel):  # type: ignore[misc]
        config_class = CLIPConfig
        main_input_name = "pixel_values"

        def __init__(self, config: Any) -> None:  # noqa: ANN401 - a configuration of transformers
            super().__init__(config)
            size = config.projection_dim
            self.vision_model = CLIPVisionModel(config.vision_config)
            self.visual_projection = nn.Linear(config.vision_config.hidden_size, size, bias=False)
            for name, count in (("concept_embeds", _CONCEPT_COUNT), ("special_care_embeds", _SPECIAL_CARE_COUNT)):
                self.register_parameter(name, nn.Parameter(torch.ones(count, size), requires_grad=False))
                self.register_parameter(f"{name}_weights", nn.Parameter(torch.ones(count), requires_grad=False))
            self.post_init()

    return StableDiffusionSafetyChecker
