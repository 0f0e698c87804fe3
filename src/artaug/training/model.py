"""The protocol of a model in training: a trainer uses nothing else of it, so one trainer serves every family."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self, TypeAlias, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor, nn

from artaug.errors import ModelError
from artaug.regional.denoiser import Conditioning, Denoiser
from artaug.tokens import InstalledTokens, Tokens
from artaug.training.noise_schedule import DecodedPictures, Latents, NoiseSchedule, Sigmas
from artaug.training.sampled_latents import SampledLatents

T = TypeVar("T")

Masks: TypeAlias = Float[Tensor, "batch height width"]
"""How much of every pixel is inside a mask, in [0, 1]: one row per picture."""


class Predictor(Protocol):
    """A denoiser as a single step uses it: everything is encoded, and there is one size."""

    @property
    def module(self) -> nn.Module:
        """The denoiser, which gets the adapters and is frozen otherwise."""

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """How the model's pictures are noised, and what the denoiser predicts."""

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes."""

    def predict(self, noisy: Latents, sigmas: Sigmas, conditioning: Conditioning) -> Latents:
        """The denoiser's output for noisy latents at noise levels ``sigmas`` (batch,) in [0, 1]."""


class DiffusionModel(Predictor, Protocol):
    """A denoiser with its encoders, as a training uses it."""

    def at_size(self, width: int, height: int) -> Self:
        """The same model, set to pictures of another size in pixels.

        Raises:
            ModelError: for a size it does not take.
        """

    def without_encoders(self) -> AbstractContextManager[None]:
        """A ``with`` block in which nothing is encoded, so the memory of the encoders can be used otherwise."""

    def without_denoiser(self) -> AbstractContextManager[None]:
        """A ``with`` block in which nothing is predicted, so the denoiser's memory can be used to encode."""

    def encode_images(self, images: Sequence[Image]) -> Latents:
        """Latents as the denoiser takes them, scaled, one row per picture, without gradient."""

    def encode_masks(self, masks: Masks) -> Latents:
        """How much of every latent is inside a mask, in [0, 1], in the layout of `encode_images`.

        A latent stands for a square of pixels, and gets their mean.

        Args:
            masks: float, of the size of the pictures.
        """

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encoded prompts, without gradient."""

    def initial_noise(self, seeds: Sequence[int], conditioning: Conditioning) -> Latents:
        """The noise that pictures of these seeds and encoded prompts are drawn from, in the layout of `encode_images`.

        It is standard normal, one row per seed, and a row is the same whatever others there are. Only a training with
        ``own_noise`` asks for it.
        """


@runtime_checkable
class Steerable(Protocol):
    """A model into which objectives can look, as every `artaug.diffusion.Family`: what `artaug.regional.GuidedRun` asks of it."""

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        """The denoiser as a guide sees it, in predictions for ``conditioning``."""

    def phrase_tokens(self, prompt: str, phrases: Sequence[str]) -> Sequence[tuple[int, ...]]:
        """Which tokens of the prompt's row in `DiffusionModel.encode_prompts` hold each phrase."""


@runtime_checkable
class Decoder(Protocol):
    """A model whose latents can be decoded in training, as those of every `artaug.diffusion.Family`."""

    def decode_latents(self, latents: Latents) -> DecodedPictures:
        """Pictures of latents as the denoiser takes them, with gradient to the latents and to no weight."""

    def decoding(self) -> AbstractContextManager[None]:
        """A ``with`` block like `DiffusionModel.without_encoders`, but for what `decode_latents` needs."""


def as_decoder(model: object) -> Decoder:
    """The model, if its latents can be decoded.

    Raises:
        ModelError: if they cannot.
    """
    if isinstance(model, Decoder):
        return model
    raise ModelError(
        f"the objective looks at pictures, and {type(model).__name__} has no `decode_latents` and `decoding`, as every "
        "artaug.diffusion.Family has: train another objective, or write them."
    )


@runtime_checkable
class ReadsTokens(Protocol):
    """A model whose text encoders can learn words, as every `artaug.diffusion.Family` that names its text encoders."""

    def installed(self, tokens: Tokens) -> AbstractContextManager[InstalledTokens]:
        """Let the text encoders, frozen, read these words in a ``with`` block; after it they are as before."""

    def encode_differentiably(self, prompts: Sequence[str]) -> Conditioning:
        """What `DiffusionModel.encode_prompts` returns, computed anew, with the gradient of the words that are installed."""


@runtime_checkable
class RemotelyTrainable(Protocol):
    """An owner of a model that is in another process, which trains it there."""

    def use(self, function: Callable[[Any, Callable[[object], None]], T], *, on_report: Callable[[Any], object]) -> T:
        """Call a function there, of the `Trainable` that has the model and of a function that reports to ``on_report`` here."""


@runtime_checkable
class Trainable(Protocol):
    """An owner of a model that can be trained: a `DiffusersSynthesizer`, for instance."""

    @property
    def fingerprint(self) -> str:
        """What decides its model's predictions beside its weights (applied LoRAs, guidance), the same in every process."""

    def training(self) -> AbstractContextManager[DiffusionModel]:
        """The model with the LoRAs that this synthesizer draws with, for the length of a ``with`` block."""


@runtime_checkable
class KeepsLatents(Trainable, Protocol):
    """A synthesizer whose trainings can learn from the latents that it sampled, as every `DiffusersSynthesizer`."""

    def keeping_latents(self, sampled: SampledLatents) -> Self:
        """A synthesizer that keeps there what it samples, and whose model has them as its attribute ``sampled``."""
