"""Noise schedules: how latents are noised, what the denoiser predicts, and the target that a pair of pictures gives.

Everything here is a formula on tensors, without model or device. Throughout, ``sigmas`` has shape (batch,), one noise
level per row, and the other tensors share one shape (batch, ...).
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from artaug.errors import InvalidValueError

Latents: TypeAlias = Float[Tensor, " batch *latent"]
"""Latents, noise or predictions: one row per picture."""
DecodedPictures: TypeAlias = Float[Tensor, "batch 3 height width"]
"""Pictures: float32 in [0, 1], one row per picture."""
Sigmas: TypeAlias = Float[Tensor, " batch"]
"""Noise levels in [0, 1]: one per picture."""

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
        """Clean latents with noise at levels ``sigmas``."""

    def target(self, clean: Latents, noise: Latents, sigmas: Sigmas) -> Latents:
        """What the denoiser should predict for ``add_noise(clean, noise, sigmas)``."""

    def predict_x0(self, noisy: Latents, prediction: Latents, sigmas: Sigmas) -> Latents:
        """The clean latents that a prediction implies."""

    def paired_target(self, prediction: Latents, difference: Latents, sigmas: Sigmas) -> Latents:
        """What to predict at the noisy *after* latents so that the clean estimate moves by exactly ``difference``.

        `PairedDifference` has the derivation.

        Args:
            prediction: the teacher's prediction at the noisy *before* latents, with the same noise and level.
            difference: clean after minus clean before.
            sigmas: noise levels.
        """

    def target_at_before(self, prediction: Latents, difference: Latents, sigmas: Sigmas) -> Latents:
        """What to predict at the noisy *before* latents so that the clean estimate moves by ``sigma^2 difference``.

        `PairedDifference` says why. Arguments are those of `paired_target`.
        """


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """Rectified flow, as in FLUX and SD3: ``z = (1 - sigma) x + sigma noise``, and the denoiser predicts ``noise - x``.

    Sigmas are drawn uniformly or logit-normally (arXiv 2403.03206, section 3.1, with location 0 and scale 1), then shifted
    for the size of the pictures (there, "resolution-dependent shifting"), then stretched to the sampler's last level.
    Uniform draws have the density of a sampler's levels in the limit of many steps; a shifted logit-normal level has a
    normal logit with mean ``log(shift)``, which is how SD3 was trained.

    Raises:
        InvalidValueError: unless the shift is positive and finite, and ``shift_terminal`` in [0, 1).

    >>> import torch
    >>> from artaug.training import FlowMatching
    >>> clean, noise, sigmas = torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([0.25])
    >>> FlowMatching().add_noise(clean, noise, sigmas), FlowMatching().target(clean, noise, sigmas)
    (tensor([[0.2500, 0.2500]]), tensor([[1., 1.]]))
    """

    shift: float = 1.0
    """Moves levels towards noise: ``sigma' = shift sigma / (1 + (shift - 1) sigma)``; a setting of the model's sampler."""
    logit_normal: bool = False
    """Draw levels as the sigmoid of a standard normal before the shift, favouring the middle; else uniformly."""
    shift_terminal: float = 0.0
    """The sampler's last level above zero: ``sigma'' = 1 - (1 - shift_terminal) (1 - sigma')``."""

    def __post_init__(self) -> None:
        if not (self.shift > 0 and math.isfinite(self.shift)):
            raise InvalidValueError(
                f"FlowMatching(shift={self.shift}): need a finite shift above 0; 1 leaves levels unchanged."
            )
        if not 0 <= self.shift_terminal < 1:
            raise InvalidValueError(
                f"FlowMatching(shift_terminal={self.shift_terminal}): need a noise level in [0, 1); 0 leaves levels "
                "unchanged."
            )

    def sample_sigmas(
        self, count: int, generator: torch.Generator, *, sigma_range: tuple[float, float] = ALL_SIGMAS
    ) -> Sigmas:
        low, high = _check_sigma_range(sigma_range)
        if high <= self.shift_terminal:
            raise InvalidValueError(
                f"no noise level of this model lies in [{low}, {high}]: they run from {self.shift_terminal} to 1."
            )
        # Inverse transform sampling of the distribution truncated to [low, high]. A level is an increasing function of a
        # quantile in (0, 1]: normal quantile function and sigmoid (if logit-normal), shift, stretch. So the bounds go back
        # through the inverses, a quantile is drawn uniformly between them, and goes forward: one random number per level.
        bounds = (1 - (1 - torch.tensor([low, high], dtype=torch.float64)) / (1 - self.shift_terminal)).clamp(min=0)
        bounds = bounds / (self.shift - (self.shift - 1) * bounds)  # s' = k s / (1 + (k - 1) s), solved for s
        if self.logit_normal:
            bounds = torch.special.ndtr(torch.logit(bounds))  # the logit-normal's CDF, Phi(logit(s))
        uniform = 1 - torch.rand(count, generator=generator, dtype=torch.float64)  # (0, 1]: every picture gets noise
        quantiles = bounds[0] + (bounds[1] - bounds[0]) * uniform
        return self.sigmas_at(quantiles).clamp(low, high).float()

    def sigmas_at(self, quantiles: Sigmas) -> Sigmas:
        """The levels below which these shares, in [0, 1], of all levels lie."""
        unshifted = torch.sigmoid(torch.special.ndtri(quantiles)) if self.logit_normal else quantiles
        shifted = self.shift * unshifted / (1 + (self.shift - 1) * unshifted)
        return 1 - (1 - self.shift_terminal) * (1 - shifted)

    def add_noise(self, clean: Latents, noise: Latents, sigmas: Sigmas) -> Latents:
        sigma = _per_row(sigmas, clean)
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: Latents, noise: Latents, sigmas: Sigmas) -> Latents:
        return noise - clean

    def predict_x0(self, noisy: Latents, prediction: Latents, sigmas: Sigmas) -> Latents:
        return noisy - _per_row(sigmas, noisy) * prediction  # (1 - s) x + s n - s (n - x) = x

    def paired_target(self, prediction: Latents, difference: Latents, sigmas: Sigmas) -> Latents:
        return prediction - difference

    def target_at_before(self, prediction: Latents, difference: Latents, sigmas: Sigmas) -> Latents:
        return prediction - _per_row(sigmas, prediction) * difference


BetaSchedule: TypeAlias = Literal["scaled_linear", "linear", "squaredcos_cap_v2"]
"""How the variances of the noise that each timestep adds grow, by the names of diffusers."""


@dataclass(frozen=True, kw_only=True)
class _VariancePreserving:
    """The noise of epsilon and v-prediction: ``z = alpha x + sigma noise`` with ``alpha^2 + sigma^2 = 1``."""

    beta_start: float = 0.00085
    """The first timestep's beta; the cosine schedule, ``squaredcos_cap_v2``, does not use it."""
    beta_end: float = 0.012
    """The last timestep's beta, likewise."""
    num_train_timesteps: int = 1000
    beta_schedule: BetaSchedule = "scaled_linear"

    def __post_init__(self) -> None:
        if self.beta_schedule not in get_args(BetaSchedule):
            raise InvalidValueError(f"{self}: need a beta_schedule among {list(get_args(BetaSchedule))}.")
        if not (0 < self.beta_start <= self.beta_end < 1 and self.num_train_timesteps >= 1):
            raise InvalidValueError(f"{self}: need 0 < beta_start <= beta_end < 1 and at least one timestep.")

    def sample_sigmas(
        self, count: int, generator: torch.Generator, *, sigma_range: tuple[float, float] = ALL_SIGMAS
    ) -> Sigmas:
        low, high = _check_sigma_range(sigma_range)
        # The model knows its timesteps' levels alone: sigma_t = sqrt(1 - alpha_t^2), which increases with t.
        levels = (1 - self._timestep_alphas() ** 2).sqrt()
        eligible = levels[(levels >= low) & (levels <= high)]
        if len(eligible) == 0:
            raise InvalidValueError(
                f"no noise level of this model lies in [{low}, {high}]: they run from {levels[0]:.4f} to {levels[-1]:.4f}."
            )
        return eligible[torch.randint(len(eligible), (count,), generator=generator)].float()

    def add_noise(self, clean: Latents, noise: Latents, sigmas: Sigmas) -> Latents:
        return _alphas(sigmas, clean) * clean + _per_row(sigmas, clean) * noise

    def _timestep_alphas(self) -> Tensor:
        """``alpha_t = sqrt((1 - beta_1) ... (1 - beta_t))``, shape (timesteps,): the root of ``alphas_cumprod``."""
        return (1 - self._betas()).cumprod(0).sqrt()

    def _betas(self) -> Tensor:
        """The variance of the noise that each timestep adds, as diffusers' schedulers compute it: shape (timesteps,)."""
        count = self.num_train_timesteps
        if self.beta_schedule == "linear":
            return torch.linspace(self.beta_start, self.beta_end, count, dtype=torch.float64)
        if self.beta_schedule == "scaled_linear":  # linear in the root of beta
            ends = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
            return torch.linspace(*ends, count, dtype=torch.float64) ** 2
        # arXiv 2102.09672, eq. 17, without its normalization: alpha_bar(t) = cos^2((t + 0.008) / 1.008 * pi / 2), and
        # beta_t = 1 - alpha_bar(t) / alpha_bar(t - 1), at most 0.999.
        times = torch.arange(count + 1, dtype=torch.float64) / count
        alphas_bar = torch.cos((times + 0.008) / 1.008 * (math.pi / 2)) ** 2
        return (1 - alphas_bar[1:] / alphas_bar[:-1]).clamp(max=0.999)


