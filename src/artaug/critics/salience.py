"""Where something stands out in a picture, without knowing what it is.

The picture is made small, cut into even-coloured parts (Felzenszwalb and Huttenlocher, "Efficient Graph-Based Image
Segmentation", 2004), and the parts that differ in colour from what surrounds them are the ones that stand out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from artaug._internal.images import as_rgb
from artaug.geometry import Box
from artaug.images.photometry import srgb

WORKING_PX = 48
"""The longer side of the picture that is looked at: details smaller than a 48th of it are none of ours."""

# Chosen on other rendered scenes of the playground than those docs/critics.md has numbers of; colours are OKLab.
_LIGHTNESS = 0.22  # a shadow or a highlight must not cut an object in two
_COARSENESS = 0.15
_LEAST_PX = 17
_SMALLEST, _LARGEST = 0.01, 0.4
_SURROUND = 0.25
_AGAINST_BEST = 0.4
_REPEATED, _INSIDE = 0.4, 0.7

_LMS_FROM_RGB = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_LAB_FROM_LMS = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


@dataclass(frozen=True)
class _Part:
    """A part that may stand out: where, and by how much."""

    box: Box
    salience: float


def salient_boxes(image: Image.Image, *, at_most: int) -> list[Box]:
    """Boxes of what stands out, the most striking first; none in an even picture.

    Parts that cover much of the picture or lie along two of its sides are background, and a part inside another one
    belongs to it.

    >>> import numpy as np
    >>> from PIL import Image
    >>> from artaug.critics.salience import salient_boxes
    >>> pixels = np.full((64, 64, 3), 90, dtype=np.uint8)
    >>> pixels[16:48, 32:56] = (200, 40, 40)
    >>> salient_boxes(Image.fromarray(pixels), at_most=4)
    [Box(left=0.5, top=0.25, right=0.875, bottom=0.75)]
    """
    small = as_rgb(image)
    if max(small.size) > WORKING_PX:
        shrunk = [max(1, round(side * WORKING_PX / max(small.size))) for side in small.size]
        small = small.resize((shrunk[0], shrunk[1]), Image.Resampling.BOX)
    colours = _oklab(srgb(small)) * (_LIGHTNESS, 1, 1)
    found = sorted(_parts(colours, segments(colours)), key=lambda part: -part.salience)
    taken: list[Box] = []
    for part in found:
        striking = part.salience >= _AGAINST_BEST * found[0].salience
        if striking and not any(_repeats(part.box, earlier) for earlier in taken):
            taken.append(part.box)
    return taken[:at_most]


def segments(colours: np.ndarray) -> np.ndarray:
    """Number the even-coloured parts of a picture.

    Neighbouring pixels are joined from the most alike to the least, two parts only as long as the step between them
    is no larger than the largest step inside either plus an allowance that shrinks as the part grows.

    Args:
        colours: (height, width, channels), in units in which differences are perceived alike.

    Returns:
        The number of each pixel's part: (height, width), counted from 0.
    """
    height, width, _ = colours.shape
    flat, index = colours.reshape(height * width, -1), np.arange(height * width).reshape(height, width)
    beside = np.stack([index[:, :-1].ravel(), index[:, 1:].ravel()])
    below = np.stack([index[:-1].ravel(), index[1:].ravel()])
    ones, others = np.concatenate([beside, below], axis=1)
    steps = np.linalg.norm(flat[ones] - flat[others], axis=1)
    order = np.argsort(steps, kind="stable")
    neighbours = list(zip(ones[order].tolist(), others[order].tolist(), steps[order].tolist(), strict=True))
    part_of = list(range(height * width))
    members = [[pixel] for pixel in part_of]
    tolerated = [_COARSENESS] * len(part_of)
    for one, other, step in neighbours:
        first, second = part_of[one], part_of[other]
        if first != second and step <= min(tolerated[first], tolerated[second]):
            joined = _join(first, second, part_of, members)
            tolerated[joined] = step + _COARSENESS / len(members[joined])
    for one, other, _step in neighbours:
        first, second = part_of[one], part_of[other]
        if first != second and min(len(members[first]), len(members[second])) < _LEAST_PX:
            _join(first, second, part_of, members)
    numbers: np.ndarray = np.unique(part_of, return_inverse=True)[1].reshape(height, width)
    return numbers


def _join(first: int, second: int, part_of: list[int], members: list[list[int]]) -> int:
    """Let the smaller part become one with the larger, whose number stays."""
    small, large = sorted((first, second), key=lambda part: len(members[part]))
    for pixel in members[small]:
        part_of[pixel] = large
    members[large] += members[small]
    members[small] = []
    return large


def _parts(colours: np.ndarray, numbers: np.ndarray) -> Iterator[_Part]:
    """The parts that could be something: neither specks nor background."""
    height, width = numbers.shape
    for number in range(numbers.max() + 1):
        inside = numbers == number
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
        box = Box.from_pixels(left, top, right, bottom, size=(width, height))
        sides = sum((left == 0, top == 0, right == width, bottom == height))
        if sides > 1 or not _SMALLEST <= box.area <= _LARGEST:
            continue
        reach = max(2, int(_SURROUND * max(right - left, bottom - top)))
        around = np.zeros_like(inside)
        around[max(top - reach, 0) : bottom + reach, max(left - reach, 0) : right + reach] = True
        away = np.linalg.norm(colours[inside].mean(axis=0) - colours[around & ~inside].mean(axis=0))
        yield _Part(box, float(away * np.sqrt(inside.mean())))


def _repeats(box: Box, earlier: Box) -> bool:
    return box.iou(earlier) > _REPEATED or box.overlap(earlier) > _INSIDE * box.area


def _oklab(pixels: np.ndarray) -> np.ndarray:
    """Turn sRGB in [0, 1] into OKLab (Ottosson 2020), channels last."""
    linear = np.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
    lab: np.ndarray = np.cbrt(linear @ _LMS_FROM_RGB.T) @ _LAB_FROM_LMS.T
    return lab
