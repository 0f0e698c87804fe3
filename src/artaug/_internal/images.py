"""The pixels that every part of artaug sees of an image, and images inside HTML and JSON."""

import base64
import io

import numpy as np
from PIL import Image, ImageCms

from artaug.errors import InvalidValueError

_PREVIEW_PX = 256
_ENLARGED_PX = 192


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB: the one way in which artaug reads a picture.

    Greyscale, palette, CMYK, Lab and the other 8-bit modes are converted; transparent pixels are composited over white, as
    a page would show them; of 16-bit greyscale the upper 8 bits are kept. Pixels count alone: an orientation, a color
    profile or a gamma that a file names is left out, so that a copy that is shown or sent is not read another way.

    Raises:
        InvalidValueError: for an image without pixels, or of 32-bit numbers (modes ``I`` and ``F``), whose white level
            is unknown, or whose file was closed before it was read.
    """
    try:
        image.load()
    except AssertionError:  # all that PIL says of it
        raise InvalidValueError(
            "the file of an image was closed before its pixels were read, as by `with Image.open(path) as image:`. Call image.load() "
            "in that block, or give artaug.ImageFile.open(path)."
        ) from None
    if 0 in image.size:
        raise InvalidValueError(f"an image of {image.width} x {image.height} pixels has nothing to measure.")
    if image.mode in {"I", "F"}:
        raise InvalidValueError(
            f"an image of mode {image.mode!r} does not say which number is white. "
            "Scale it to 0..255 and convert it to 'L' or 'RGB' first."
        )
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    if image.mode == "La":  # premultiplied, which PIL converts to its plain mode only
        image = image.convert("LA")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    rgb = image.convert("RGB")
    rgb.info = {}
    return rgb


def rgb_parts(image: Image.Image) -> tuple[str, bytes]:
    """What a digest of an image is made of: its size, and the pixels that every part of artaug sees of it."""
    rgb = as_rgb(image)
    return f"{rgb.width}x{rgb.height}", rgb.tobytes()


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit greyscale as 8 bits, with an alpha channel if the file names a transparent level."""
    values, transparent = np.asarray(image), image.info.get("transparency")
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


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


def preview_html(image: Image.Image, *, alt: str) -> str:
    """A picture for a notebook: at most 256 pixels a side, and a small one enlarged to about 192.

    >>> from artaug._internal.images import preview_html
    >>> from PIL import Image
    >>> preview_html(Image.new("RGB", (64, 32)), alt="before").endswith("alt='before' width=192 height=96>")
    True
    """
    scale = max(_ENLARGED_PX // max(image.size), 1)
    size = f" width={image.width * scale} height={image.height * scale}" * (scale > 1)
    return f"<img src='{preview_url(image)}' alt='{alt}'{size}>"


def preview_url(image: Image.Image) -> str:
    """A picture of at most 256 pixels a side as a ``data:`` URL, for notebooks.

    >>> from artaug._internal.images import preview_url
    >>> from PIL import Image
    >>> preview_url(Image.new("RGB", (64, 64)))[:22]
    'data:image/png;base64,'
    """
    small = as_rgb(image)
    small.thumbnail((_PREVIEW_PX, _PREVIEW_PX))
    buffer = io.BytesIO()
    small.save(buffer, "png")
    return data_url(buffer.getvalue(), "png")