@dataclass(frozen=True, kw_only=True)
class EpsilonPrediction(_VariancePreserving):
    """Variance-preserving noise, as in SD 1.5 and SDXL: ``z = alpha x + sigma noise``, and the denoiser predicts the noise.

    ``alpha = sqrt(1 - sigma^2)``. Levels are those of the timesteps, each drawn with the same probability.

    Raises:
        InvalidValueError: for an unknown beta schedule, betas out of order, or less than one timestep.

    >>> import torch
    >>> from artaug.training import EpsilonPrediction
    >>> EpsilonPrediction().paired_target(torch.ones(1, 2), torch.full((1, 2), 9.0), torch.tensor([0.5]))
    tensor([[1., 1.]])
    """

    def target(self, clean: Latents, noise: Latents, sigmas: Sigmas) -> Latents:
        return noise

    def predict_x0(self, noisy: Latents, prediction: Latents, sigmas: Sigmas) -> Latents:
        return (noisy - _per_row(sigmas, noisy) * prediction) / _alphas(sigmas, noisy)

    def paired_target(self, prediction: Latents, difference: Latents, sigmas: Sigmas) -> Latents:
        return prediction

    def target_at_before(self, prediction: Latents, difference: Latents, sigmas: Sigmas) -> Latents:
        return prediction - _alphas(sigmas, prediction) * _per_row(sigmas, prediction) * difference


