"""Train the playground's transformer and text encoders by flow matching, exactly as FluxPipeline draws."""

import json
import logging
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor, distributed, nn

from artaug.playground.rendering import render_batch
from artaug.playground.world import Scene
from playground_data import gist, training_caption, training_scene
from playground_measure import measure
from playground_pipeline import new_pipeline, position_biases, tokenize
from playground_words import train_words
from playground_workers import Job, ParameterAverage, average_gradients, learning_rate

_PEAK = 1.2e-3
_POOL_SIZE = 16384
_NEW_FRACTION = 0.375
_SAVE_EVERY, _MEASURE_EVERY = 250, 1000
_WORD_STEPS = 400
_SKY, _THINGS = 0.5, 1.3
"""Weights of the upper three rows of tokens and of the lower five, where things stand."""
_logger = logging.getLogger("playground.flux")


class Velocity(nn.Module):
    """The trained modules: from noisy latents and a caption to the velocity, noise minus latents."""

    def __init__(self, pipeline: FluxPipeline, *, compiled: bool) -> None:
        """Share the pipeline's modules."""
        super().__init__()
        self.transformer = pipeline.transformer
        self.clip = pipeline.text_encoder
        self.t5 = pipeline.text_encoder_2
        self._run = torch.compile(self.transformer) if compiled else self.transformer

    def forward(self, noisy: Tensor, sigma: Tensor, words: Tensor, pooled: Tensor) -> Tensor:
        """Predict the velocity of packed latents, batch x 64 x channels."""
        velocity: Tensor = self._run(
            hidden_states=noisy,
            encoder_hidden_states=self.t5(words)[0],
            pooled_projections=self.clip(pooled).pooler_output,
            timestep=sigma,
            img_ids=FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32),  # noqa: SLF001
            txt_ids=torch.zeros(words.shape[1], 3),
            return_dict=False,
        )[0]
        return velocity


class ScenePool:
    """A pool of encoded scenes; every batch replaces a part of it, oldest first."""

    def __init__(self, vae: AutoencoderKL, *, seed: str) -> None:
        """Start empty."""
        self._vae = vae
        self._rng = random.Random(seed)
        self._generator = torch.Generator().manual_seed(self._rng.getrandbits(60))
        self._scenes: list[Scene] = []
        self._latents = torch.empty(_POOL_SIZE, 4 * vae.config.latent_channels * 64)
        self._drawn = 0

    def batch(self, size: int) -> tuple[Tensor, list[str], list[str]]:
        """Return packed latents, captions and their gists."""
        self._replace(size if self._drawn < 4 * size else max(1, round(_NEW_FRACTION * size)))
        rows = self._rng.sample(range(len(self._scenes)), size)
        captions = [training_caption(self._scenes[row], self._rng) for row in rows]
        return self._latents[rows].view(size, 64, -1), captions, [gist(text, self._rng) for text in captions]

    @torch.no_grad()
    def _replace(self, count: int) -> None:
        scenes = [training_scene(self._rng) for _ in range(count)]
        pictures = render_batch(scenes, generator=self._generator) * 2 - 1
        latents = self._vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist.mean
        latents = (latents - self._vae.config.shift_factor) * self._vae.config.scaling_factor
        packed = FluxPipeline._pack_latents(latents.contiguous(), count, latents.shape[1], 16, 16)  # noqa: SLF001
        for scene, row in zip(scenes, packed.flatten(1), strict=True):
            index = self._drawn % _POOL_SIZE
            self._scenes[index : index + 1] = [scene]
            self._latents[index] = row
            self._drawn += 1


@dataclass(frozen=True)
class _TrainingState:
    """The state of a training, which a checkpoint holds."""

    pipeline: FluxPipeline
    model: Velocity
    optimizer: torch.optim.Optimizer
    average: ParameterAverage


