"""How a model's pictures are noised, what its denoiser predicts, and what a pair of pictures makes of that.

Everything here is a formula on tensors: no model, no device, no schedule but the one the formula needs. Throughout,
``sigmas`` has shape (batch,), one noise level a row, and the other tensors share one shape (batch, ...).
"""

import math
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from artaug.errors import InvalidValueError

Latents: TypeAlias = Float[Tensor, " batch *latent"]
"""Latents, noise or predictions: one row a picture."""
Levels: TypeAlias = Float[Tensor, " batch"]
"""Noise levels in [0, 1]: one a picture."""

EVERY_LEVEL = (0.0, 1.0)


class Noising(Protocol):
    """The prediction type of a model: `FlowMatching`, `EpsilonPrediction` or `VPrediction`."""

    def levels(self, count: int, generator: torch.Generator, *, within: tuple[float, float] = EVERY_LEVEL) -> Levels:
        """Draw noise levels to train at: float32 on the CPU, shape (count,), in (0, 1] and in ``within``.

        Raises:
            InvalidValueError: if the model has no noise level in ``within``.
        """

    def mix(self, clean: Latents, noise: Latents, sigmas: Levels) -> Latents:
        """Noise clean latents."""

    def target(self, clean: Latents, noise: Latents, sigmas: Levels) -> Latents:
        """What the denoiser should predict for ``mix(clean, noise, sigmas)``."""

    def clean(self, noisy: Latents, prediction: Latents, sigmas: Levels) -> Latents:
        """The clean latents a prediction stands for."""

    def paired_target(self, prediction: Latents, difference: Latents, sigmas: Levels) -> Latents:
        """What to predict at the noisy *after* latents, so that the clean estimate moves by exactly ``difference``.

        Args:
            prediction: the teacher's prediction at the noisy *before* latents, with the same noise and level.
            difference: clean after minus clean before.
            sigmas: noise levels.
        """


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """Rectified flow, as in FLUX and SD3: ``z = (1 - sigma) x + sigma noise``, and the denoiser predicts ``noise - x``.

    Raises:
        InvalidValueError: unless the shift is positive and finite.

    >>> import torch
    >>> from artaug.training import FlowMatching
    >>> clean, noise, sigmas = torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([0.25])
    >>> FlowMatching().mix(clean, noise, sigmas), FlowMatching().target(clean, noise, sigmas)
    (tensor([[0.2500, 0.2500]]), tensor([[1., 1.]]))
    """

    shift: float = 1.0
    """Pushes levels towards noise: ``sigma' = shift sigma / (1 + (shift - 1) sigma)``; the model's sampler names it."""
    logit_normal: bool = False
    """Draw levels as the sigmoid of a standard normal before the shift, favouring the middle; else uniformly."""

    def __post_init__(self) -> None:
        if not (self.shift > 0 and math.isfinite(self.shift)):
            raise InvalidValueError(
                f"FlowMatching(shift={self.shift}): need a finite shift above 0; 1 leaves levels be."
            )

    def levels(self, count: int, generator: torch.Generator, *, within: tuple[float, float] = EVERY_LEVEL) -> Levels:
        low, high = _checked(within)
        bounds = torch.tensor([low, high], dtype=torch.float64)
        bounds = bounds / (self.shift - (self.shift - 1) * bounds)
        if self.logit_normal:
            bounds = torch.special.ndtr(torch.logit(bounds))
        share = 1 - torch.rand(count, generator=generator, dtype=torch.float64)  # (0, 1]: no picture without noise
        quantiles = bounds[0] + (bounds[1] - bounds[0]) * share
        unshifted = torch.sigmoid(torch.special.ndtri(quantiles)) if self.logit_normal else quantiles
        shifted = self.shift * unshifted / (1 + (self.shift - 1) * unshifted)
        return shifted.clamp(low, high).float()

    def mix(self, clean: Latents, noise: Latents, sigmas: Levels) -> Latents:
        sigma = _rows(sigmas, clean)
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: Latents, noise: Latents, sigmas: Levels) -> Latents:
        return noise - clean

    def clean(self, noisy: Latents, prediction: Latents, sigmas: Levels) -> Latents:
        return noisy - _rows(sigmas, noisy) * prediction

    def paired_target(self, prediction: Latents, difference: Latents, sigmas: Levels) -> Latents:
        return prediction - difference


