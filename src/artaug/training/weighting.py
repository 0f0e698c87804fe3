"""Weights of a loss by noise level: which levels count how much."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch

from artaug._internal.annotations import checked
from artaug.errors import InvalidValueError, ModelError
from artaug.training.noise_schedule import (
    EpsilonPrediction,
    FlowMatching,
    NoiseSchedule,
    Sigmas,
    VPrediction,
)

_GRID = 1000


@checked
@dataclass(frozen=True, kw_only=True)
class MinSNR:
    """The min-SNR weight of models that predict noise or v (Hang et al., arXiv 2303.09556, section 3.4); not of flow models.

    Errors of the clean estimate count ``min(SNR, gamma)`` at every level, ``SNR = alpha^2 / sigma^2``, so levels of little noise,
    where they are easily small, do not outweigh the others. In errors of the prediction::

        epsilon:  min(SNR, gamma) / SNR         = min(1, gamma sigma^2 / alpha^2)
        v:        min(SNR, gamma) / (SNR + 1)   = min(alpha^2, gamma sigma^2)

    At pure noise (zero terminal SNR) the weight of v is 0: nothing is learned there. Diffusers' and sd-scripts' scripts weight the
    same way, as ``snr_gamma`` and ``min_snr_gamma``.

    Raises:
        InvalidValueError: unless ``gamma`` is above 0 and finite.

    >>> import artaug as aa
    >>> aa.PairedDifference(weighting=aa.MinSNR(gamma=5.0)).weighting
    MinSNR(gamma=5.0)
    """

    gamma: float = 5.0
    """The highest weight of the clean estimate's error; 5 is the paper's."""

    def __post_init__(self) -> None:
        if not 0 < self.gamma < math.inf:
            raise InvalidValueError(f"{self}: need a finite gamma above 0; the paper's is 5.")

    def weights(self, noise_schedule: NoiseSchedule, sigmas: Sigmas) -> Sigmas:
        """The weight of the squared error of the prediction at each level.

        Raises:
            ModelError: for a model that predicts neither noise nor v.
        """
        sigma2 = sigmas.cpu().double().square()
        alpha2 = 1 - sigma2
        if isinstance(noise_schedule, VPrediction):
            return torch.minimum(alpha2, self.gamma * sigma2).to(sigmas.dtype).to(sigmas.device)
        if isinstance(noise_schedule, EpsilonPrediction):
            return (
                (self.gamma * sigma2 / alpha2).clamp(max=1).to(sigmas.dtype).to(sigmas.device)
            )  # at alpha 0 infinite, so 1
        raise ModelError(
            f"MinSNR is for models that predict noise or v, and this one has {type(noise_schedule).__name__}: in a flow model "
            "no level outweighs the others this way. Leave weighting out, or choose sigma_range and logit_normal."
        )


@checked
@dataclass(frozen=True, kw_only=True)
class BellShaped:
    """DiffSynth-Studio's weight of flow models by noise level: 0 at pure noise, most in the middle, about 1.8; its mean is 1.

    ``exp(-2 (sigma - 1/2)^2) - exp(-1/2)`` over its mean over the model's levels. DiffSynth-Studio trains both LoRAs of
    its differential training, and all others, with it.

    >>> import artaug as aa
    >>> aa.TwoStage(weighting=aa.BellShaped()).weighting
    BellShaped()
    """

    def weights(self, noise_schedule: NoiseSchedule, sigmas: Sigmas) -> Sigmas:
        """The weight of the squared error of the prediction at each level.

        Raises:
            ModelError: for a model that is no flow model.
        """
        if not isinstance(noise_schedule, FlowMatching):
            raise ModelError(
                f"BellShaped is for flow models, and this one has {type(noise_schedule).__name__}. Leave weighting out, or "
                "take MinSNR()."
            )
        return (_bell(sigmas.cpu().double()) / _mean_bell(noise_schedule)).to(sigmas.dtype).to(sigmas.device)


LossWeighting: TypeAlias = MinSNR | BellShaped
"""How much errors count by their noise level; where there is none, all levels count the same."""


def _bell(sigmas: Sigmas) -> Sigmas:
    # Least at sigma = 1, as far from the middle as 0 is, and part of every flow schedule.
    return torch.exp(-2 * (sigmas - 0.5).square()) - math.exp(-0.5)


@lru_cache(maxsize=8)
def _mean_bell(noise_schedule: FlowMatching) -> float:
    """The mean over the levels that the model is trained at, whatever part of them ``sigma_range`` chooses."""
    quantiles = (torch.arange(_GRID, dtype=torch.float64) + 0.5) / _GRID
    return float(_bell(noise_schedule.sigmas_at(quantiles)).mean())
