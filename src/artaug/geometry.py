"""Where things are in an image: boxes and masks, relative to its width and height.

The origin is top left, both axes run from 0 to 1. Methods that need pixels take the image's size.
"""

import base64
import math
import zlib
from typing import Annotated, ClassVar, Self

import numpy as np
from pydantic import Field

from artaug._internal.values import value
from artaug.errors import GeometryError


@value
class Box:
    """A rectangle in image-relative coordinates, origin top left, both axes [0, 1].

    Raises:
        GeometryError: unless ``0 <= left < right <= 1`` and ``0 <= top < bottom <= 1``.

    >>> import artaug as aa
    >>> box = aa.Box(0.25, 0.0, 0.75, 0.5)
    >>> box.width, box.area, box.center
    (0.5, 0.25, (0.5, 0.25))
    """

    left: float
    top: float
    right: float
    bottom: float

    def __post_init__(self) -> None:
        if not (0 <= self.left < self.right <= 1 and 0 <= self.top < self.bottom <= 1):
            raise GeometryError(
                f"{self} is not relative: need 0 <= left < right <= 1 and 0 <= top < bottom <= 1. "
                "For pixels use Box.from_pixels."
            )

    @classmethod
    def from_pixels(cls, left: float, top: float, right: float, bottom: float, *, size: tuple[int, int]) -> Self:
        """Make a box from pixel edges in an image of ``size`` (width, height), clipped to the image.

        Raises:
            GeometryError: if nothing of the box lies inside the image.

        >>> import artaug as aa
        >>> aa.Box.from_pixels(160, 0, 640, 240, size=(640, 480))
        Box(left=0.25, top=0.0, right=1.0, bottom=0.5)
        """
        width, height = size
        if width < 1 or height < 1:
            raise GeometryError(f"a pixel box needs an image with pixels, received one of {width} x {height}.")
        edges = (left / width, top / height, right / width, bottom / height)
        clipped = [min(max(edge, 0.0), 1.0) if math.isfinite(edge) else math.nan for edge in edges]
        if not (clipped[0] < clipped[2] and clipped[1] < clipped[3]):
            raise GeometryError(
                f"the pixel box ({left}, {top}, {right}, {bottom}) has no area inside an image of {width} x {height}. "
                "Need left < right and top < bottom, in pixels, at least partly inside."
            )
        return cls(*clipped)

    @property
    def width(self) -> float:
        """Width as a fraction of the image's width."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """Height as a fraction of the image's height."""
        return self.bottom - self.top

    @property
    def area(self) -> float:
        """Area as a fraction of the image's area, in (0, 1]."""
        return self.width * self.height

    @property
    def center(self) -> tuple[float, float]:
        """Horizontal and vertical position of the center."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    def to_pixels(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Give (left, top, right, bottom) in whole pixels of an image of ``size`` (width, height), at least 1 x 1.

        The edges are rounded outwards, so ``image.crop(box.to_pixels(image.size))`` always holds the whole box. Edges
        that came from whole pixels come back as they were.
        """
        left, right = _pixel_span(self.left, self.right, length=size[0])
        top, bottom = _pixel_span(self.top, self.bottom, length=size[1])
        return left, top, right, bottom

    def overlap(self, other: "Box") -> float:
        """Area shared with another box, as a fraction of the image's area, in [0, 1]."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)

    def iou(self, other: "Box") -> float:
        """Intersection over union with another box, in [0, 1]; 1 only for the same box.

        >>> import artaug as aa
        >>> aa.Box(0, 0, 0.5, 1).iou(aa.Box(0.25, 0, 0.75, 1)) == 1 / 3
        True
        """
        shared = self.overlap(other)
        union = self.area + other.area - shared
        # The area of the tiniest boxes underflows to 0; then only the same box overlaps.
        return shared / union if union > 0 else float(self == other)

    def padded(self, margin: float) -> "Box":
        """The box grown by ``margin`` (a fraction of the image, >= 0) on every side, clipped to the image."""
        return Box(
            max(self.left - margin, 0.0),
            max(self.top - margin, 0.0),
            min(self.right + margin, 1.0),
            min(self.bottom + margin, 1.0),
        )


def _pixel_span(low: float, high: float, *, length: int) -> tuple[int, int]:
    """First pixel and the one after the last that hold ``low`` to ``high`` of an axis: at least one pixel."""
    # 160 / 640 * 640 may come out as 160.00000000000003, whose ceiling is a pixel too far: round off float noise first.
    first = min(math.floor(round(low * length, 6)), length - 1)
    return first, max(math.ceil(round(high * length, 6)), first + 1)


@value
class Mask:
    """A soft part of an image: a grid of weights in [0, 1], stretched over the whole image.

    Make one with `Mask.from_array`; ``data`` is the compressed form for JSON.

    Raises:
        GeometryError: for a grid without cells, with no weight above 0, or with weights outside [0, 1] or not finite.

    >>> import artaug as aa, numpy as np
    >>> mask = aa.Mask.from_array(np.eye(2))
    >>> mask.height, mask.width, mask.to_array().tolist()
    (2, 2, [[1.0, 0.0], [0.0, 1.0]])
    """

    _advice: ClassVar[str] = " Make a Mask of an array with Mask.from_array(weights)."
    height: Annotated[int, Field(gt=0)]
    width: Annotated[int, Field(gt=0)]
    data: str = Field(repr=False)
    """Base64 of the zlib-compressed weights, little-endian float32, row by row."""

    def __post_init__(self) -> None:
        try:
            weights = self.to_array()
        except (ValueError, zlib.error) as error:
            raise GeometryError(
                f"a Mask of {self.height} x {self.width} holds data that does not decode to it ({error}). "
                "Make one with Mask.from_array."
            ) from None
        if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.max() <= 1):
            raise GeometryError(
                f"a Mask holds weights from {weights.min()} to {weights.max()}: need finite numbers in [0, 1]. "
                "Divide 8-bit masks by 255."
            )
        if not weights.any():
            raise GeometryError("a Mask without any weight covers nothing: need at least one cell above 0.")

    @classmethod
    def from_array(cls, weights: np.ndarray) -> Self:
        """Make a mask from an array (height, width) of weights in [0, 1]; booleans are taken as 0 and 1."""
        grid = np.asarray(weights)
        if grid.ndim != 2 or grid.size == 0:
            raise GeometryError(f"a Mask needs an array (height, width), received shape {grid.shape}.")
        raw = np.ascontiguousarray(grid, dtype="<f4").tobytes()
        return cls(grid.shape[0], grid.shape[1], base64.b64encode(zlib.compress(raw)).decode())

    def to_array(self) -> np.ndarray:
        """The weights as a new float32 array (height, width)."""
        raw = zlib.decompress(base64.b64decode(self.data))
        return np.frombuffer(raw, dtype="<f4").reshape(self.height, self.width).astype(np.float32)
