"""What artaug has to know of a model family. Each family is one short file beside this one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL.Image import Image
from torch import Tensor, nn

from artaug.regional.guide import Conditioning, Denoiser
from artaug.training.noising import Noising


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

    pipeline: Any
    """The pipeline, an instance of ``pipeline_class``."""
    width: int
    """In pixels."""
    height: int
    """In pixels."""
    guidance_scale: float | None
    """Strength of guidance; None for what the family recommends."""
    true_cfg_scale: float
    """Strength of classifier-free guidance against a negative prompt; 1 is none."""
    max_sequence_length: int
    """Tokens of a prompt the model reads."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts as the pipeline itself would, without gradient, warning of every word that is cut."""

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
    def noising(self) -> Noising:
        """How pictures are noised in training, and what the denoiser predicts."""

    @abstractmethod
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """Latents as the denoiser takes them, scaled, float32, one row a picture, without gradient.

        Raises:
            ModelError: if a picture has another size.
        """

    @abstractmethod
    def predict(self, noisy: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output, in the type of ``noisy``, at noise levels ``sigmas`` (batch,) in [0, 1]."""
