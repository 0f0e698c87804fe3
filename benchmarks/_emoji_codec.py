"""A linear autoencoder for FLUX: principal components of patches, computed in a second where a VAE is trained for hours."""

from types import SimpleNamespace

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor
from torch.nn.functional import fold, unfold

PATCH, CHANNELS = 8, 32
"""8 x 8 pixels of three colors become 32 numbers, from which pictures come back at 28 to 29 dB."""


class PatchComponents(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers is untyped
    """Stands where FLUX has its `AutoencoderKL`, and is called as that is.

    A patch's component ``i``, of standard deviation ``s_i`` over all patches, is divided by ``sqrt(s_i)``: halfway between
    its own scale, where details drown in the noise of every level but the lowest, and unit variance for all, where they
    count as much as the colors of areas.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        latent_channels: int = CHANNELS,
        block_out_channels: tuple[int, ...] = (1,) * PATCH.bit_length(),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        """Hold nothing yet; ``block_out_channels`` only tells the pipeline how many pixels a latent has."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(3 * PATCH**2))
        self.register_buffer("encoding", torch.zeros(latent_channels, 3 * PATCH**2))
        self.register_buffer("decoding", torch.zeros(3 * PATCH**2, latent_channels))

    @classmethod
    def fit(cls, pictures: Tensor) -> "PatchComponents":
        """The components of pictures in [0, 1], pictures x 3 x height x width, with latents of unit variance."""
        patches = _patches(pictures * 2 - 1).flatten(0, 1)
        mean = patches.mean(0)
        variances, components = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        variances, components = variances.flip(0)[:CHANNELS].clamp(min=1e-12), components.flip(1)[:, :CHANNELS]
        codec: PatchComponents = cls(
            scaling_factor=float(variances.sqrt().mean().rsqrt())
        )  # the latents have variances sqrt(variance)
        codec.mean.copy_(mean)
        codec.encoding.copy_((components / variances**0.25).T)
        codec.decoding.copy_(components * variances**0.25)
        codec.eval()
        return codec

    def encode(self, pictures: Tensor) -> AutoencoderKLOutput:
        """Latents of pictures in [-1, 1]: pictures x channels x height / 8 x width / 8; they have no spread."""
        latents = (_patches(pictures) - self.mean) @ self.encoding.T
        grid = latents.transpose(1, 2).unflatten(2, (pictures.shape[2] // PATCH, -1))
        return AutoencoderKLOutput(latent_dist=SimpleNamespace(mode=lambda: grid, sample=lambda _generator=None: grid))

    def decode(self, latents: Tensor, *, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Pictures in about [-1, 1]."""
        patches = latents.flatten(2).transpose(1, 2) @ self.decoding.T + self.mean
        size = (latents.shape[2] * PATCH, latents.shape[3] * PATCH)
        pictures = fold(patches.transpose(1, 2), size, kernel_size=PATCH, stride=PATCH)
        return DecoderOutput(sample=pictures) if return_dict else (pictures,)


def reconstruct(codec: PatchComponents, pictures: Tensor) -> Tensor:
    """Pictures in [0, 1] through the autoencoder: what no drawn picture can exceed."""
    (decoded,) = codec.decode(codec.encode(pictures * 2 - 1).latent_dist.mode(), return_dict=False)
    return (decoded / 2 + 0.5).clamp(0, 1)


def _patches(pictures: Tensor) -> Tensor:
    """Pictures x patches x values."""
    return unfold(pictures, kernel_size=PATCH, stride=PATCH).transpose(1, 2)