@dataclass(frozen=True, kw_only=True)
class EpsilonPrediction:
    """Variance-preserving noise, as in SD 1.5 and SDXL: ``z = alpha x + sigma noise``, and the denoiser predicts the noise.

    ``alpha = sqrt(1 - sigma^2)``. The levels are those of the scaled-linear beta schedule.

    >>> import torch
    >>> from artaug.training import EpsilonPrediction
    >>> EpsilonPrediction().paired_target(torch.ones(1, 2), torch.full((1, 2), 9.0), torch.tensor([0.5]))
    tensor([[1., 1.]])
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    timesteps: int = 1000

    def __post_init__(self) -> None:
        _check_schedule(self)

    def levels(self, count: int, generator: torch.Generator, *, within: tuple[float, float] = EVERY_LEVEL) -> Levels:
        return _drawn(_scaled_linear(self.beta_start, self.beta_end, self.timesteps), count, generator, within=within)

    def mix(self, clean: Latents, noise: Latents, sigmas: Levels) -> Latents:
        return _preserving_variance(clean, noise, sigmas)

    def target(self, clean: Latents, noise: Latents, sigmas: Levels) -> Latents:
        return noise

    def clean(self, noisy: Latents, prediction: Latents, sigmas: Levels) -> Latents:
        return (noisy - _rows(sigmas, noisy) * prediction) / _alphas(sigmas, noisy)

    def paired_target(self, prediction: Latents, difference: Latents, sigmas: Levels) -> Latents:
        return prediction


@dataclass(frozen=True, kw_only=True)
class VPrediction:
    """Variance-preserving noise, as in SD 2: ``z = alpha x + sigma noise``, and the denoiser predicts ``alpha noise - sigma x``.

    ``alpha = sqrt(1 - sigma^2)``. The levels are those of the scaled-linear beta schedule.

    >>> import torch
    >>> from artaug.training import VPrediction
    >>> VPrediction().paired_target(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([0.5]))
    tensor([[0.5000, 0.5000]])
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    timesteps: int = 1000

    def __post_init__(self) -> None:
        _check_schedule(self)

    def levels(self, count: int, generator: torch.Generator, *, within: tuple[float, float] = EVERY_LEVEL) -> Levels:
        return _drawn(_scaled_linear(self.beta_start, self.beta_end, self.timesteps), count, generator, within=within)

    def mix(self, clean: Latents, noise: Latents, sigmas: Levels) -> Latents:
        return _preserving_variance(clean, noise, sigmas)

    def target(self, clean: Latents, noise: Latents, sigmas: Levels) -> Latents:
        return _alphas(sigmas, clean) * noise - _rows(sigmas, clean) * clean

    def clean(self, noisy: Latents, prediction: Latents, sigmas: Levels) -> Latents:
        return _alphas(sigmas, noisy) * noisy - _rows(sigmas, noisy) * prediction

    def paired_target(self, prediction: Latents, difference: Latents, sigmas: Levels) -> Latents:
        return prediction - _rows(sigmas, prediction) * difference


def _rows(sigmas: Tensor, like: Tensor) -> Tensor:
    """Noise levels as a tensor that multiplies the rows of ``like``."""
    return sigmas.to(like).reshape(-1, *(1,) * (like.ndim - 1))


def _alphas(sigmas: Tensor, like: Tensor) -> Tensor:
    return (1 - _rows(sigmas, like) ** 2).sqrt()


def _preserving_variance(clean: Latents, noise: Latents, sigmas: Levels) -> Latents:
    return _alphas(sigmas, clean) * clean + _rows(sigmas, clean) * noise


def _check_schedule(noising: EpsilonPrediction | VPrediction) -> None:
    if not (0 < noising.beta_start <= noising.beta_end < 1 and noising.timesteps >= 1):
        raise InvalidValueError(f"{noising}: need 0 < beta_start <= beta_end < 1 and at least one timestep.")


def _scaled_linear(start: float, end: float, timesteps: int) -> Tensor:
    """Noise levels ``sqrt(1 - prod(1 - beta))`` of the schedule whose square-root betas are evenly spaced."""
    betas = torch.linspace(math.sqrt(start), math.sqrt(end), timesteps, dtype=torch.float64) ** 2
    return (1 - (1 - betas).cumprod(0)).sqrt()


def _drawn(schedule: Tensor, count: int, generator: torch.Generator, *, within: tuple[float, float]) -> Tensor:
    low, high = _checked(within)
    eligible = schedule[(schedule >= low) & (schedule <= high)]
    if len(eligible) == 0:
        raise InvalidValueError(
            f"no noise level of this model lies in [{low}, {high}]: they run from {schedule[0]:.4f} to {schedule[-1]:.4f}."
        )
    return eligible[torch.randint(len(eligible), (count,), generator=generator)].float()


def _checked(within: tuple[float, float]) -> tuple[float, float]:
    low, high = within
    if not 0 <= low < high <= 1:
        raise InvalidValueError(f"noise levels within {within} are none: need 0 <= lowest < highest <= 1.")
    return within
