"""How a step along a loss's gradient is scaled, sample by sample."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from artaug._internal.annotations import checked


@checked
def normalize_gradient(
    gradient: Float[Tensor, " batch *latent"], *, by: Literal["abs_max", "signed_max", "norm"] = "abs_max"
) -> Float[Tensor, " batch *latent"]:
    """Divide each sample's gradient by its size, so that the learning rate alone says how far latents move.

    ZestGuide's codes differ: that for Stable Diffusion 1.4 divides by the largest absolute value, that for SDXL by the
    largest *signed* value. The signed one is here to repeat published pictures only: where the entry of the largest size is
    negative the step is longer than the learning rate says, and where all entries are negative it goes uphill.

    Args:
        gradient: shape (batch, ...).
        by: ``"abs_max"``, ``"signed_max"``, or ``"norm"``, the Euclidean one.

    Returns:
        Shape (batch, ...). A gradient of zeros stays zero, as does, by its signed maximum, one whose largest entry is 0.

    >>> import torch
    >>> from artaug.regional.attention_losses import normalize_gradient
    >>> gradient = torch.tensor([[-4.0, 2.0]])
    >>> normalize_gradient(gradient), normalize_gradient(gradient, by="signed_max")
    (tensor([[-1.0000,  0.5000]]), tensor([[-2.,  1.]]))
    """
    flat = gradient.flatten(1)
    match by:
        case "abs_max":
            size = flat.abs().amax(dim=1)
        case "signed_max":
            size = flat.amax(dim=1)
        case "norm":
            size = torch.linalg.vector_norm(flat, dim=1)
    size = size.reshape(-1, *[1] * (gradient.ndim - 1))
    return torch.where(size == 0, 0.0, gradient / torch.where(size == 0, 1.0, size))
