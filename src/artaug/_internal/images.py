"""The pixels that every part of artaug sees of an image, and images inside HTML and JSON."""

import base64

import numpy as np
from PIL import Image

from artaug.errors import InvalidValueError


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    Greyscale, palette, CMYK and the other 8-bit modes are converted; transparent pixels are composited over white, as a
    page would show them; of 16-bit greyscale the upper 8 bits are kept.

    Raises:
        InvalidValueError: for an image without pixels, or of 32-bit numbers (modes ``I`` and ``F``), whose white level
            is unknown.
    """
    if 0 in image.size:
        raise InvalidValueError(f"an image of {image.width} x {image.height} pixels has nothing to measure.")
    if image.mode in {"I", "F"}:
        raise InvalidValueError(
            f"an image of mode {image.mode!r} does not say which number is white. "
            "Scale it to 0..255 and convert it to 'L' or 'RGB' first."
        )
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def data_url(data: bytes, image_format: str) -> str:
    """Write an image file as a ``data:`` URL.

    Args:
        data: the content of the file.
        image_format: ``png``, ``jpeg`` or ``webp``.

    >>> from artaug._internal.images import data_url
    >>> data_url(b"...", "png")
    'data:image/png;base64,Li4u'
    """
    return f"data:image/{image_format};base64,{base64.b64encode(data).decode()}"
