"""Moves of latents in a drawing: what guides make of them reaches the denoiser and the scheduler of the pipeline."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import DiffusionPipeline
from torch import Tensor

from artaug.regional.guided_run import GuidedRun
from artaug.regional.latent_guide import LatentMoves


@contextmanager
def moved_latents(pipeline: DiffusionPipeline, run: GuidedRun | None) -> Iterator[LatentMoves | None]:
    """Let the guides of a run move the latents of what a pipeline draws in a ``with`` block; None without a run.

    The scheduler is as before afterwards.
    """
    if run is None:
        yield None
        return
    scheduler = pipeline.scheduler
    step = scheduler.step
    moves = LatentMoves(run, lambda: getattr(pipeline, "num_timesteps", None) or len(scheduler.timesteps))

    @functools.wraps(step)  # with its signature, by which pipelines decide what to pass
    def step_from_moved(
        model_output: Tensor, timestep: object, sample: Tensor, *args: object, **kwargs: object
    ) -> object:
        return step(model_output, timestep, moves.step_from(sample), *args, **kwargs)

    scheduler.step, run.moves = step_from_moved, moves
    try:
        yield moves
    finally:
        scheduler.step, run.moves = step, None
