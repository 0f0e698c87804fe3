"""Classifier-free guidance where a pipeline asks for both branches in one batch, the negative prompts' rows first."""

from artaug.diffusion.families.common import Pipeline
from artaug.errors import GuideError, ModelError
from artaug.regional.denoiser import Branches


def check_negative_is_read(pipeline: Pipeline, negative_prompt: str | None, *, is_guided: bool, scale: float) -> None:
    """Refuse a negative prompt in a run without classifier-free guidance.

    Raises:
        ModelError: since nobody would read it.
    """
    if negative_prompt is not None and not is_guided:
        raise ModelError(
            f"negative_prompt={negative_prompt!r} would be ignored: this {type(pipeline).__name__} draws without "
            f"classifier-free guidance at guidance_scale={scale}. Set a guidance_scale above 1 for a model that takes "
            "it, or leave the negative prompt out."
        )


def batched_branches(rows: int, *, pictures: int) -> Branches:
    """Which of so many rows are the negative prompts' and which the plans', told by how many pictures a run draws.

    Raises:
        GuideError: if the rows are neither one nor two a picture.

    >>> from artaug.diffusion.families.cfg import batched_branches
    >>> batched_branches(4, pictures=2)
    Branches(cond=range(2, 4), uncond=range(0, 2))
    """
    if rows == pictures:
        return Branches(cond=range(rows))
    if rows == 2 * pictures:
        return Branches(cond=range(pictures, rows), uncond=range(pictures))
    raise GuideError(
        f"the denoiser was asked for {rows} rows in a run of {pictures} pictures. Expected {pictures}, or "
        f"{2 * pictures} with classifier-free guidance: more branches (as of perturbed attention) cannot be guided."
    )
