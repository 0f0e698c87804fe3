"""What a trainer knows of a model: nothing but this protocol, so one trainer serves every family."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias, runtime_checkable

from PIL.Image import Image
from torch import Tensor, nn

from artaug.training.noising import Latents, Levels, Noising

Conditioning: TypeAlias = Mapping[str, Tensor]
"""Encoded prompts, by the model's own names; the first axis of every tensor counts the prompts."""


class DiffusionModel(Protocol):
    """A denoiser and what surrounds it, seen from a training step."""

    @property
    def module(self) -> nn.Module:
        """The denoiser: it takes the adapters, and is frozen otherwise."""

    @property
    def noising(self) -> Noising:
        """How the model's pictures are noised, and what the denoiser predicts."""

    def encode_images(self, images: Sequence[Image]) -> Latents:
        """Latents as the denoiser takes them, scaled, one row a picture, without gradient."""

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encoded prompts, without gradient."""

    def predict(self, noisy: Latents, sigmas: Levels, conditioning: Conditioning) -> Latents:
        """The denoiser's output for noisy latents at noise levels ``sigmas`` (batch,) in [0, 1]."""


@runtime_checkable
class Trainable(Protocol):
    """Something that lends its model to a trainer: a `DiffusersSynthesizer`, for instance."""

    def training(self) -> AbstractContextManager[DiffusionModel]:
        """Lend the model, wearing the LoRAs this synthesizer draws with, for the length of a ``with`` block."""
