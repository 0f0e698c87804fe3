"""How a model's pictures are noised, what its denoiser predicts, and what a pair of pictures makes of that.

Everything here is a formula on tensors: no model, no device, no schedule but the one the formula needs. Throughout,
``sigmas`` has shape (batch,), one noise level a row, and the other tensors share one shape (batch, ...).
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from artaug.errors import InvalidValueError

Latents: TypeAlias = Float[Tensor, " batch *latent"]
"""Latents, noise or predictions: one row a picture."""
Sigmas: TypeAlias = Float[Tensor, " batch"]
"""Noise levels in [0, 1]: one a picture."""

ALL_SIGMAS = (0.0, 1.0)


class NoiseSchedule(Protocol):
    """The prediction type of a model: `FlowMatching`, `EpsilonPrediction` or `VPrediction`."""

    def sample_sigmas(
        self, count: int, generator: torch.Generator, *, sigma_range: tuple[float, float] = ALL_SIGMAS
    ) -> Sigmas:
        """Draw noise levels to train at: float32 on the CPU, shape (count,), in (0, 1] and in ``sigma_range``.

        Raises:
            InvalidValueError: if the model has no noise level in ``sigma_range``.
        """

    def add_noise(self, clean: Latents, noise: Latents, sigmas: Sigmas) -> Latents:
        """Noise clean latents."""

    def target(self, clean: Latents, noise: Latents, sigmas: Sigmas) -> Latents:
        """What the denoiser should predict for ``add_noise(clean, noise, sigmas)``."""

    def predict_x0(self, noisy: Latents, prediction: Latents, sigmas: Sigmas) -> Latents:
        """The clean latents a prediction stands for."""

    def paired_target(self, prediction: Latents, difference: Latents, sigmas: Sigmas) -> Latents:
        """What to predict at the noisy *after* latents, so that the clean estimate moves by exactly ``difference``.

        Args:
            prediction: the teacher's prediction at the noisy *before* latents, with the same noise and level.
            difference: clean after minus clean before.
            sigmas: noise levels.
        """


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """Rectified flow, as in FLUX and SD3: ``z = (1 - sigma) x + sigma noise``, and the denoiser predicts ``noise - x``.

    Sigmas are drawn uniformly or logit-normally (arXiv 2403.03206, section 3.1, with location 0 and scale 1), then shifted
    as for pictures of this size (there, "resolution-dependent shifting"), then stretched to where the sampler ends. Drawn
    uniformly, they are where a sampler of many steps looks, each as often; a shifted logit-normal level has a normal
    logit with mean ``log(shift)``, which is how SD3 itself was trained.

    Raises:
        InvalidValueError: unless the shift is positive and finite, and the terminal in [0, 1).

    >>> import torch
    >>> from artaug.training import FlowMatching
    >>> clean, noise, sigmas = torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([0.25])
    >>> FlowMatching().add_noise(clean, noise, sigmas), FlowMatching().target(clean, noise, sigmas)
    (tensor([[0.2500, 0.2500]]), tensor([[1., 1.]]))
    """

    shift: float = 1.0
    """Pushes levels towards noise: ``sigma' = shift sigma / (1 + (shift - 1) sigma)``; the model's sampler names it."""
    logit_normal: bool = False
    """Draw levels as the sigmoid of a standard normal before the shift, favouring the middle; else uniformly."""
    shift_terminal: float = 0.0
    """Where a sampler's levels end before they fall to zero: ``sigma'' = 1 - (1 - terminal) (1 - sigma')``."""

    def __post_init__(self) -> None:
        if not (self.shift > 0 and math.isfinite(self.shift)):
            raise InvalidValueError(
                f"FlowMatching(shift={self.shift}): need a finite shift above 0; 1 leaves levels be."
            )
        if not 0 <= self.shift_terminal < 1:
            raise InvalidValueError(
                f"FlowMatching(shift_terminal={self.shift_terminal}): need a noise level in [0, 1); 0 leaves levels be."
            )

    def sample_sigmas(
        self, count: int, generator: torch.Generator, *, sigma_range: tuple[float, float] = ALL_SIGMAS
    ) -> Sigmas:
        low, high = _checked(sigma_range)
        if high <= self.shift_terminal:
            raise InvalidValueError(
                f"no noise level of this model lies in [{low}, {high}]: they run from {self.shift_terminal} to 1."
            )
        bounds = (1 - (1 - torch.tensor([low, high], dtype=torch.float64)) / (1 - self.shift_terminal)).clamp(min=0)
        bounds = bounds / (self.shift - (self.shift - 1) * bounds)
        if self.logit_normal:
            bounds = torch.special.ndtr(torch.logit(bounds))
        share = 1 - torch.rand(count, generator=generator, dtype=torch.float64)  # (0, 1]: no picture without noise
        quantiles = bounds[0] + (bounds[1] - bounds[0]) * share
        unshifted = torch.sigmoid(torch.special.ndtri(quantiles)) if self.logit_normal else quantiles
        shifted = self.shift * unshifted / (1 + (self.shift - 1) * unshifted)
        return (1 - (1 - self.shift_terminal) * (1 - shifted)).clamp(low, high).float()

    def add_noise(self, clean: Latents, noise: Latents, sigmas: Sigmas) -> Latents:
        sigma = _rows(sigmas, clean)
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: Latents, noise: Latents, sigmas: Sigmas) -> Latents:
        return noise - clean

    def predict_x0(self, noisy: Latents, prediction: Latents, sigmas: Sigmas) -> Latents:
        return noisy - _rows(sigmas, noisy) * prediction

    def paired_target(self, prediction: Latents, difference: Latents, sigmas: Sigmas) -> Latents:
        return prediction - difference


BetaSchedule: TypeAlias = Literal["scaled_linear", "linear", "squaredcos_cap_v2"]
"""How the variances of the noise that each timestep adds grow, by the names diffusers gives."""


@dataclass(frozen=True, kw_only=True)
class _VariancePreserving:
    """What epsilon and v-prediction have in common: ``z = alpha x + sigma noise`` with ``alpha^2 + sigma^2 = 1``."""

    beta_start: float = 0.00085
    """The first timestep's beta; the cosine schedule, ``squaredcos_cap_v2``, has none."""
    beta_end: float = 0.012
    """The last one's, likewise."""
    num_train_timesteps: int = 1000
    beta_schedule: BetaSchedule = "scaled_linear"

    def __post_init__(self) -> None:
        if self.beta_schedule not in get_args(BetaSchedule):
            raise InvalidValueError(f"{self}: need a schedule among {list(get_args(BetaSchedule))}.")
        if not (0 < self.beta_start <= self.beta_end < 1 and self.num_train_timesteps >= 1):
            raise InvalidValueError(f"{self}: need 0 < beta_start <= beta_end < 1 and at least one timestep.")

    def sample_sigmas(
        self, count: int, generator: torch.Generator, *, sigma_range: tuple[float, float] = ALL_SIGMAS
    ) -> Sigmas:
        low, high = _checked(sigma_range)
        known = (1 - self._alphas_of_timesteps() ** 2).sqrt()
        eligible = known[(known >= low) & (known <= high)]
        if len(eligible) == 0:
            raise InvalidValueError(
                f"no noise level of this model lies in [{low}, {high}]: they run from {known[0]:.4f} to {known[-1]:.4f}."
            )
        return eligible[torch.randint(len(eligible), (count,), generator=generator)].float()

    def add_noise(self, clean: Latents, noise: Latents, sigmas: Sigmas) -> Latents:
        return _alphas(sigmas, clean) * clean + _rows(sigmas, clean) * noise

    def _alphas_of_timesteps(self) -> Tensor:
        """``sqrt(prod(1 - beta))`` of every timestep."""
        return (1 - _betas(self)).cumprod(0).sqrt()


