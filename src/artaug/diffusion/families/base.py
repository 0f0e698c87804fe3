"""What artaug has to know of a model family. Each family is one short file beside this one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from PIL.Image import Image
from torch import Tensor, nn

from artaug.diffusion.offload import encoders_of, on_cpu
from artaug.plan import Plan, Region
from artaug.regional.denoiser import Conditioning, Denoiser, EncodedPrompt
from artaug.regional.guide import EncodedRegion
from artaug.training.noise_schedule import NoiseSchedule


@dataclass(frozen=True, kw_only=True, eq=False)
class Family(ABC):
    """A diffusers pipeline of one kind, set to draw at one size: how to ask it, how to guide it, how to train it.

    To a trainer it is a `DiffusionModel`, to a synthesizer it is also the way to call the pipeline, to a guide it lends
    a `Denoiser`. For a pipeline artaug does not know, subclass it and hand the class to
    ``DiffusersSynthesizer(pipeline=..., family=...)``.

    Raises:
        ModelError: by a subclass's ``__post_init__``, for a size or an option its pipeline cannot work with.
    """

    pipeline_class: ClassVar[type]
    """The diffusers class whose pipelines this family is for."""
    usual_length: ClassVar[int] = 512
    """Tokens of a prompt it reads unless told otherwise."""

    pipeline: Any
    """The pipeline, an instance of ``pipeline_class``."""
    width: int
    """In pixels."""
    height: int
    """In pixels."""
    guidance_scale: float | None
    """Strength of guidance, distilled or classifier-free as the model has it; None for what the family recommends."""
    negative_prompt: str | None
    """What not to draw; None for what the family takes when nothing is said."""
    true_cfg_scale: float
    """Strength of classifier-free guidance in a model whose ``guidance_scale`` is something else; 1 is none."""
    max_sequence_length: int
    """Tokens of a prompt the model reads."""

    @property
    @abstractmethod
    def negative(self) -> str | None:
        """The prompt that classifier-free guidance leads away from, or None where a run has no such guidance."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts as the pipeline itself would, without gradient, warning of every word that is cut."""

    @abstractmethod
    def token_slices(self, prompts: Sequence[str]) -> list[slice]:
        """Where the tokens of each prompt are in a row of what `encode_prompts` gives; the rest is padding."""

    def encode_texts(self, prompts: Sequence[str]) -> list[EncodedPrompt]:
        """Encode prompts one by one, for regions."""
        return [EncodedPrompt(self.encode_prompts([prompt]), self.token_slices([prompt])[0]) for prompt in prompts]

    def encode_regions(self, plans: Sequence[Plan]) -> list[list[EncodedRegion]]:
        """Every plan's regions with their prompts encoded, each prompt once."""
        regions = [region for plan in plans for region in plan.regions]
        spoken = [*(region.prompt for region in regions), *(region.negative_prompt for region in regions)]
        prompts = list(dict.fromkeys(prompt for prompt in spoken if prompt is not None))
        texts = dict(zip(prompts, self.encode_texts(prompts), strict=True))

        def encoded(region: Region) -> EncodedRegion:
            negative = None if region.negative_prompt is None else texts[region.negative_prompt]
            return EncodedRegion(region, texts[region.prompt], negative)

        return [[encoded(region) for region in plan.regions] for plan in plans]

    @abstractmethod
    def arguments(self, conditioning: Conditioning, negative: Conditioning | None) -> Mapping[str, Any]:
        """Arguments for the pipeline's call: all that is this family's own, sizes, steps and seeds left out."""

    @abstractmethod
    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        """The denoiser as a guide sees it, in the run that draws with ``conditioning``."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The denoiser itself, the part LoRAs go on."""

    @property
    @abstractmethod
    def noise_schedule(self) -> NoiseSchedule:
        """How pictures are noised in training, and what the denoiser predicts."""

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes, also when it is offloaded."""
        device: torch.device = self.pipeline._execution_device  # noqa: SLF001 - .device is wrong under offload
        return device

    def at_size(self, width: int, height: int) -> Self:
        """The same pipeline, set to another size."""
        return self if (width, height) == (self.width, self.height) else replace(self, width=width, height=height)

    def without_encoders(self) -> AbstractContextManager[None]:
        """A ``with`` block in which VAE and text encoders wait on the CPU, if the pipeline's owner put them elsewhere."""
        return on_cpu(encoders_of(self.pipeline))

    def without_denoiser(self) -> AbstractContextManager[None]:
        """A ``with`` block in which the denoiser waits on the CPU, if it was elsewhere and its libraries let it move."""
        return on_cpu([self.module])

    @abstractmethod
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """Latents as the denoiser takes them, scaled, float32, one row a picture, without gradient.

        Raises:
            ModelError: if a picture has another size.
        """

    @abstractmethod
    def encode_masks(self, masks: Tensor) -> Tensor:
        """How much of every latent is meant, where ``masks`` (batch, height, width) says it of every pixel, in [0, 1].

        Laid out as `encode_images` lays out latents, float32: the mean over the pixels a latent stands for.

        Raises:
            ModelError: if the masks have another size than the pictures.
            InvalidValueError: if a value is outside [0, 1].
        """

    @abstractmethod
    def predict(self, noisy: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output, in the type of ``noisy``, at noise levels ``sigmas`` (batch,) in [0, 1]."""
