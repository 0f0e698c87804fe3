"""Drawing on pictures: boxes, soft areas, and their labels. Plans and critiques are not needed for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from artaug._internal.annotations import checked
from artaug._internal.images import as_rgb
from artaug.errors import InvalidValueError
from artaug.geometry import Box, Mask

BOX_COLORS = ("#ffb000", "#3fc1ff", "#ff5c8a", "#5ee0a0", "#c79bff", "#f4f06a", "#ff8a4c", "#9fe8ff")
"""Of the first box, the second, and so on: bright, and distinct for most colour-blind people too. They repeat after eight."""

DARK = "#14151a"
"""The colour of text on these."""

_TINT = 0.45
_HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
"""Five colors of matplotlib's map "inferno", of which the lightness rises evenly."""
_MOST_HEAT = 0.85
_GREY_LEVEL = 0.8
_LINE_PX = 15
_GAP_PX = 4
_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


@checked
def draw_boxes(
    image: Image.Image, boxes: Sequence[Box], *, labels: Sequence[str] | None = None, scale: int = 4
) -> Image.Image:
    """Draw boxes and their labels on a larger copy of a picture.

    Args:
        image: stays as it is.
        boxes: the first is drawn in the first of `BOX_COLORS`.
        labels: one for each box; their numbers, from 1, if not given. A blank label is left out.
        scale: pixels of the copy for each pixel of ``image``, at least 1.

    Returns:
        An RGB picture, ``scale`` times as wide and high.

    Raises:
        InvalidValueError: if the numbers of labels and boxes differ, or the scale is below 1.

    >>> import artaug as aa
    >>> from artaug.drawing import draw_boxes
    >>> from PIL import Image
    >>> draw_boxes(Image.new("RGB", (64, 48)), [aa.Box(0, 0, 0.5, 1)], labels=["brighter"]).size
    (256, 192)
    """
    texts = [str(number + 1) for number in range(len(boxes))] if labels is None else list(labels)
    if len(texts) != len(boxes):
        raise InvalidValueError(
            f"draw_boxes received {len(boxes)} boxes and {len(texts)} labels. Pass one label for each box, or none."
        )
    if scale < 1:
        raise InvalidValueError(f"draw_boxes(scale={scale}) would shrink the picture. Pass a scale of at least 1.")
    large = as_rgb(image).resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(large)
    for number, box in enumerate(boxes):
        _outline(pen, box, color=BOX_COLORS[number % len(BOX_COLORS)], size=large.size)
    for number, (box, text) in enumerate(zip(boxes, texts, strict=True)):
        _label(pen, box, text, color=BOX_COLORS[number % len(BOX_COLORS)], size=large.size)
    return large


def _outline(pen: ImageDraw.ImageDraw, box: Box, *, color: str, size: tuple[int, int]) -> None:
    """Draw a frame inside the box's edges, with a dark line inside it, so that it is visible on any picture."""
    left, top, right, bottom = box.to_pixels(size)
    width = max(round(min(size) / 160), 1)
    for inset in range(2 * width):
        x0, y0, x1, y1 = left + inset, top + inset, right - 1 - inset, bottom - 1 - inset
        if x0 <= x1 and y0 <= y1:
            pen.line([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)], fill=color if inset < width else DARK)


def _label(pen: ImageDraw.ImageDraw, box: Box, text: str, *, color: str, size: tuple[int, int]) -> None:
    """Write text on a plate of the box's colour in the box's corner, moved inwards at the picture's edge."""
    if not text.strip():
        return
    font = ImageFont.load_default(max(min(size) / 18, 9))
    pad = max(round(min(size) / 100), 1)
    width, height = pen.textbbox((0, 0), text, font=font, anchor="lt")[2:]
    left, top, _, _ = box.to_pixels(size)
    left = max(min(left, size[0] - int(width) - 2 * pad), 0)
    top = max(min(top, size[1] - int(height) - 2 * pad), 0)
    pen.rectangle((left, top, left + width + 2 * pad - 1, top + height + 2 * pad - 1), fill=color)
    pen.text((left + pad, top + pad), text, fill=DARK, font=font, anchor="lt")


@dataclass(frozen=True, kw_only=True)
class Area:
    """A part of a picture to draw, and its description."""

    shape: Box | Mask
    text: str
    feather: float = 0.0
    """As in `Region.feather`."""


def draw_areas(image: Image.Image, areas: Sequence[Area], *, heading: str = "") -> Image.Image:
    """Draw areas on a picture, each with a number, and write the text of each number below it.

    A box gets a frame; a mask, and the soft edge of a feathered box, a tint as strong as its weight there. Frames and
    tints have the first of `BOX_COLORS`, the second, and so on.

    Args:
        image: stays as it is.
        areas: the first below the others.
        heading: of the text below; left out if blank.

    Returns:
        An RGB picture as wide as ``image``, and higher by the lines of text.
    """
    picture = as_rgb(image)
    for number, area in enumerate(areas):
        if isinstance(area.shape, Mask) or area.feather:
            color = Image.new("RGB", picture.size, BOX_COLORS[number % len(BOX_COLORS)])
            picture = Image.composite(color, picture, _tint(area, picture.size))
    pen = ImageDraw.Draw(picture)
    for number, area in enumerate(areas):
        if isinstance(area.shape, Box):
            _outline(pen, area.shape, color=BOX_COLORS[number % len(BOX_COLORS)], size=picture.size)
    for number, area in enumerate(areas):
        place = area.shape if isinstance(area.shape, Box) else _middle(area.shape)
        _label(pen, place, str(number + 1), color=BOX_COLORS[number % len(BOX_COLORS)], size=picture.size)
    return _with_lines(picture, areas, heading=heading)


