"""Pictures that a plan is drawn from: one to start from (image-to-image, inpainting, editing), one that a ControlNet reads, and references (IP-Adapter)."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self, final

from PIL.Image import Image
from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from artaug._internal.annotations import checked
from artaug._internal.arguments import argument_error, check_argument, check_finite_number
from artaug._internal.values import to_json, value
from artaug.geometry import Box, Mask
from artaug.image_files import ImageFile, ImageFolder, LoadedImages, PictureField, image_digest

_ELSEWHERE = ImageFolder(Path())
"""Where the pictures of a canvas are that was read from JSON, until `Canvas.found_in` says."""


@value
class PictureRecord:
    """A picture as JSON names it."""

    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """SHA-256 of its size and RGB pixels."""
    size: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]
    """Width and height in pixels."""

    @classmethod
    def of(cls, picture: Image | ImageFile) -> "PictureRecord":
        """Of a picture in memory, or on disk."""
        return cls(image_digest(picture), picture.size)

    def to_file(self) -> ImageFile:
        """A reference to it, in a folder that is not known yet."""
        return _ELSEWHERE.get(self.digest, size=self.size)


@value
class CanvasRecord:
    """A `Canvas` as it is written: its pictures by their digests."""

    image: PictureRecord | None
    mask: Annotated[Box | Mask | None, Field(union_mode="left_to_right")]
    strength: Annotated[float, Field(gt=0, le=1)] | None
    references: tuple[PictureRecord, ...]
    control: PictureRecord | None = None
    control_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0

    @classmethod
    def of(cls, canvas: "Canvas") -> "CanvasRecord":
        """Of a canvas."""
        records = [PictureRecord.of(picture) for picture in canvas.pictures]
        image = records.pop(0) if canvas.has_image else None
        control = records.pop(0) if canvas.has_control else None
        return cls(image, canvas.mask, canvas.strength, tuple(records), control, canvas.control_scale)

    def to_canvas(self) -> "Canvas":
        """The canvas, with references to its pictures; see `Canvas.found_in`."""
        image, control = (None if record is None else record.to_file() for record in (self.image, self.control))
        return Canvas(
            image,
            mask=self.mask,
            strength=self.strength,
            control=control,
            control_scale=self.control_scale,
            references=[record.to_file() for record in self.references],
        )


@checked
@final
@dataclass(frozen=True, eq=False, repr=False)
class Canvas:
    """Pictures that a plan is drawn from beside its prompt: one to start from, one that a ControlNet reads, or references.

    Models that draw from noise (SD, SDXL, FLUX.1, SD3, Qwen-Image, Z-Image, Chroma) add noise to it, as much as ``strength``
    says, and remove it again: image-to-image, or inpainting with a ``mask``. Editing models (FLUX.1 Kontext, Qwen-Image-Edit)
    read it beside their noise, and take no strength. Stable Diffusion and SDXL with an IP-Adapter read references, with a
    picture to start from or without; they and FLUX.1 read a ``control`` picture with a ControlNet.

    Pictures are PIL images, or `ImageFile`, which are read whenever they are looked at. JSON names them by the digests of their
    pixels, and two canvases are equal if the pixels are.

    Raises:
        InvalidValueError: for a field of another type, a strength outside (0, 1], a mask or strength without a picture to start
            from, a scale without a control, or no picture at all.

    >>> import artaug as aa
    >>> from PIL import Image
    >>> aa.Canvas(Image.new("RGB", (64, 64)), strength=0.5)
    Canvas(64 x 64 pixels b6db7114, strength=0.5)
    """

    image: Image | None = None
    """The picture to start from, as large as what is drawn; None for noise alone."""
    control: Image | None = None
    """The picture that a ControlNet reads (edges, depth, a pose), as large as what is drawn."""
    mask: Box | Mask | None = None
    """What is drawn anew: the pixels that it covers by at least a half. The others stay as they are in ``image``, up to what the
    VAE changes. None for all."""
    strength: float | None = None
    """The part of the steps that is drawn, in (0, 1]: at 1, nothing is left of what is drawn anew. None for editing models."""
    control_scale: float = 1.0
    """How strongly the ControlNet acts, at least 0; diffusers calls it ``controlnet_conditioning_scale``."""
    references: Sequence[Image] = ()
    """Pictures that an IP-Adapter reads, of any size. They show in the whole picture, or in the regions that name them
    (`artaug.Region.reference`)."""

    if not TYPE_CHECKING:  # to which it is a plain picture
        image = PictureField()
        control = PictureField()

    def __init__(
        self,
        image: Image | ImageFile | None = None,
        *,
        mask: Box | Mask | None = None,
        strength: float | None = None,
        control: Image | ImageFile | None = None,
        control_scale: float = 1.0,
        references: Sequence[Image | ImageFile] = (),
    ) -> None:
        pictures = {f"references[{index}]": held for index, held in enumerate(references)}
        pictures |= {name: held for name, held in (("image", image), ("control", control)) if held is not None}
        for name, picture in pictures.items():
            if not isinstance(picture, ImageFile):
                check_argument("Canvas", name, picture, Image)
        if mask is not None and not isinstance(mask, Box | Mask):
            raise argument_error("Canvas", "mask", mask, expected="an artaug.Box, an artaug.Mask, or None")
        if strength is not None:
            is_number = isinstance(strength, Real) and not isinstance(strength, bool)
            if not is_number or not 0 < float(strength) <= 1:
                raise argument_error("Canvas", "strength", strength, expected="a number in (0, 1], or None")
            strength = float(strength)
        if not pictures or (image is None and (mask is not None or strength is not None)):
            raise argument_error(
                "Canvas", "image", image, expected="a picture to start from, where a mask or strength needs one"
            )
        check_finite_number("Canvas", "control_scale", control_scale)
        if control_scale < 0 or (control is None and control_scale != 1):
            expected = "a number of at least 0, and 1 without a control picture"
            raise argument_error("Canvas", "control_scale", control_scale, expected=expected)
        vars(self).update(image=image, mask=mask, strength=strength, references=LoadedImages(tuple(references)))
        vars(self).update(control=control, control_scale=float(control_scale))

    @property
    def has_image(self) -> bool:
        """Whether there is a picture to start from. No file is read."""
        return vars(self)["image"] is not None

    @property
    def has_control(self) -> bool:
        """Whether there is a picture for a ControlNet. No file is read."""
        return vars(self)["control"] is not None

    @property
    def pictures(self) -> "tuple[Image | ImageFile, ...]":
        """The image and the control, if there are any, and the references as the canvas holds them: no file is read."""
        single = (vars(self)[name] for name in ("image", "control"))
        return (*(picture for picture in single if picture is not None), *vars(self)["references"].references)

    @property
    def reference_digests(self) -> tuple[str, ...]:
        """SHA-256 of each reference, as ``artaug.image_files.image_digest`` gives it."""
        return tuple(map(image_digest, vars(self)["references"].references))

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height) of the image in pixels, None without one. No file is read."""
        return self.pictures[0].size if self.has_image else None

    def holding(self, pictures: "Sequence[Image | ImageFile]") -> Self:
        """This canvas with other pictures, in the order of `pictures`; no file is read."""
        held = list(pictures)
        image = held.pop(0) if self.has_image else None
        control = held.pop(0) if self.has_control else None
        return type(self)(
            image,
            mask=self.mask,
            strength=self.strength,
            control=control,
            control_scale=self.control_scale,
            references=held,
        )

    def stored_in(self, folder: ImageFolder) -> Self:
        """This canvas, with its pictures in the folder and no longer in memory; see `ImageFolder.add_all`.

        Raises:
            StorageError: if they cannot be written.
        """
        return self.holding(folder.add_all(self.pictures))

    def found_in(self, folder: ImageFolder) -> Self:
        """This canvas, as it was read from JSON, with its pictures where they are: files of the folder. None is read."""
        files = (folder.get(image_digest(picture), size=picture.size) for picture in self.pictures)
        return self.holding(list(files))

    @property
    def identity(self) -> str:
        """All that decides what is drawn from it, with the digests of its pictures."""
        return to_json(CanvasRecord.of(self))

    def __eq__(self, other: object) -> bool:
        """Whether pixels, mask and strength are the same; of files whose digests are known, none is read."""
        return self.identity == other.identity if isinstance(other, Canvas) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.size, self.strength))

    def __repr__(self) -> str:
        """Size and digest of the picture, and the other fields, if there are any."""
        parts = (
            []
            if self.size is None
            else [f"{self.size[0]} x {self.size[1]} pixels {image_digest(self.pictures[0])[:8]}"]
        )
        parts += [] if self.mask is None else [f"mask={self.mask!r}"]
        parts += [] if self.strength is None else [f"strength={self.strength:g}"]
        if self.has_control:
            parts += [f"control {image_digest(self.pictures[self.has_image])[:8]} x {self.control_scale:g}"]
        parts += [f"reference {digest[:8]}" for digest in self.reference_digests]
        return f"Canvas({', '.join(parts)})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        """As pydantic checks, writes and reads it."""
        record = handler.generate_schema(CanvasRecord)
        return core_schema.json_or_python_schema(
            json_schema=core_schema.no_info_after_validator_function(CanvasRecord.to_canvas, record),
            python_schema=core_schema.is_instance_schema(cls),
            serialization=core_schema.plain_serializer_function_ser_schema(CanvasRecord.of, return_schema=record),
        )