@dataclass(frozen=True, kw_only=True)
class EpsilonPrediction(_VariancePreserving):
    """Variance-preserving noise, as in SD 1.5 and SDXL: ``z = alpha x + sigma noise``, and the denoiser predicts the noise.

    ``alpha = sqrt(1 - sigma^2)``; a level is that of a timestep, each drawn as often.

    Raises:
        InvalidValueError: for a schedule that is none.

    >>> import torch
    >>> from artaug.training import EpsilonPrediction
    >>> EpsilonPrediction().paired_target(torch.ones(1, 2), torch.full((1, 2), 9.0), torch.tensor([0.5]))
    tensor([[1., 1.]])
    """

    def target(self, clean: Latents, noise: Latents, sigmas: Sigmas) -> Latents:
        return noise

    def predict_x0(self, noisy: Latents, prediction: Latents, sigmas: Sigmas) -> Latents:
        return (noisy - _rows(sigmas, noisy) * prediction) / _alphas(sigmas, noisy)

    def paired_target(self, prediction: Latents, difference: Latents, sigmas: Sigmas) -> Latents:
        return prediction


@dataclass(frozen=True, kw_only=True)
class VPrediction(_VariancePreserving):
    """Variance-preserving noise, as in SD 2: ``z = alpha x + sigma noise``, and the denoiser predicts ``alpha noise - sigma x``.

    ``alpha = sqrt(1 - sigma^2)``; a level is that of a timestep, each drawn as often.

    Raises:
        InvalidValueError: for a schedule that is none.

    >>> import torch
    >>> from artaug.training import VPrediction
    >>> VPrediction().paired_target(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([0.5]))
    tensor([[0.5000, 0.5000]])
    """

    rescale_betas_zero_snr: bool = False
    """Whether the last timestep is noise and nothing else: alphas are rescaled to end at 0 (arXiv 2305.08891, algorithm
    1). No such thing for `EpsilonPrediction`: of pure noise, the noise says nothing about a picture."""

    def target(self, clean: Latents, noise: Latents, sigmas: Sigmas) -> Latents:
        return _alphas(sigmas, clean) * noise - _rows(sigmas, clean) * clean

    def predict_x0(self, noisy: Latents, prediction: Latents, sigmas: Sigmas) -> Latents:
        return _alphas(sigmas, noisy) * noisy - _rows(sigmas, noisy) * prediction

    def paired_target(self, prediction: Latents, difference: Latents, sigmas: Sigmas) -> Latents:
        return prediction - _rows(sigmas, prediction) * difference

    def _alphas_of_timesteps(self) -> Tensor:
        alphas = super()._alphas_of_timesteps()
        if not self.rescale_betas_zero_snr:
            return alphas
        return (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))