@checked
def draw_heatmap(image: Image.Image, weights: np.ndarray, *, heading: str = "") -> Image.Image:
    """Draw weights over a picture, such as the attention to a phrase: warm where they are large, the picture in grey below.

    Args:
        image: stays as it is.
        weights: rows and columns of numbers of 0 or more, stretched over the whole picture; the largest is the warmest,
            and where the smallest is, nothing but the picture is seen.
        heading: written below; left out if blank.

    Returns:
        An RGB picture as wide as ``image``, and higher by the heading.

    Raises:
        InvalidValueError: for weights that are no rows and columns of finite numbers of 0 or more.

    >>> import numpy as np
    >>> from artaug.drawing import draw_heatmap
    >>> from PIL import Image
    >>> draw_heatmap(Image.new("RGB", (64, 48), "teal"), np.eye(4)).size
    (64, 48)
    """
    grid = np.asarray(weights)
    if grid.ndim != 2 or not grid.size or not np.isfinite(grid).all() or grid.min() < 0:
        raise InvalidValueError(
            f"draw_heatmap received weights of shape {grid.shape}: need rows and columns of finite numbers of 0 or more."
        )
    span = (grid.max() - grid.min()) or 1
    strength = Image.fromarray(((grid - grid.min()) / span).astype(np.float32)).resize(
        image.size, Image.Resampling.BILINEAR
    )
    levels = np.asarray(strength)[..., None].clip(0, 1)
    grey = np.asarray(as_rgb(image).convert("L"), dtype=np.float32)[..., None] * _GREY_LEVEL
    at = levels * (len(_HEAT) - 1)
    low = np.minimum(at.astype(int), len(_HEAT) - 2)
    colors = np.array(_HEAT, dtype=np.float32)
    warm = colors[low[..., 0]] * (1 - (at - low)) + colors[low[..., 0] + 1] * (at - low)
    opacity = _MOST_HEAT * levels
    mixed = Image.fromarray((grey * (1 - opacity) + warm * opacity).round().astype(np.uint8))
    return _with_lines(mixed, [], heading=heading)


def _tint(area: Area, size: tuple[int, int]) -> Image.Image:
    """The strength of the tint at each pixel, from 0 to 255."""
    if isinstance(area.shape, Mask):
        weights = Image.fromarray(area.shape.to_array()).resize(size, Image.Resampling.BOX)
        strength = weights.point(lambda weight: weight * 255 * _TINT).convert("L")
    else:
        strength = Image.new("L", size)
        strength.paste(round(255 * _TINT), area.shape.to_pixels(size))
    return strength.filter(ImageFilter.GaussianBlur(area.feather * min(size))) if area.feather else strength


def _middle(mask: Mask) -> Box:
    """The cell with a mask's largest weight that is nearest to the centre of all such: a label there is on the area."""
    weights = mask.to_array()
    cells = np.argwhere(weights == weights.max())
    row, column = cells[((cells - cells.mean(axis=0)) ** 2).sum(axis=1).argmin()].tolist()
    return Box(column / mask.width, row / mask.height, (column + 1) / mask.width, (row + 1) / mask.height)


def _with_lines(picture: Image.Image, areas: Sequence[Area], *, heading: str) -> Image.Image:
    """Write the heading and every area's text below a picture, after the area's number on its colour."""
    font = ImageFont.load_default(_LINE_PX)
    indent = int(font.getlength("00")) + 2 * _GAP_PX
    wrapped = [_wrap(area.text, font, width=picture.width - indent - _GAP_PX) for area in areas]
    heading_lines = _wrap(heading, font, width=picture.width - 2 * _GAP_PX)
    step = _LINE_PX + _GAP_PX
    height = step * (len(heading_lines) + sum(map(len, wrapped))) + (_GAP_PX if heading_lines or wrapped else 0)
    page = Image.new("RGB", (picture.width, picture.height + height), "white")
    page.paste(picture)
    pen = ImageDraw.Draw(page)
    top = picture.height + _GAP_PX
    for line in heading_lines:
        pen.text((_GAP_PX, top), line, fill=DARK, font=font)
        top += step
    for number, lines in enumerate(wrapped):
        pen.rectangle((_GAP_PX, top, indent - _GAP_PX, top + _LINE_PX), fill=BOX_COLORS[number % len(BOX_COLORS)])
        pen.text((indent / 2, top + _LINE_PX / 2), str(number + 1), fill=DARK, font=font, anchor="mm")
        for line in lines:
            pen.text((indent, top), line, fill=DARK, font=font)
            top += step
    return page


def _wrap(text: str, font: _Font, *, width: float) -> list[str]:
    """Text in lines of at most ``width`` pixels; a word that is wider has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
