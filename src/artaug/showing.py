"""Pictures for people: boxes drawn on them, so that one sees where a critic looked, and their way into HTML."""

import base64
import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from artaug.errors import InvalidValueError
from artaug.geometry import Box

COLOURS = ("#ffb000", "#3fc1ff", "#ff5c8a", "#5ee0a0", "#c79bff", "#f4f06a", "#ff8a4c", "#9fe8ff")
"""Of the first box, the second, ...: bright, and told apart by most colour-blind eyes too. They repeat after eight."""

_DARK = "#14151a"
_CAPTION_PX = 15
_LOSSLESS_PX = 256
_LARGEST_PX = 768


def draw_boxes(
    image: Image.Image, boxes: Sequence[Box], *, labels: Sequence[str] | None = None, scale: int = 4
) -> Image.Image:
    """Draw boxes and their labels on a larger copy of a picture.

    Args:
        image: stays as it is.
        boxes: what to draw, the first in the first of `COLOURS`.
        labels: a word a box; their numbers, from 1, if not given. A blank one is left out.
        scale: pixels of the copy a pixel of ``image``, at least 1.

    Returns:
        An RGB picture, ``scale`` times as wide and high.

    Raises:
        InvalidValueError: if there is not one label a box, or the scale is below 1.

    >>> import artaug as aa
    >>> from artaug.showing import draw_boxes
    >>> from PIL import Image
    >>> draw_boxes(Image.new("RGB", (64, 48)), [aa.Box(0, 0, 0.5, 1)], labels=["brighter"]).size
    (256, 192)
    """
    words = [str(number + 1) for number in range(len(boxes))] if labels is None else list(labels)
    if len(words) != len(boxes):
        raise InvalidValueError(f"draw_boxes received {len(boxes)} boxes and {len(words)} labels: need one a box.")
    if scale < 1:
        raise InvalidValueError(f"draw_boxes(scale={scale}) would shrink the picture: need at least 1.")
    large = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(large)
    for number, box in enumerate(boxes):
        _outline(pen, box, colour=COLOURS[number % len(COLOURS)], size=large.size)
    for number, (box, word) in enumerate(zip(boxes, words, strict=True)):
        _label(pen, box, word, colour=COLOURS[number % len(COLOURS)], size=large.size)
    return large


def _outline(pen: ImageDraw.ImageDraw, box: Box, *, colour: str, size: tuple[int, int]) -> None:
    """Draw a frame inside the box's edges, with a dark seam inside it, so that it is seen on any picture."""
    left, top, right, bottom = box.to_pixels(size)
    width = max(round(min(size) / 160), 1)
    for inset in range(2 * width):
        x0, y0, x1, y1 = left + inset, top + inset, right - 1 - inset, bottom - 1 - inset
        if x0 <= x1 and y0 <= y1:
            pen.line([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)], fill=colour if inset < width else _DARK)


def _label(pen: ImageDraw.ImageDraw, box: Box, word: str, *, colour: str, size: tuple[int, int]) -> None:
    """Write a word on a plate of the box's colour in the box's corner, moved inwards where the picture ends."""
    if not word.strip():
        return
    font = ImageFont.load_default(max(min(size) / 18, 9))
    pad = max(round(min(size) / 100), 1)
    across, down = pen.textbbox((0, 0), word, font=font, anchor="lt")[2:]
    left, top, _, _ = box.to_pixels(size)
    left = max(min(left, size[0] - int(across) - 2 * pad), 0)
    top = max(min(top, size[1] - int(down) - 2 * pad), 0)
    pen.rectangle((left, top, left + across + 2 * pad - 1, top + down + 2 * pad - 1), fill=colour)
    pen.text((left + pad, top + pad), word, fill=_DARK, font=font, anchor="lt")


def contact_sheet(
    images: Sequence[Image.Image], *, columns: int | None = None, labels: Sequence[str] | None = None, scale: int = 3
) -> Image.Image:
    """Set pictures of one size side by side, larger, each with a label below it.

    Args:
        images: at least one; they stay as they are.
        columns: pictures a row; all in one row if not given.
        labels: a word a picture; none if not given.
        scale: pixels of the sheet a pixel of a picture, at least 1.

    Raises:
        InvalidValueError: without pictures, for pictures of several sizes, or if there is not one label a picture.

    >>> from artaug.showing import contact_sheet
    >>> from PIL import Image
    >>> contact_sheet([Image.new("RGB", (64, 64))] * 4, columns=2).size
    (392, 392)
    """
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1 or (labels is not None and len(labels) != len(images)) or scale < 1:
        raise InvalidValueError(
            f"contact_sheet received {len(images)} pictures of sizes {sizes}, "
            f"{'no' if labels is None else len(labels)} labels and scale {scale}: need pictures of one size, one label "
            "each or none, and a scale of at least 1."
        )
    width, height = sizes[0][0] * scale, sizes[0][1] * scale
    font = ImageFont.load_default(_CAPTION_PX)
    gap, caption = 8, 0 if labels is None else _CAPTION_PX + 8
    columns = min(columns or len(images), len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + caption + gap) - gap), "white")
    pen = ImageDraw.Draw(sheet)
    for number, image in enumerate(images):
        left, top = number % columns * (width + gap), number // columns * (height + caption + gap)
        sheet.paste(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), (left, top))
        if labels is not None:
            pen.text((left + 2, top + height + 4), labels[number], fill=_DARK, font=font)
    return sheet


def data_address(image: Image.Image) -> str:
    """Give a picture as a ``data:`` address that any page can hold.

    Up to 256 pixels a side it is a PNG, without loss; a larger one becomes a WebP of at most 768 pixels a side, which
    is what a screen shows.

    >>> from artaug.showing import data_address
    >>> from PIL import Image
    >>> data_address(Image.new("RGB", (8, 8)))[:22]
    'data:image/png;base64,'
    """
    picture = image if image.mode in {"RGB", "RGBA", "L"} else image.convert("RGB")
    held = io.BytesIO()
    if max(picture.size) <= _LOSSLESS_PX:
        kind = "png"
        picture.save(held, kind, optimize=True)
    else:
        kind = "webp"
        picture = picture.copy()
        picture.thumbnail((_LARGEST_PX, _LARGEST_PX), Image.Resampling.LANCZOS)
        picture.save(held, kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(held.getvalue()).decode()}"