def _rows(sigmas: Tensor, like: Tensor) -> Tensor:
    """Noise levels as a tensor that multiplies the rows of ``like``."""
    return sigmas.to(like).reshape(-1, *(1,) * (like.ndim - 1))


def _alphas(sigmas: Tensor, like: Tensor) -> Tensor:
    return (1 - _rows(sigmas, like) ** 2).sqrt()


def _betas(noise_schedule: _VariancePreserving) -> Tensor:
    """The variance of the noise that each timestep adds, as diffusers' schedulers make it."""
    count = noise_schedule.num_train_timesteps
    if noise_schedule.beta_schedule == "linear":
        return torch.linspace(noise_schedule.beta_start, noise_schedule.beta_end, count, dtype=torch.float64)
    if noise_schedule.beta_schedule == "scaled_linear":
        ends = math.sqrt(noise_schedule.beta_start), math.sqrt(noise_schedule.beta_end)
        return torch.linspace(*ends, count, dtype=torch.float64) ** 2
    times = torch.arange(count + 1, dtype=torch.float64) / count  # arXiv 2102.09672, eq. 17
    left = torch.cos((times + 0.008) / 1.008 * (math.pi / 2)) ** 2
    return (1 - left[1:] / left[:-1]).clamp(max=0.999)


def _checked(sigma_range: tuple[float, float]) -> tuple[float, float]:
    low, high = sigma_range
    if not 0 <= low < high <= 1:
        raise InvalidValueError(f"noise levels within {sigma_range} are none: need 0 <= lowest < highest <= 1.")
    return sigma_range
