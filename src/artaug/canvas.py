"""A picture to start from: part of a plan, for image-to-image, inpainting and editing models."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self, final

from PIL.Image import Image
from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from artaug._internal.arguments import argument_error, check_argument
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

    image: PictureRecord
    mask: Annotated[Box | Mask | None, Field(union_mode="left_to_right")]
    strength: Annotated[float, Field(gt=0, le=1)] | None
    references: tuple[PictureRecord, ...]

    @classmethod
    def of(cls, canvas: "Canvas") -> "CanvasRecord":
        """Of a canvas."""
        image, *references = map(PictureRecord.of, canvas.pictures)
        return cls(image, canvas.mask, canvas.strength, tuple(references))

    def to_canvas(self) -> "Canvas":
        """The canvas, with references to its pictures; see `Canvas.found_in`."""
        references = [record.to_file() for record in self.references]
        return Canvas(self.image.to_file(), mask=self.mask, strength=self.strength, references=references)


@final
@dataclass(frozen=True, eq=False, repr=False)
class Canvas:
    """A picture to start from, in place of noise alone.

    Models that draw from noise (SD, SDXL, FLUX.1, SD3, Qwen-Image, Z-Image, Chroma) add noise to it, as much as ``strength``
    says, and remove it again: image-to-image, or inpainting with a ``mask``. Editing models (FLUX.1 Kontext, Qwen-Image-Edit)
    read it beside their noise, and take no strength.

    Pictures are PIL images, or `ImageFile`, which are read whenever they are looked at. JSON names them by the digests of their
    pixels, and two canvases are equal if the pixels are.

    Raises:
        InvalidValueError: for a field of another type, or a strength outside (0, 1].

    >>> import artaug as aa
    >>> from PIL import Image
    >>> aa.Canvas(Image.new("RGB", (64, 64)), strength=0.5)
    Canvas(64 x 64 pixels b6db7114, strength=0.5)
    """

    image: Image
    """The picture, as large as what is drawn."""
    mask: Box | Mask | None = None
    """What is drawn anew: the pixels that it covers by at least a half. The others stay as they are in ``image``, up to what the
    VAE changes. None for all."""
    strength: float | None = None
    """The part of the steps that is drawn, in (0, 1]: at 1, nothing is left of what is drawn anew. None for editing models."""
    references: Sequence[Image] = ()
    """Further pictures that an editing model reads, of any size."""

    if not TYPE_CHECKING:  # to which it is a plain picture
        image = PictureField()

    def __init__(
        self,
        image: Image | ImageFile,
        *,
        mask: Box | Mask | None = None,
        strength: float | None = None,
        references: Sequence[Image | ImageFile] = (),
    ) -> None:
        pictures = {"image": image, **{f"references[{index}]": held for index, held in enumerate(references)}}
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
        vars(self).update(image=image, mask=mask, strength=strength, references=LoadedImages(tuple(references)))

    @property
    def pictures(self) -> "tuple[Image | ImageFile, ...]":
        """The image and the references as the canvas holds them: no file is read."""
        return (vars(self)["image"], *vars(self)["references"].references)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the image, in pixels. No file is read."""
        return self.pictures[0].size

    def holding(self, pictures: "Sequence[Image | ImageFile]") -> Self:
        """This canvas with other pictures, in the order of `pictures`; no file is read."""
        image, *references = pictures
        return type(self)(image, mask=self.mask, strength=self.strength, references=references)

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
        width, height = self.size
        parts = [f"{width} x {height} pixels {image_digest(self.pictures[0])[:8]}"]
        parts += [] if self.mask is None else [f"mask={self.mask!r}"]
        parts += [] if self.strength is None else [f"strength={self.strength:g}"]
        parts += [f"reference {image_digest(picture)[:8]}" for picture in self.pictures[1:]]
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
