"""How a model writes boxes as numbers: the unit, the part of the picture they refer to, and the order.

A wrong convention is the most common error in this field, and a reply does not show it: numbers between 1 and 1000 may
be pixels or thousandths. So a critic holds its convention as a value, set once for a model and never from a reply.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field

from artaug._internal.annotations import checked
from artaug._internal.values import value
from artaug.errors import GeometryError, InvalidValueError
from artaug.geometry import Box

Edges: TypeAlias = tuple[float, float, float, float]
"""Left, top, right and bottom of what may become a `Box`: relative to the picture, not yet clipped to it."""

Size: TypeAlias = tuple[int, int]
"""Width and height in pixels."""

_EXTENT = {"relative": 1.0, "percent": 100.0, "thousandths": 1000.0}
_DIGITS = 9  # few enough that n / 1000 * 1000 rounds to n
_MAX_ASPECT_RATIO = 200


@value
class SmartResize:
    """How the processors of the Qwen-VL family resize a picture: both sides a multiple, the pixel count in a range.

    Qwen2.5-VL counts pixels in the resized picture. The defaults are those of transformers' processor; a checkpoint may
    have others, which `Coordinates.fitted_to` reads from its processor.

    Raises:
        InvalidValueError: unless 0 < min_pixels <= max_pixels.

    >>> from artaug.critics.coordinates import SmartResize
    >>> SmartResize().output_size((1000, 700))
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
            raise InvalidValueError(f"no size fits {self}: need min_pixels <= max_pixels.")

    def output_size(self, size: Size) -> Size:
        """The size (width, height) in pixels that a picture of ``size`` is resized to.

        Raises:
            GeometryError: for a picture without pixels or with an aspect ratio above 200; the processors refuse these
                too.
        """
        if min(size) < 1 or max(size) > _MAX_ASPECT_RATIO * min(size):
            raise GeometryError(
                f"a picture of {size[0]} x {size[1]} cannot be resized for the model: need at least one pixel per side, "
                f"and the longer side at most {_MAX_ASPECT_RATIO} times the shorter."
            )
        # transformers' smart_resize, line by line: round to the multiple; if that leaves the range, scale by the root
        # of the ratio of areas, and round down (or up) so that the result is inside.
        pixels = size[0] * size[1]
        width, height = (round(side / self.multiple) * self.multiple for side in size)
        if width * height > self.max_pixels:
            beta = math.sqrt(pixels / self.max_pixels)
            width, height = (max(math.floor(side / beta / self.multiple), 1) * self.multiple for side in size)
        elif width * height < self.min_pixels:
            beta = math.sqrt(self.min_pixels / pixels)
            width, height = (math.ceil(side * beta / self.multiple) * self.multiple for side in size)
        return width, height


