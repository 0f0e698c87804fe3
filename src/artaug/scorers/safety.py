"""The safety checker of Stable Diffusion as a number: how far a picture stays from what it would black out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self, final

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from artaug.scorers.loading import Model, Processor, checked, load_image_processor, load_model, pixels, shown, slices
from artaug.scoring import Scorer

_CONCEPTS, _CARES = 17, 3
_CAUTION = 0.01


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class SafetyMargin(Scorer):
    """How far below its thresholds the safety checker of Stable Diffusion sees a picture: above 0 it lets it pass.

    The checker (CompVis; the code is in ``diffusers.pipelines.stable_diffusion.safety_checker``) compares the CLIP vector
    of a picture with those of 17 concepts, each with a threshold of the cosine; where one of 3 further concepts is near,
    all thresholds fall by 0.01. The score is the smallest distance, so ``Floor(safe, 0.0)`` keeps what it would show;
    the checker rounds to three decimals, so what lies within 0.0005 of 0 it shows. It was made to look for nudity, and errs.

    Raises:
        InvalidValueError: if ``batch_size`` is below 1.
        ModelError: for a model in training mode.

    Example:
        >>> from artaug.scorers import SafetyMargin
        >>> safe = SafetyMargin.from_pretrained(device="cuda")  # doctest: +SKIP
    """

    model: Model = field(repr=False)
    """The checker: a ``StableDiffusionSafetyChecker``, or what `from_pretrained` loads. It is not altered."""
    image_processor: Processor = field(repr=False)
    """Its image processor, that of CLIP ViT-L/14."""
    name: str = "safety margin"
    """What tables call it."""
    batch_size: int = field(default=16, repr=False)
    """Pictures that go through the model together."""

    def __post_init__(self) -> None:
        checked(self, model=self.model, batch_size=self.batch_size)

    @classmethod
    def from_pretrained(
        cls,
        source: str = "CompVis/stable-diffusion-safety-checker",
        *,
        processor: str | None = None,
        revision: str = "main",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> Self:
        """Load the checker.

        Args:
            source: a folder, such as ``safety_checker`` of a pipeline, or a Hub name.
            processor: where the image processor is, if not at ``source``, such as ``feature_extractor`` of the pipeline.
            revision: branch, tag or commit of ``source``.
            device: where to put the model; None for the CPU.
            dtype: of the weights.
            batch_size: the field.

        Raises:
            ModelError: if there is no safety checker at ``source``, or its weights are pickled or incomplete.
        """
        beside = revision if processor is None else "main"
        return cls(
            image_processor=load_image_processor(processor or source, revision=beside),
            model=load_model(_checker(), source, revision=revision, device=device, dtype=dtype),
            batch_size=batch_size,
        )

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    @torch.inference_mode()
    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        pictures, margins = shown(images), []
        for part in slices(len(pictures), self.batch_size):
            margins += self._margins(pixels(self.image_processor, pictures[part], like=self.model)).tolist()
        return margins

    def _margins(self, pictures: Tensor) -> Tensor:
        """Distances from the nearest threshold: (pictures,)."""
        model = self.model
        seen = normalize(model.visual_projection(model.vision_model(pictures).pooler_output).float(), dim=-1)
        near, care = (
            seen @ normalize(embeds.float(), dim=-1).T - thresholds.float()
            for embeds, thresholds in (
                (model.concept_embeds, model.concept_embeds_weights),
                (model.special_care_embeds, model.special_care_embeds_weights),
            )
        )
        caution = _CAUTION * (care.round(decimals=3) > 0).any(dim=-1, keepdim=True)  # rounded, as published
        margins: Tensor = -(near + caution).amax(dim=-1)
        return margins


@cache
def _checker() -> Model:
    """The class of the checker, with the published names and sizes; made when first asked for, since transformers is slow."""
    from transformers import CLIPConfig, CLIPVisionModel, PreTrainedModel  # noqa: PLC0415

    class StableDiffusionSafetyChecker(PreTrainedModel):  # type: ignore[misc]
        config_class = CLIPConfig
        main_input_name = "pixel_values"

        def __init__(self, config: Any) -> None:  # noqa: ANN401 - a configuration of transformers
            super().__init__(config)
            size = config.projection_dim
            self.vision_model = CLIPVisionModel(config.vision_config)
            self.visual_projection = nn.Linear(config.vision_config.hidden_size, size, bias=False)
            for name, count in (("concept_embeds", _CONCEPTS), ("special_care_embeds", _CARES)):
                self.register_parameter(name, nn.Parameter(torch.ones(count, size), requires_grad=False))
                self.register_parameter(f"{name}_weights", nn.Parameter(torch.ones(count), requires_grad=False))
            self.post_init()

    return StableDiffusionSafetyChecker
