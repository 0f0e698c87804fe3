"""Boxes of the regions that stand out in a picture by their color, without knowing what they show.

The picture is reduced, cut into regions of even color (Felzenszwalb and Huttenlocher, "Efficient Graph-Based Image
Segmentation", 2004), and regions whose color differs from what surrounds them are salient.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from artaug._internal.images import as_rgb
from artaug.geometry import Box
from artaug.images.photometry import srgb

WORKING_PX = 48
"""The longer side of the reduced picture: details smaller than a 48th of it are ignored."""

# Chosen on rendered scenes of the playground other than those docs/critics.md reports on. Colors are OKLab, whose
# distances are roughly perceptual.
_LIGHTNESS_WEIGHT = 0.22  # low, so that a shadow or a highlight does not cut an object in two
_SCALE = 0.15  # k of the paper: larger values give larger segments
_MIN_SEGMENT_PX = 17
_MIN_AREA, _MAX_AREA = 0.01, 0.4  # of a salient region's box, as a fraction of the picture
_SURROUND = 0.25  # width of the ring that a region is compared with, as a fraction of the longer side of its box
_MIN_RELATIVE_SALIENCE = 0.4  # of the most salient region's
_MAX_IOU, _MAX_INSIDE = 0.4, 0.7  # of a box with an earlier one, and of its area inside an earlier one

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
class _SalientRegion:
    """A region that may stand out: where, and by how much."""

    box: Box
    salience: float


def salient_boxes(image: Image.Image, *, max_boxes: int) -> list[Box]:
    """Boxes of the regions that stand out, the most salient first; none in an even picture.

    A region that touches two or more sides of the picture, or covers much of it, is background; a region inside another
    belongs to that one.

    >>> import numpy as np
    >>> from PIL import Image
    >>> from artaug.critics.salience import salient_boxes
    >>> pixels = np.full((64, 64, 3), 90, dtype=np.uint8)
    >>> pixels[16:48, 32:56] = (200, 40, 40)
    >>> salient_boxes(Image.fromarray(pixels), max_boxes=4)
    [Box(left=0.5, top=0.25, right=0.875, bottom=0.75)]
    """
    small = as_rgb(image)
    if max(small.size) > WORKING_PX:
        width, height = (max(1, round(side * WORKING_PX / max(small.size))) for side in small.size)
        small = small.resize((width, height), Image.Resampling.BOX)
    colors = _oklab(srgb(small)) * (_LIGHTNESS_WEIGHT, 1, 1)
    regions = sorted(_regions(colors, segment(colors)), key=lambda region: -region.salience)
    boxes: list[Box] = []
    for region in regions:
        salient = region.salience >= _MIN_RELATIVE_SALIENCE * regions[0].salience
        repeated = any(
            region.box.iou(box) > _MAX_IOU or region.box.overlap(box) > _MAX_INSIDE * region.box.area for box in boxes
        )
        if salient and not repeated:
            boxes.append(region.box)
    return boxes[:max_boxes]


def segment(colors: np.ndarray) -> np.ndarray:
    """Label the regions of even color.

    The pixels are the nodes of a graph, and neighbors have an edge weighted by the distance ``d`` of their colors. In
    the order of ``d``, an edge joins two segments A and B if ``d <= min(Int(A) + k / |A|, Int(B) + k / |B|)``, where
    ``Int`` is the largest edge that joined a segment and ``|A|`` its number of pixels: large segments must be
    homogeneous, small ones join easily. Then segments of fewer than 17 pixels join a neighbor.

    Args:
        colors: (height, width, channels), in units in which distances are perceptual.

    Returns:
        The label of each pixel's segment: (height, width), counted from 0.
    """
    height, width, _ = colors.shape
    flat, index = colors.reshape(height * width, -1), np.arange(height * width).reshape(height, width)
    horizontal = np.stack([index[:, :-1].ravel(), index[:, 1:].ravel()])
    vertical = np.stack([index[:-1].ravel(), index[1:].ravel()])
    sources, targets = np.concatenate([horizontal, vertical], axis=1)  # (edges,) each
    distances = np.linalg.norm(flat[sources] - flat[targets], axis=1)
    order = np.argsort(distances, kind="stable")
    edges = list(zip(sources[order].tolist(), targets[order].tolist(), distances[order].tolist(), strict=True))
    segment_of = list(range(height * width))
    members = [[pixel] for pixel in segment_of]
    threshold = [_SCALE] * len(segment_of)  # Int(A) + k / |A|; a single pixel has Int = 0 and |A| = 1
    for source, target, distance in edges:
        first, second = segment_of[source], segment_of[target]
        if first != second and distance <= min(threshold[first], threshold[second]):
            merged = _merge_segments(first, second, segment_of, members)
            threshold[merged] = distance + _SCALE / len(members[merged])  # edges come sorted, so Int is this distance
    for source, target, _distance in edges:
        first, second = segment_of[source], segment_of[target]
        if first != second and min(len(members[first]), len(members[second])) < _MIN_SEGMENT_PX:
            _merge_segments(first, second, segment_of, members)
    labels: np.ndarray = np.unique(segment_of, return_inverse=True)[1].reshape(height, width)
    return labels


def _merge_segments(first: int, second: int, segment_of: list[int], members: list[list[int]]) -> int:
    """Move the pixels of the smaller segment to the larger one, whose number is returned."""
    small, large = sorted((first, second), key=lambda number: len(members[number]))
    for pixel in members[small]:
        segment_of[pixel] = large
    members[large] += members[small]
    members[small] = []
    return large


def _regions(colors: np.ndarray, labels: np.ndarray) -> Iterator[_SalientRegion]:
    """The segments that may be an object: neither too small nor background."""
    height, width = labels.shape
    for label in range(labels.max() + 1):
        inside = labels == label
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
        box = Box.from_pixels(left, top, right, bottom, size=(width, height))
        sides = sum((left == 0, top == 0, right == width, bottom == height))
        if sides > 1 or not _MIN_AREA <= box.area <= _MAX_AREA:
            continue
        ring = max(2, int(_SURROUND * max(right - left, bottom - top)))
        around = np.zeros_like(inside)
        around[max(top - ring, 0) : bottom + ring, max(left - ring, 0) : right + ring] = True
        contrast = np.linalg.norm(colors[inside].mean(axis=0) - colors[around & ~inside].mean(axis=0))
        # Of two regions with the same contrast the larger is more salient: its length scale is the root of its area.
        yield _SalientRegion(box, float(contrast * np.sqrt(inside.mean())))


def _oklab(pixels: np.ndarray) -> np.ndarray:
    """Convert sRGB in [0, 1] to OKLab (Ottosson 2020), channels last."""
    linear = np.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
    lab: np.ndarray = np.cbrt(linear @ _LMS_FROM_RGB.T) @ _LAB_FROM_LMS.T
    return lab
