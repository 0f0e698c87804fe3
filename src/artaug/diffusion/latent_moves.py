"""Moves of latents in a drawing: what guides make of them reaches the denoiser and the scheduler of the pipeline."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import DiffusionPipeline
from torch import Tensor

from artaug.errors import GuideError
from artaug.regional.guided_run import GuidedRun
from artaug.regional.latent_guide import LatentMoves

_KEPT_SAMPLES = ("state_in_first_order", "sample", "cur_sample", "last_sample")
"""What the schedulers of diffusers have that keep latents of an earlier call: Heun and KDPM2, which make a step of two calls;
singlestep solvers; PNDM; and those that correct the step before (UniPC, SA)."""


@contextmanager
def moved_latents(pipeline: DiffusionPipeline, run: GuidedRun | None) -> Iterator[LatentMoves | None]:
    """Let the guides of a run move the latents of what a pipeline draws in a ``with`` block; None without a run.

    The scheduler is as before afterwards.

    Raises:
        GuideError: if guides move latents, and the scheduler steps from others than those that it is given.
    """
    if run is None:
        yield None
        return
    scheduler = pipeline.scheduler
    if run.movers and any(hasattr(scheduler, name) for name in _KEPT_SAMPLES):
        raise GuideError(
            f"{len(run.movers)} guide(s) of this run move latents before a step, and {type(scheduler).__name__} makes some steps "
            "from latents that it kept, in which a move would be lost. Draw with a scheduler that steps from what it is given: "
            "Euler, DDIM, DPMSolverMultistepScheduler."
        )
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
