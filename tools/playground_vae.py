"""Train the playground's autoencoder: 64 x 64 pixels to 16 x 16 latents of four channels, and back."""

import logging
import random
import time
from dataclasses import replace

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from artaug.playground.rendering import render_batch
from playground_data import training_scene
from playground_workers import Job, ParameterAverage, average_gradients, learning_rate

_KL = 5e-4
_OPPONENT = ((0.5, 0.6, 0.3), (2.0, -2.0, 0.0), (1.0, 1.0, -2.0))
"""Lightness, red-green and yellow-blue: colour separates outlines, and a loss on RGB weighs it too little."""
_logger = logging.getLogger("playground.vae")


def new_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder, with few channels at high resolution."""
    return AutoencoderKL(
        block_out_channels=(12, 24, 40),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=64,
    )


LATENT_CHANNELS = 4


def train_autoencoder(rank: int, job: Job) -> None:
    """Train one worker's share and save the average as a model folder `job.out/vae`."""
    torch.manual_seed(job.seed)
    _train(rank, job, new_autoencoder(), peak=2e-3)


def polish_decoder(rank: int, job: Job) -> None:
    """Train the decoder further. The encoder stays, and with it the latents that the transformer learns."""
    model = AutoencoderKL.from_pretrained(job.out / "vae")
    model.encoder.requires_grad_(False)
    _train(rank, replace(job, seed=job.seed + 1), model, peak=1e-3)


def _train(rank: int, job: Job, model: AutoencoderKL, *, peak: float) -> None:
    model.to(memory_format=torch.channels_last)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    average = ParameterAverage(parameters, decay=0.995)
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    rng = random.Random(f"{job.seed} {rank}")
    generator = torch.Generator().manual_seed(job.seed * 1000 + rank)
    start = time.monotonic()
    for step in range(job.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=job.steps, peak=peak, warmup=100)
        scenes = [training_scene(rng) for _ in range(job.batch_size // job.workers)]
        pictures = render_batch(scenes, generator=generator) * 2 - 1
        loss = _loss(model, pictures.contiguous(memory_format=torch.channels_last), generator)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(parameters)
        if rank == 0 and step % 50 == 0:
            _logger.info("step %d, loss %.4f, %.0f s", step, float(loss.detach()), time.monotonic() - start)
        if rank == 0 and (step % 200 == 199 or step == job.steps - 1):
            average.swap(parameters)
            _save(model, job)
            average.swap(parameters)


def _loss(model: AutoencoderKL, pictures: Tensor, generator: torch.Generator) -> Tensor:
    latents = model.encode(pictures).latent_dist
    decoded = model.decode(latents.sample(generator=generator)).sample
    error = torch.einsum("oc,bchw->bohw", pictures.new_tensor(_OPPONENT), decoded - pictures)
    edges = sum(error.diff(dim=axis).abs().mean() for axis in (2, 3))
    prior = latents.kl().mean() / latents.mean[0].numel()
    loss: Tensor = error.abs().mean() + edges + error.square().mean() + _KL * prior
    return loss


@torch.no_grad()
def _save(model: AutoencoderKL, job: Job) -> None:
    """Save with the shift and scale that make latents of this world zero-mean and unit-variance."""
    rng, generator = random.Random(job.seed), torch.Generator().manual_seed(job.seed)
    pictures = render_batch([training_scene(rng) for _ in range(128)], generator=generator) * 2 - 1
    latents = torch.cat([model.encode(part).latent_dist.mean for part in pictures.split(32)])
    decoded = torch.cat([model.decode(part).sample for part in latents.split(32)])
    if any(parameter.requires_grad for parameter in model.encoder.parameters()):
        model.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    model.save_pretrained(job.out / "vae")
    errors = (decoded - pictures).square().mean(dim=(1, 2, 3)) / 4
    _logger.info("%.1f dB, channel spread %s", float(-10 * errors.log10().mean()), latents.std(dim=(0, 2, 3)).tolist())