@value
class Coordinates:
    """A convention for writing a box as numbers.

    Raises:
        InvalidValueError: for a ``resize`` with a unit other than pixels, or a ``point_radius`` outside (0, 0.5].

    >>> import artaug as aa
    >>> from artaug.critics import Coordinates
    >>> gemini = Coordinates("thousandths", order="yxyx", key="box_2d")
    >>> gemini.encode(aa.Box(0.1, 0.2, 0.5, 1), size=(640, 480))
    (200.0, 100.0, 1000.0, 500.0)
    >>> gemini.decode((200, 100, 1000, 500), size=(640, 480))
    (0.1, 0.2, 0.5, 1.0)
    """

    unit: Literal["relative", "percent", "thousandths", "pixels"]
    """The coordinate of the right or bottom edge of the frame: 1, 100, 1000, or its length in pixels."""
    order: Literal["xyxy", "yxyx", "xywh", "points"] = "xyxy"
    """Two corners with x or y first, a corner and a size, or only the center."""
    frame: Literal["whole", "padded", "cropped"] = "whole"
    """What the model sees: the whole picture (stretched or not), the picture padded to a square, or its center square."""
    resize: SmartResize | None = None
    """For pixels: how the processor resizes the picture before the model counts them; None if it does not."""
    key: Literal["box", "bbox", "box_2d", "bbox_2d", "point", "point_2d"] = "box"
    """The key of a box in the JSON that the model is asked for; replies may use another."""
    point_radius: float = 0.125
    """The box around a point extends this far on every side, as a fraction of the picture, in (0, 0.5]."""

    def __post_init__(self) -> None:
        if self.resize is not None and self.unit != "pixels":
            raise InvalidValueError(f"{self} has a resize, which only the unit 'pixels' uses: remove it.")
        if not 0 < self.point_radius <= 0.5:
            raise InvalidValueError(f"{self} cannot make a box around a point: need a point_radius in (0, 0.5].")

    def extent(self, size: Size) -> tuple[float, float]:
        """The coordinates of the right and the bottom edge of the frame, for a picture of ``size`` (width, height)."""
        if self.unit != "pixels":
            return _EXTENT[self.unit], _EXTENT[self.unit]
        frame = _square_size(size, self.frame) or size
        return self.resize.output_size(frame) if self.resize else frame

    def decode(self, numbers: Sequence[float], *, size: Size) -> Edges:
        """Turn a box (four numbers) or a point (two numbers) into edges in a picture of ``size`` (width, height).

        Corners are not sorted and nothing is clipped. Where the order is ``points``, four numbers are two corners.

        Raises:
            GeometryError: unless there are two or four numbers.
        """
        if len(numbers) not in {2, 4}:
            raise GeometryError(f"received {len(numbers)} numbers, {list(numbers)}: need 4 for a box or 2 for a point.")
        if self.order == "yxyx":
            numbers = [numbers[index ^ 1] for index in range(len(numbers))]  # swap y and x of each point
        if len(numbers) == 2:
            x, y = self.decode_point(*numbers, size=size)
            return x - self.point_radius, y - self.point_radius, x + self.point_radius, y + self.point_radius
        left, top, right, bottom = numbers
        if self.order == "xywh":
            right, bottom = left + right, top + bottom
        return self.decode_point(left, top, size=size) + self.decode_point(right, bottom, size=size)

    def decode_point(self, x: float, y: float, *, size: Size) -> tuple[float, float]:
        """A point (x before y in every order) as fractions of a picture of ``size`` (width, height)."""
        right, bottom = self.extent(size)
        x, y = x / right, y / bottom
        if square := _square_size(size, self.frame):
            # Fraction of the square -> pixels of the square -> pixels of the picture (offset by half the padding,
            # which is negative for a crop) -> fraction of the picture.
            x, y = (
                (fraction * side - (side - length) // 2) / length
                for fraction, side, length in zip((x, y), square, size, strict=True)
            )
        return x, y

    def encode(self, box: Box, *, size: Size) -> tuple[float, ...]:
        """The numbers for a box in a picture of ``size`` (width, height); the inverse of `decode`, except for points."""
        if self.order == "points":
            return self._encode_point(*box.center, size)
        corners = self._encode_point(box.left, box.top, size) + self._encode_point(box.right, box.bottom, size)
        left, top, right, bottom = corners
        if self.order == "yxyx":
            return top, left, bottom, right
        return (left, top, self._round(right - left), self._round(bottom - top)) if self.order == "xywh" else corners

    def fitted_to(self, image_processor: object) -> Self:
        """This convention with the resizing or the frame of a transformers image processor, if it depends on them.

        A ``resize`` takes ``patch_size * merge_size`` and the allowed pixel counts from the processor; a padded or
        cropped frame becomes the one that the processor makes (``do_center_crop``, ``do_pad``).

        Raises:
            InvalidValueError: if this convention has a ``resize`` and the processor does not resize that way.
        """
        if self.resize is not None:
            return replace(self, resize=_resize_of(image_processor))
        if self.frame == "whole":
            return self
        crops, pads = (bool(getattr(image_processor, name, False)) for name in ("do_center_crop", "do_pad"))
        return replace(self, frame="cropped" if crops else "padded" if pads else "whole")

    def _encode_point(self, x: float, y: float, size: Size) -> tuple[float, float]:
        if square := _square_size(size, self.frame):
            x, y = (
                (fraction * length + (side - length) // 2) / side
                for fraction, side, length in zip((x, y), square, size, strict=True)
            )
        right, bottom = self.extent(size)
        return self._round(x * right), self._round(y * bottom)

    def _round(self, number: float) -> float:
        """Remove floating-point noise: 200 and not 200.00000000000003."""
        return number if self.unit == "relative" else round(number, _DIGITS)


def _square_size(size: Size, frame: str) -> Size | None:
    """The size of the square that the model sees; None if it sees the whole picture."""
    if frame == "whole":
        return None
    side = max(size) if frame == "padded" else min(size)
    return side, side


def _resize_of(processor: Any) -> SmartResize:  # noqa: ANN401  # any of transformers' processors, which share no type
    try:
        limits, multiple = processor.size, processor.patch_size * processor.merge_size
        return SmartResize(multiple, limits["shortest_edge"], limits["longest_edge"])
    except (AttributeError, KeyError, TypeError) as error:
        raise InvalidValueError(
            f"{type(processor).__name__} does not resize as Qwen-VL processors do ({error}): need patch_size, merge_size "
            "and a size with shortest_edge and longest_edge. Pass coordinates with a resize of your own."
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
        "glm4v": Coordinates("thousandths", key="bbox_2d"),
        "glm4v_moe": Coordinates("thousandths", key="bbox_2d"),
        "glm46v": Coordinates("thousandths", key="bbox_2d"),
        "molmo": Coordinates("percent", order="points", key="point"),
        "molmo2": Coordinates("thousandths", order="points", key="point"),
    }
)
"""Conventions by model family, the ``model_type`` of transformers' configurations.

Qwen2-VL and Qwen3-VL: QwenLM/Qwen3-VL#866 and modelscope/ms-swift#6180. Qwen3.5: QwenLM/Qwen3.8-Flash-Next#4.
Qwen2.5-VL: QwenLM/Qwen3-VL#676 and #830. InternVL: OpenGVLab/InternVL#844. LLaVA-1.5: haotian-liu/LLaVA#606; its
checkpoints for transformers crop where the original pads, so fit it to the processor. GLM-4.1V, 4.5V and 4.6V: README of
zai-org/GLM-V. Molmo 2: README of allenai/molmo-utils. Gemma 3 is assumed to write as
Gemini does, and Molmo as its model card shows: no source by their authors was found for either, so probe them first.
"""


@checked
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
