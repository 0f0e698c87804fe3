"""Drawing from a canvas with diffusers' own pipelines of a family: image-to-image and inpainting, beside its own pipeline.

They share all parts with the pipeline. The VAE encodes by mode there: a sample would take random numbers from the picture's
generator before the noise does, and the same seed would be other noise than without a canvas.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import ControlNetModel, FluxControlNetModel
from PIL.Image import Image, fromarray
from torch import Tensor

from artaug._internal.images import as_rgb
from artaug.canvas import Canvas
from artaug.errors import ModelError
from artaug.geometry import Box, Mask
from artaug.plan import Plan
from artaug.regional.coverage import area_coverage


class PipelineCall(NamedTuple):
    """A pipeline, and what it is called with beside prompts, steps and generators."""

    pipeline: Any
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Start:
    """What pictures of one call of a pipeline have in common."""

    has_image: bool = False
    has_mask: bool = False
    strength: float | None = None
    control_scale: float | None = None
    """None without a control picture."""
    references: tuple[str, ...] = ()
    """Their digests: diffusers takes the same for all pictures of a batch."""
    areas: tuple[tuple[int, Box | Mask], ...] = ()
    """Of the regions that name a reference, with its number."""

    @classmethod
    def of(cls, plan: Plan) -> "Start":
        """The start of a plan."""
        canvas = plan.canvas
        if canvas is None:
            return cls()
        areas = tuple((region.reference, region.area) for region in plan.regions if region.reference is not None)
        control = canvas.control_scale if canvas.has_control else None
        return cls(canvas.has_image, canvas.mask is not None, canvas.strength, control, canvas.reference_digests, areas)


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
    if canvas.size is not None and canvas.size != (width, height):
        raise ModelError(
            f"{canvas!r} is of {canvas.size[0]} x {canvas.size[1]} pixels, and this {type(pipeline).__name__} draws {width} x "
            f"{height}. Resize it, or set the synthesizer's width and height."
        )


def plain_pipeline(family: Any) -> Any:  # noqa: ANN401 - a Family, which imports this, and its pipeline
    """The pipeline that draws from noise: the family's own, or that of the same parts if the own one draws with a ControlNet."""
    pipeline = family.pipeline
    return pipeline if isinstance(pipeline, family.pipeline_class) else _counterpart(pipeline, family.pipeline_class)


def check_control(family: Any, canvas: Canvas) -> None:  # noqa: ANN401 - a Family, which imports this
    """Refuse a control picture that no ControlNet reads, or not as it is.

    Raises:
        ModelError: saying what to do.
    """
    pipeline, control_class = family.pipeline, family.control_class
    name = type(family).__name__
    if control_class is None or not isinstance(pipeline, control_class):
        known = "diffusers' pipelines for it are not known here" if control_class is None else control_class.__name__
        raise ModelError(
            f"{name} would ignore the control of {canvas!r}: this {type(pipeline).__name__} has no ControlNet. Make a pipeline of its "
            f"parts that has one: {known}."
        )
    controlnet = pipeline.controlnet
    if not isinstance(controlnet, ControlNetModel | FluxControlNetModel) or getattr(controlnet, "union", False):
        raise ModelError(
            f"{name} cannot draw from the control of {canvas!r} with a {type(controlnet).__name__}: expected one ControlNet for one "
            "kind of picture, a ControlNetModel or FluxControlNetModel without modes."
        )
    if canvas.has_image:
        raise ModelError(
            f"{canvas!r} has a picture to start from beside its control, which are not drawn together here. Leave one of them out."
        )
    if canvas.pictures[0].size != (family.width, family.height):
        width, height = canvas.pictures[0].size
        raise ModelError(
            f"the control of {canvas!r} is of {width} x {height} pixels, and this {type(pipeline).__name__} draws {family.width} x "
            f"{family.height}. Resize it, or set the synthesizer's width and height."
        )


def controlled_call(family: Any, canvases: Sequence[Canvas]) -> PipelineCall:  # noqa: ANN401 - a Family, which imports this
    """The call of the pipeline that draws with a ControlNet."""
    controls = [as_rgb(canvas.control) for canvas in canvases if canvas.control is not None]
    kwargs = {
        "width": family.width,
        "height": family.height,
        family.control_argument: controls,
        "controlnet_conditioning_scale": canvases[0].control_scale,
    }
    return PipelineCall(_counterpart(family.pipeline, family.control_class), kwargs)


def noised_call(family: Any, canvases: Sequence[Canvas]) -> PipelineCall:  # noqa: ANN401 - a Family, which imports this
    """The call of the pipeline that adds noise to canvases which start alike, and removes it again."""
    first = canvases[0]
    pipeline_class = family.image_to_image_class if first.mask is None else family.inpainting_class
    sizes = {"width": family.width, "height": family.height}
    accepted = inspect.signature(pipeline_class.__call__).parameters
    kwargs: dict[str, Any] = {name: pixels for name, pixels in sizes.items() if name in accepted}
    kwargs |= {"image": start_images(canvases), "strength": first.strength}
    if first.mask is not None:
        size = (family.width, family.height)
        kwargs["mask_image"] = [mask_image(canvas.mask, size) for canvas in canvases if canvas.mask is not None]
    return PipelineCall(_counterpart(family.pipeline, pipeline_class), kwargs)


def start_images(canvases: Sequence[Canvas]) -> list[Image]:
    """The pictures that canvases start from."""
    return [as_rgb(canvas.image) for canvas in canvases if canvas.image is not None]


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