def train_flux(rank: int, job: Job) -> None:
    """Train one worker's share; rank 0 saves, measures and exports."""
    run = _start(job)
    first_step = _resume(job, run)
    supply = ScenePool(run.pipeline.vae, seed=f"{job.seed} {rank} {first_step}")
    generator = torch.Generator().manual_seed((job.seed * 1000 + rank) * 1_000_000 + first_step)
    start, smooth_loss = time.monotonic(), 2.0
    for step in range(first_step, job.steps):
        if step == first_step and rank > 0:
            distributed.barrier()  # the first worker compiles, the others find it in the cache
        loss = _loss(run, supply.batch(job.batch_size // job.workers), generator)
        run.optimizer.zero_grad()
        loss.backward()
        if step == first_step and rank == 0:
            distributed.barrier()
        _step(run, learning_rate(step, steps=job.steps, peak=_PEAK))
        smooth_loss += 0.02 * (float(loss.detach()) - smooth_loss)
        if rank == 0 and step % 50 == 0:
            _logger.info("step %d, loss %.4f, %.0f s", step, smooth_loss, time.monotonic() - start)
        if rank == 0 and ((step + 1) % _SAVE_EVERY == 0 or step + 1 == job.steps):
            _save(job, step + 1, run)
        if rank == 0 and ((step + 1) % _MEASURE_EVERY == 0):
            _export_average(job, run)
            _logger.info("%s", measure(FluxPipeline.from_pretrained(job.out / "weights"), count=48, steps=12, seed=1))
    if rank == 0:
        _export_average(job, run)
    distributed.barrier()


def _start(job: Job) -> _TrainingState:
    torch.manual_seed(job.seed)
    vae = AutoencoderKL.from_pretrained(job.out / "vae").to(memory_format=torch.channels_last).requires_grad_(False)
    pipeline = new_pipeline(vae)
    if not (job.out / "checkpoint.pt").exists():
        train_words(pipeline, steps=_WORD_STEPS, seed=job.seed)
    model = Velocity(pipeline, compiled=job.compiled)
    positions = list(position_biases(pipeline.text_encoder_2))
    others = [parameter for parameter in model.parameters() if parameter is not positions[0]]
    groups = [{"params": others, "lr_scale": 1.0}, {"params": positions, "lr_scale": 10.0, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_PEAK, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    return _TrainingState(pipeline, model, optimizer, ParameterAverage(model.parameters(), decay=0.999))


def _step(run: _TrainingState, rate: float) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    average_gradients(run.model.parameters())
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.average.update(run.model.parameters())


def _export_average(job: Job, run: _TrainingState) -> None:
    run.average.swap(run.model.parameters())
    export(run.pipeline, job.out / "weights")
    run.average.swap(run.model.parameters())


def _loss(run: _TrainingState, batch: tuple[Tensor, list[str], list[str]], generator: torch.Generator) -> Tensor:
    latents, captions, gists = batch
    noise = torch.randn(latents.shape, generator=generator)
    sigma = torch.sigmoid(0.5 + 1.1 * torch.randn(len(latents), generator=generator))
    noisy = latents + sigma[:, None, None] * (noise - latents)
    words, pooled = tokenize(run.pipeline, captions, gists)
    velocity: Tensor = run.model(noisy, sigma, words, pooled)
    weight = torch.tensor([_SKY, _THINGS]).repeat_interleave(torch.tensor([24, 40]))[:, None]
    return (weight * (velocity - (noise - latents)).square()).mean()


def export(pipeline: FluxPipeline, folder: Path) -> None:
    """Write the pipeline as a model folder, replacing an older one at once."""
    new, old = folder.with_suffix(".new"), folder.with_suffix(".old")
    pipeline.save_pretrained(new)
    for path in (new / "model_index.json", *new.glob("tokenizer*/tokenizer_config.json")):
        path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    config = json.loads((new / "vae" / "config.json").read_text())
    config.pop("_name_or_path", None)
    (new / "vae" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)


def _save(job: Job, step: int, run: _TrainingState) -> None:
    state = {
        "step": step,
        "model": [parameter.detach() for parameter in run.model.parameters()],
        "optimizer": run.optimizer.state_dict(),
        "average": run.average.values,
    }
    torch.save(state, job.out / "checkpoint.new")
    (job.out / "checkpoint.new").rename(job.out / "checkpoint.pt")


@torch.no_grad()
def _resume(job: Job, run: _TrainingState) -> int:
    if not (job.out / "checkpoint.pt").exists():
        return 0
    state: dict[str, Any] = torch.load(job.out / "checkpoint.pt", weights_only=True)
    for parameter, value in zip(run.model.parameters(), state["model"], strict=True):
        parameter.copy_(value)
    run.optimizer.load_state_dict(state["optimizer"])
    run.average.values = state["average"]
    run.average.count = state["step"]
    return int(state["step"])
