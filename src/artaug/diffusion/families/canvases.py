"""Drawing from a canvas with diffusers' own pipelines of a family: image-to-image and inpainting, beside its own pipeline.

They share all parts with the pipeline. The VAE encodes by mode there: a sample would take random numbers from the picture's
generator before the noise does, and the same seed would be other noise than without a canvas.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL.Image import Image, fromarray
from torch import Tensor

from artaug._internal.images import as_rgb
from artaug.canvas import Canvas
from artaug.errors import ModelError
from artaug.geometry import Box, Mask
from artaug.regional.coverage import area_coverage


class PipelineCall(NamedTuple):
    """A pipeline, and what it is called with beside prompts, steps and generators."""

    pipeline: Any
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Start:
    """What pictures of one call of a pipeline have in common."""

    has_canvas: bool
    has_mask: bool
    strength: float | None
    references: int

    @classmethod
    def of(cls, canvas: Canvas | None) -> "Start":
        """The start of a plan with this canvas."""
        if canvas is None:
            return cls(False, False, None, 0)
        return cls(True, canvas.mask is not None, canvas.strength, len(canvas.references))


def steps_rounded_down(strength: float, steps: int) -> int:
    """How many steps SD and SDXL draw: as ``get_timesteps`` of their pipelines counts.

    >>> from artaug.diffusion.families.canvases import steps_rounded_down
    >>> steps_rounded_down(0.3, 4)
    1
    """
    return min(int(steps * strength), steps)


def steps_rounded_up(strength: float, steps: int) -> int:
    """How many steps the flow models draw: as ``get_timesteps`` of their pipelines counts.

    >>> from artaug.diffusion.families.canvases import steps_rounded_up
    >>> steps_rounded_up(0.3, 4)
    2
    """
    return steps - int(max(steps - min(steps * strength, steps), 0))


def check_size(pipeline: object, canvas: Canvas, *, width: int, height: int) -> None:
    """Refuse a canvas that is not as large as what is drawn: pipelines would resize it, and the two pictures of a pair not match.

    Raises:
        ModelError: naming both sizes.
    """
    if canvas.size != (width, height):
        raise ModelError(
            f"{canvas!r} is of {canvas.size[0]} x {canvas.size[1]} pixels, and this {type(pipeline).__name__} draws {width} x "
            f"{height}. Resize it, or set the synthesizer's width and height."
        )


def noised_call(family: Any, canvases: Sequence[Canvas]) -> PipelineCall:  # noqa: ANN401 - a Family, which imports this
    """The call of the pipeline that adds noise to canvases which start alike, and removes it again."""
    first = canvases[0]
    pipeline_class = family.image_to_image_class if first.mask is None else family.inpainting_class
    sizes = {"width": family.width, "height": family.height}
    accepted = inspect.signature(pipeline_class.__call__).parameters
    kwargs: dict[str, Any] = {name: pixels for name, pixels in sizes.items() if name in accepted}
    kwargs |= {"image": [as_rgb(canvas.image) for canvas in canvases], "strength": first.strength}
    if first.mask is not None:
        kwargs["mask_image"] = [mask_image(canvas.mask, canvas.size) for canvas in canvases if canvas.mask is not None]
    return PipelineCall(_counterpart(family.pipeline, pipeline_class), kwargs)


def mask_image(mask: Box | Mask, size: tuple[int, int]) -> Image:
    """A mask as inpainting pipelines take it: white where it covers a pixel by at least a half, else black."""
    width, height = size
    return fromarray(((area_coverage(mask, (height, width)) >= 0.5) * 255).byte().numpy())


def _counterpart(pipeline: Any, pipeline_class: Any) -> Any:  # noqa: ANN401 - pipelines of diffusers
    """A pipeline of another class of the same parts. ``from_pipe`` of diffusers would convert them to float32."""
    # Its __init__ stores no more than references, so it is made anew for each call, and never out of date.
    available = {**pipeline.config, **pipeline.components, "vae": _ModeVAE(pipeline.vae)}
    names = inspect.signature(pipeline_class.__init__).parameters
    made = pipeline_class(**{name: available[name] for name in names if name in available})
    made.set_progress_bar_config(disable=True)
    return made


class _Encoded(NamedTuple):
    """What diffusers takes as it is, without a sample."""

    latents: Tensor


class _ModeVAE:
    """A VAE whose encoder returns the mode of its distribution, in the type of the picture; all else is the VAE's own."""

    def __init__(self, vae: Any) -> None:  # noqa: ANN401 - any autoencoder of diffusers
        self._vae = vae
        self._dtype = vae.dtype

    def encode(self, pixels: Tensor) -> _Encoded:
        """Encode pictures."""
        mode: Tensor = self._vae.encode(pixels.to(self._vae.dtype)).latent_dist.mode()
        return _Encoded(mode.to(pixels.dtype))

    def to(self, *args: object, **kwargs: object) -> "_ModeVAE":
        """Convert to float32, or back: pipelines of SDXL would round a VAE in float32 to the type of the prompts, for good."""
        widened = torch.float32 in (*args, *kwargs.values())
        self._vae.to(torch.float32 if widened else self._dtype)
        return self

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the VAE has
        return getattr(self._vae, name)