@dataclass(frozen=True, kw_only=True)
class VPrediction(_VariancePreserving):
    """Variance-preserving noise, as in SD 2: ``z = alpha x + sigma noise``, and the denoiser predicts ``alpha noise - sigma x``.

    ``alpha = sqrt(1 - sigma^2)``. Levels are those of the timesteps, each drawn with the same probability.

    Raises:
        InvalidValueError: for an unknown beta schedule, betas out of order, or less than one timestep.

    >>> import torch
    >>> from artaug.training import VPrediction
    >>> VPrediction().paired_target(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([0.5]))
    tensor([[0.5000, 0.5000]])
    """

    rescale_betas_zero_snr: bool = False
    """Whether the last timestep is pure noise: alphas are rescaled to end at 0 (arXiv 2305.08891, algorithm 1).
    `EpsilonPrediction` has no such option: where everything is noise, the noise implies nothing about the picture."""

    def target(self, clean: Latents, noise: Latents, sigmas: Sigmas) -> Latents:
        return _alphas(sigmas, clean) * noise - _per_row(sigmas, clean) * clean

    def predict_x0(self, noisy: Latents, prediction: Latents, sigmas: Sigmas) -> Latents:
        # a (a x + s n) - s (a n - s x) = (a^2 + s^2) x = x
        return _alphas(sigmas, noisy) * noisy - _per_row(sigmas, noisy) * prediction

    def paired_target(self, prediction: Latents, difference: Latents, sigmas: Sigmas) -> Latents:
        return prediction - _per_row(sigmas, prediction) * difference

    def target_at_before(self, prediction: Latents, difference: Latents, sigmas: Sigmas) -> Latents:
        return self.paired_target(prediction, difference, sigmas)

    def _timestep_alphas(self) -> Tensor:
        alphas = super()._timestep_alphas()
        if not self.rescale_betas_zero_snr:
            return alphas
        # Shift all alphas so that the last one is 0, then scale them so that the first one is what it was.
        return (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))


def _per_row(sigmas: Tensor, like: Tensor) -> Tensor:
    """Noise levels (batch,) as a tensor (batch, 1, ..., 1) of the dtype and device of ``like``, to multiply its rows."""
    return sigmas.to(like).reshape(-1, *(1,) * (like.ndim - 1))


def _alphas(sigmas: Tensor, like: Tensor) -> Tensor:
    return (1 - _per_row(sigmas, like) ** 2).sqrt()


def _check_sigma_range(sigma_range: tuple[float, float]) -> tuple[float, float]:
    low, high = sigma_range
    if not 0 <= low < high <= 1:
        raise InvalidValueError(f"sigma_range={sigma_range} holds no noise level: need 0 <= lowest < highest <= 1.")
    return sigma_range
