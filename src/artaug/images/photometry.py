"""Photometric metrics of an image: exposure, chroma, contrast and sharpness, each in [0, 1], higher is better.

Pure functions of sRGB pixels, for scorers and critics. They depend neither on the prompt nor on what the image shows.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from PIL import Image

from artaug._internal.images import as_rgb

_LUMA = np.array([0.2126, 0.7152, 0.0722])  # ITU-R BT.709, the primaries of sRGB
_IDEAL, _TOLERANCE = 0.5, 0.2
_EXTREMELY_COLORFUL = 109 / 255
_BLUR_PX = 11
_ROUNDING = 1e-9  # far below one level of 8 bits: the edges of a flat image after floating-point arithmetic


def srgb(image: Image.Image) -> np.ndarray:
    """The pixels as sRGB in [0, 1]: a new float64 array (height, width, 3); see `as_rgb` for modes other than RGB.

    Raises:
        InvalidValueError: see `as_rgb`.
    """
    return np.asarray(as_rgb(image)).astype(np.float64) / 255


def luma(pixels: np.ndarray) -> np.ndarray:
    """Luma: the sRGB values with the weights of ITU-R BT.709, (height, width, 3) to (height, width), in [0, 1]."""
    weighted: np.ndarray = pixels @ _LUMA
    return weighted


def exposure(pixels: np.ndarray) -> float:
    """Exposure: mean over pixels of ``exp(-(Y - 0.5)^2 / (2 * 0.2^2))``, Y the luma.

    1 where every pixel is mid-grey, 0.04 for pure black or white. Mertens, Kautz and Van Reeth, "Exposure Fusion"
    (2007), section 3.1, on luma instead of each channel, so that a strong colour does not count as a bad exposure.

    >>> import numpy as np
    >>> from artaug.images.photometry import exposure
    >>> exposure(np.full((4, 4, 3), 0.5)), round(exposure(np.zeros((4, 4, 3))), 3)
    (1.0, 0.044)
    """
    return float(np.exp(-((luma(pixels) - _IDEAL) ** 2) / (2 * _TOLERANCE**2)).mean())


def chroma(pixels: np.ndarray) -> float:
    """Chroma: the index M of Hasler and Suesstrunk, divided by its "extremely colourful" 109, at most 1.

    With ``rg = R - G`` and ``yb = (R + G) / 2 - B``, M is ``sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 +
    mean(yb)^2)``; 0 for greys. "Measuring colourfulness in natural images" (2003), equation 10.

    >>> import numpy as np
    >>> from artaug.images.photometry import chroma
    >>> chroma(np.full((4, 4, 3), 0.3))
    0.0
    """
    red, green, blue = np.moveaxis(pixels, 2, 0)
    opponents = np.stack([red - green, (red + green) / 2 - blue])
    spread = np.sqrt(opponents.var(axis=(1, 2)).sum())
    offset = np.sqrt((opponents.mean(axis=(1, 2)) ** 2).sum())
    return float(min((spread + 0.3 * offset) / _EXTREMELY_COLORFUL, 1.0))


def contrast(pixels: np.ndarray) -> float:
    """Contrast: twice the standard deviation of the luma (RMS contrast), at most 1.

    0 for a flat picture, 1 for one half black and half white. Peli, "Contrast in complex images" (1990), equation 4.
    """
    return float(min(2 * luma(pixels).std(), 1.0))


def sharpness(pixels: np.ndarray) -> float:
    """Sharpness: 1 minus the blur effect of Crete, Dolmiere, Ladret and Nicolas (2007), of the blurrier axis.

    An image that loses much of its edges when it is blurred again was sharp: along each axis, the sum of what a mean over
    11 pixels takes from the edges (absolute Sobel differences of the luma), divided by the sum of the edges. It is that
    of ``skimage.measure.blur_effect``, but leaves out one pixel on every side, where that leaves out two on one side and
    so scores a mirrored image differently. An image without edges has sharpness 0.

    The metric depends on the size in pixels: compare images of one size only.
    """
    effects = [effect for axis in (0, 1) if (effect := _blur_effect(luma(pixels), axis=axis)) is not None]
    return 1 - max(effects, default=1.0)


def _blur_effect(gray: np.ndarray, *, axis: int) -> float | None:
    """Fraction in [0, 1] of the edges along ``axis`` that remain after another blur; None where there are no edges."""
    gray = np.moveaxis(gray, axis, 0)
    if min(gray.shape) < 3:  # only border
        return None
    before, after = _edges(gray), _edges(_box_blur(gray))
    total = before.sum()
    if total <= _ROUNDING * before.size:
        return None
    return float(1 - np.maximum(before - after, 0).sum() / total)


def _box_blur(gray: np.ndarray) -> np.ndarray:
    """Mean over `_BLUR_PX` rows, the image mirrored at its border; a difference of cumulative sums."""
    half = _BLUR_PX // 2
    padded = np.pad(gray, ((half, half), (0, 0)), mode="symmetric")
    sums = np.cumsum(np.concatenate([np.zeros((1, gray.shape[1])), padded]), axis=0)
    means: np.ndarray = (sums[_BLUR_PX:] - sums[:-_BLUR_PX]) / _BLUR_PX
    return means


def _edges(gray: np.ndarray) -> np.ndarray:
    """Absolute Sobel differences from row to row: (height, width) to (height - 2, width - 2)."""
    differences = (gray[2:] - gray[:-2]) / 2
    edges: np.ndarray = np.abs(differences[:, :-2] + 2 * differences[:, 1:-1] + differences[:, 2:]) / 4
    return edges


METRICS: Mapping[str, Callable[[np.ndarray], float]] = MappingProxyType(
    {"exposure": exposure, "chroma": chroma, "contrast": contrast, "sharpness": sharpness}
)
"""The four metrics by name: each takes pixels (height, width, 3) in [0, 1] and returns a number in [0, 1]."""
