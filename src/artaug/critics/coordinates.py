"""How a model writes places down: in which unit, of which part of the picture, and in which order.

A wrong convention is the commonest fault in this field, and no reply shows it: numbers between 1 and 1000 may be pixels
or thousandths. So a critic carries its convention as a value, decided once for a model and never from a reply.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field

from artaug._internal.values import value
from artaug.errors import GeometryError, InvalidValueError
from artaug.geometry import Box

Edges: TypeAlias = tuple[float, float, float, float]
"""Left, top, right and bottom of what may become a `Box`: relative to the picture, not yet clipped to it."""

Size: TypeAlias = tuple[int, int]
"""Width and height in pixels."""

_EXTENT = {"relative": 1.0, "percent": 100.0, "thousandths": 1000.0}
_DIGITS = 9  # few enough that n / 1000 * 1000 is written as n
_MOST_SLENDER = 200


@value
class SmartResize:
    """How the processors of the Qwen-VL family resize a picture: sides that are multiples, pixels within a range.

    The size that comes out is the frame in which Qwen2.5-VL counts pixels. The defaults are those of transformers'
    processor; a checkpoint may have others, which `Coordinates.fitted_to` reads from its processor.

    Raises:
        InvalidValueError: unless 0 < min_pixels <= max_pixels.

    >>> from artaug.critics.coordinates import SmartResize
    >>> SmartResize().size_of((1000, 700))
    (1008, 700)
    """

    multiple: Annotated[int, Field(gt=0)] = 28
    """Both sides become multiples of this many pixels."""
    min_pixels: Annotated[int, Field(gt=0)] = 56 * 56
    """Pictures with fewer pixels are enlarged."""
    max_pixels: Annotated[int, Field(gt=0)] = 28 * 28 * 1280
    """Pictures with more pixels are reduced."""

    def __post_init__(self) -> None:
        if self.min_pixels > self.max_pixels:
            raise InvalidValueError(f"{self} leaves no size: need min_pixels <= max_pixels.")

    def size_of(self, size: Size) -> Size:
        """The size (width, height) in pixels that a picture of ``size`` is resized to.

        Raises:
            GeometryError: for a picture without pixels, or more than 200 times as long as wide, which the processors
                refuse too.
        """
        if min(size) < 1 or max(size) > _MOST_SLENDER * min(size):
            raise GeometryError(
                f"a picture of {size[0]} x {size[1]} cannot be resized for the model: need at least one pixel a side, "
                f"and the longer side at most {_MOST_SLENDER} times the shorter."
            )
        pixels = size[0] * size[1]
        width, height = (round(side / self.multiple) * self.multiple for side in size)
        if width * height > self.max_pixels:
            shrink = math.sqrt(pixels / self.max_pixels)
            width, height = (max(math.floor(side / shrink / self.multiple), 1) * self.multiple for side in size)
        elif width * height < self.min_pixels:
            grow = math.sqrt(self.min_pixels / pixels)
            width, height = (math.ceil(side * grow / self.multiple) * self.multiple for side in size)
        return width, height


@value
class Coordinates:
    """A convention for writing a box as numbers.

    Raises:
        InvalidValueError: for a resize without pixels to count, or a reach outside (0, 0.5].

    >>> import artaug as aa
    >>> from artaug.critics import Coordinates
    >>> gemini = Coordinates("thousandths", order="yxyx", key="box_2d")
    >>> gemini.write(aa.Box(0.1, 0.2, 0.5, 1), size=(640, 480))
    (200.0, 100.0, 1000.0, 500.0)
    >>> gemini.edges((200, 100, 1000, 500), size=(640, 480))
    (0.1, 0.2, 0.5, 1.0)
    """

    unit: Literal["relative", "percent", "thousandths", "pixels"]
    """What the far edge of the frame is called: 1, 100, 1000, or its length in pixels."""
    order: Literal["xyxy", "yxyx", "xywh", "points"] = "xyxy"
    """Two corners with x or with y first, a corner and a size, or the middle alone."""
    frame: Literal["whole", "padded", "cropped"] = "whole"
    """What the model sees: the whole picture (however stretched), the picture padded to a square, or its middle square."""
    resize: SmartResize | None = None
    """For pixels: how the processor resized the picture before they were counted; None if it did not."""
    key: Literal["box", "bbox", "box_2d", "bbox_2d", "point", "point_2d"] = "box"
    """What the model is used to calling a box in JSON; replies are read whatever they call it."""
    reach: float = 0.125
    """Where only a point is given, the box around it extends this far on every side, as a fraction of the picture."""

    def __post_init__(self) -> None:
        if self.resize is not None and self.unit != "pixels":
            raise InvalidValueError(f"{self} would ignore its resize: only pixels depend on it.")
        if not 0 < self.reach <= 0.5:
            raise InvalidValueError(f"{self} has no box around a point: need a reach in (0, 0.5].")

    def extent(self, size: Size) -> tuple[float, float]:
        """What the right and the bottom edge of the frame are called, for a picture of ``size`` (width, height)."""
        if self.unit != "pixels":
            return _EXTENT[self.unit], _EXTENT[self.unit]
        frame = _square(size, self.frame) or size
        return self.resize.size_of(frame) if self.resize else frame

    def edges(self, numbers: Sequence[float], *, size: Size) -> Edges:
        """Read a box (four numbers) or a point (two numbers) in a picture of ``size`` (width, height).

        Corners are not sorted and nothing is clipped. Where the order is ``points``, four numbers are two corners.

        Raises:
            GeometryError: unless there are two or four numbers.
        """
        if len(numbers) not in {2, 4}:
            raise GeometryError(f"received {len(numbers)} numbers, {list(numbers)}: need 4 for a box or 2 for a point.")
        if self.order == "yxyx":
            numbers = [numbers[place ^ 1] for place in range(len(numbers))]
        if len(numbers) == 2:
            x, y = self.corner(*numbers, size=size)
            return x - self.reach, y - self.reach, x + self.reach, y + self.reach
        left, top, right, bottom = numbers
        if self.order == "xywh":
            right, bottom = left + right, top + bottom
        return self.corner(left, top, size=size) + self.corner(right, bottom, size=size)

    def corner(self, x: float, y: float, *, size: Size) -> tuple[float, float]:
        """Where a point lies (x, then y, whatever the order), as fractions of a picture of ``size`` (width, height)."""
        across, down = self.extent(size)
        x, y = x / across, y / down
        if square := _square(size, self.frame):
            x, y = ((at * side - (side - own) // 2) / own for at, side, own in zip((x, y), square, size, strict=True))
        return x, y

    def write(self, box: Box, *, size: Size) -> tuple[float, ...]:
        """The numbers for a box in a picture of ``size`` (width, height); the inverse of `edges`, but for a point."""
        if self.order == "points":
            return self._outwards(*box.center, size)
        corners = self._outwards(box.left, box.top, size) + self._outwards(box.right, box.bottom, size)
        left, top, right, bottom = corners
        if self.order == "yxyx":
            return top, left, bottom, right
        return (left, top, self._neat(right - left), self._neat(bottom - top)) if self.order == "xywh" else corners

    def fitted_to(self, image_processor: object) -> Self:
        """This convention with the resizing or the frame of a transformers image processor, where they matter.

        Pixels of a resized picture take ``patch_size * merge_size`` and the allowed numbers of pixels from it; a
        padded or cropped frame becomes the one it makes (``do_center_crop``, ``do_pad``).

        Raises:
            InvalidValueError: if pixels are counted in a resized picture and the processor does not resize so.
        """
        if self.resize is not None:
            return replace(self, resize=_resize_of(image_processor))
        if self.frame == "whole":
            return self
        crops, pads = (bool(getattr(image_processor, name, False)) for name in ("do_center_crop", "do_pad"))
        return replace(self, frame="cropped" if crops else "padded" if pads else "whole")

    def _outwards(self, x: float, y: float, size: Size) -> tuple[float, float]:
        if square := _square(size, self.frame):
            x, y = ((at * own + (side - own) // 2) / side for at, side, own in zip((x, y), square, size, strict=True))
        across, down = self.extent(size)
        return self._neat(x * across), self._neat(y * down)

    def _neat(self, number: float) -> float:
        """A number as one writes it: 200 and not 200.00000000000003."""
        return number if self.unit == "relative" else round(number, _DIGITS)


def _square(size: Size, frame: str) -> Size | None:
    """The square that the model sees; None if it sees the whole picture."""
    if frame == "whole":
        return None
    side = max(size) if frame == "padded" else min(size)
    return side, side


def _resize_of(processor: Any) -> SmartResize:  # noqa: ANN401  # any of transformers' processors, which share no type
    try:
        limits, multiple = processor.size, processor.patch_size * processor.merge_size
        return SmartResize(multiple, limits["shortest_edge"], limits["longest_edge"])
    except (AttributeError, KeyError, TypeError) as fault:
        raise InvalidValueError(
            f"{type(processor).__name__} does not resize as Qwen-VL processors do ({fault}): need patch_size, merge_size "
            "and a size with shortest_edge and longest_edge. Give the resize of its convention yourself."
        ) from None


FAMILIES: Mapping[str, Coordinates] = MappingProxyType(
    {
        "qwen2_vl": Coordinates("thousandths", key="bbox_2d"),
        "qwen2_5_vl": Coordinates("pixels", resize=SmartResize(), key="bbox_2d"),
        "qwen3_vl": Coordinates("thousandths", key="bbox_2d"),
        "qwen3_vl_moe": Coordinates("thousandths", key="bbox_2d"),
        "qwen3_5": Coordinates("thousandths", key="bbox_2d"),
        "qwen3_5_moe": Coordinates("thousandths", key="bbox_2d"),
        "internvl": Coordinates("thousandths"),
        "internvl_chat": Coordinates("thousandths"),
        "llava": Coordinates("relative", frame="padded"),
        "gemma3": Coordinates("thousandths", order="yxyx", key="box_2d"),
        "molmo": Coordinates("percent", order="points", key="point"),
    }
)
"""Conventions by model family, by the ``model_type`` of transformers' configurations.

Qwen2-VL and Qwen3-VL: QwenLM/Qwen3-VL#866 and modelscope/ms-swift#6180. Qwen3.5: QwenLM/Qwen3.8-Flash-Next#4.
Qwen2.5-VL: QwenLM/Qwen3-VL#676 and #830. InternVL: OpenGVLab/InternVL#844. LLaVA-1.5: haotian-liu/LLaVA#606; its checkpoints for transformers crop where the
original pads, so fit it to the processor. Gemma 3 is taken to write as Gemini does, and Molmo as its model card shows:
no source of their authors was found for either, so probe them first.
"""


def coordinates_for(family: str) -> Coordinates:
    """The convention of a model family.

    Raises:
        InvalidValueError: for a family that is not one of `FAMILIES`.

    >>> from artaug.critics import coordinates_for
    >>> coordinates_for("qwen3_vl").unit
    'thousandths'
    """
    if family not in FAMILIES:
        raise InvalidValueError(
            f"the box convention of {family!r} is not known; known families are {', '.join(FAMILIES)}. "
            "Probe the model and pass coordinates=Coordinates(...)."
        )
    return FAMILIES[family]
