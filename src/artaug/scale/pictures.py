"""Pictures on their way to a worker and back: by reference where they are on disk, else as their bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image

from artaug.image_files import ImageFile, LoadedImages


@dataclass(frozen=True)
class Pixels:
    """A picture as its bytes, which `artaug.scale.payloads` sends beside the pickle of a call."""

    mode: str
    size: tuple[int, int]
    data: bytes

    @classmethod
    def of(cls, image: Image.Image) -> "Pixels":
        """The bytes of a picture in memory; one whose bytes are no colors by themselves is converted."""
        if image.mode in {"P", "PA"} or "transparency" in image.info:
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        return cls(image.mode, image.size, image.tobytes())

    def load(self) -> Image.Image:
        """The picture."""
        return Image.frombytes(self.mode, self.size, self.data)


Sent: TypeAlias = Pixels | ImageFile
"""A picture as it is sent. A worker reads files by itself: the folder of a run has the same path everywhere."""


def send_pictures(images: Sequence[Image.Image]) -> list[Sent]:
    """Pictures in the form in which they are sent; of `LoadedImages`, files stay references, and none is read."""
    held = images.references if isinstance(images, LoadedImages) else images
    return [picture if isinstance(picture, ImageFile) else Pixels.of(picture) for picture in held]


def receive_pictures(sent: Sequence[Sent]) -> list[Image.Image]:
    """The pictures that were sent."""
    return [picture.load() for picture in sent]
