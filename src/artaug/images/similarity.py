"""How alike two pictures are: what a filter may ask of before and after, and what diversity is measured with."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Protocol, TypeAlias, final

import numpy as np
from PIL.Image import Image

from artaug._internal.contracts import check_numbers
from artaug.errors import ContractError, InvalidValueError, NonFiniteError
from artaug.images.photometry import luma, srgb

_WINDOW_PX, _SIGMA_PX = 11, 1.5
_STEADY = (0.01**2, 0.03**2)


class ImageSimilarity(ABC):
    """Says how alike two pictures are; higher is more alike, and 1 means the same.

    Subclass it and write `compare`.

    >>> import artaug as aa
    >>> class SameWidth(aa.ImageSimilarity):
    ...     def compare(self, one, other):
    ...         return float(one.width == other.width)
    >>> SameWidth().name
    'SameWidth'
    """

    @property
    def name(self) -> str:
        """What verdicts call this measure."""
        return type(self).__name__

    @abstractmethod
    def compare(self, one: Image, other: Image) -> float:
        """Compare two pictures."""

    def compare_batch(self, ones: Sequence[Image], others: Sequence[Image]) -> list[float]:
        """Compare many, in pairs. Override it where a batch is faster than a loop."""
        return [self.compare(one, other) for one, other in zip(ones, others, strict=True)]


SimilarityMetric: TypeAlias = ImageSimilarity | Callable[[Image, Image], float]
"""A `ImageSimilarity`, or any function of two pictures that gives a number, higher for more alike."""


def metric_name(measure: SimilarityMetric) -> str:
    """What to call a measure: the name of a `ImageSimilarity`, else of the function."""
    return (
        measure.name if isinstance(measure, ImageSimilarity) else getattr(measure, "__name__", type(measure).__name__)
    )


def compare_pairs(measure: SimilarityMetric, ones: Sequence[Image], others: Sequence[Image]) -> list[float]:
    """Compare pictures in pairs and check the answers: one finite number a pair.

    Raises:
        ContractError: if there are too few numbers, or something that is no number.
        NonFiniteError: if a number is NaN or infinite.
    """
    name = metric_name(measure)
    if isinstance(measure, ImageSimilarity):
        return check_numbers(name, "compare_batch", measure.compare_batch(ones, others), count=len(ones), per="pair")
    answers = [measure(one, other) for one, other in zip(ones, others, strict=True)]
    return check_numbers(name, "", answers, count=len(ones), per="pair")


def diversity(measure: SimilarityMetric, images: Sequence[Image]) -> float:
    """How unlike pictures of one prompt are: 1 less the mean likeness of every two of them.

    Raises:
        InvalidValueError: for fewer than two pictures, which have nothing to differ from.

    >>> from artaug.images.similarity import StructuralSimilarity, diversity
    >>> from PIL import Image
    >>> diversity(StructuralSimilarity(), [Image.new("RGB", (16, 16), "teal")] * 3)
    0.0
    """
    if len(images) < 2:
        raise InvalidValueError(f"diversity of {len(images)} picture(s): need at least 2 pictures of one prompt.")
    pairs = list(combinations(images, 2))
    likenesses = compare_pairs(measure, [one for one, _ in pairs], [other for _, other in pairs])
    return 1 - math.fsum(likenesses) / len(likenesses)


class Embedder(Protocol):
    """What `EmbeddingSimilarity` asks of a model; the encoders of ``artaug.scorers`` have it."""

    @property
    def name(self) -> str:
        """What to call it."""

    def embed_images(self, images: Sequence[Image]) -> "np.typing.ArrayLike":
        """A vector for each picture: (pictures, features)."""


@final
@dataclass(frozen=True)
class EmbeddingSimilarity(ImageSimilarity):
    """Cosine of the two pictures' vectors, in [-1, 1]: alike in what the model sees, whatever the pixels are.

    Raises:
        NonFiniteError: when a vector has no direction.
    """

    embedder: Embedder
    """Such as ``artaug.scorers.ImageEncoder``."""

    @property
    def name(self) -> str:
        return self.embedder.name

    def compare(self, one: Image, other: Image) -> float:
        return self.compare_batch([one], [other])[0]

    def compare_batch(self, ones: Sequence[Image], others: Sequence[Image]) -> list[float]:
        if not ones:
            return []
        vectors = np.asarray(self.embedder.embed_images([*ones, *others]), dtype=np.float64)
        if vectors.ndim != 2 or len(vectors) != 2 * len(ones):
            raise ContractError(
                f"{self.name}.embed_images returned shape {vectors.shape} for {2 * len(ones)} pictures. "
                "Expected a vector each."
            )
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not (np.isfinite(lengths) & (lengths > 0)).all():
            raise NonFiniteError(f"{self.name}.embed_images returned a vector without direction: zero, or not finite.")
        unit = vectors / lengths
        return [float(cosine) for cosine in (unit[: len(ones)] * unit[len(ones) :]).sum(axis=1)]


@final
@dataclass(frozen=True)
class StructuralSimilarity(ImageSimilarity):
    """SSIM of the two pictures' brightness, in [-1, 1]: alike in where things are, with their light and contrast.

    Wang et al. 2004 (Image quality assessment: from error visibility to structural similarity), equation 13, with
    their Gaussian window of 11 pixels and deviation 1.5, averaged where the window fits whole. It needs no model;
    it is blind to colour, and to a thing that moved by more than a few pixels everything changed.

    >>> import artaug as aa
    >>> from PIL import Image
    >>> grey, lit = (Image.new("RGB", (32, 32), colour) for colour in ("#808080", "#a0a0a0"))
    >>> round(aa.StructuralSimilarity().compare(grey, lit), 3)
    0.976
    """

    side_px: int | None = field(default=None, kw_only=True)
    """Make pictures at most this wide and high first, so that grain does not count; None to take them as they are."""

    def __post_init__(self) -> None:
        if self.side_px is not None and self.side_px < 1:
            raise InvalidValueError(f"{self!r}: need side_px of at least 1, or None.")

    def compare(self, one: Image, other: Image) -> float:
        if one.size != other.size:
            raise InvalidValueError(
                f"the two pictures differ in size, {one.size} and {other.size}: SSIM compares pixel by pixel."
            )
        first, second = (self._brightness(image) for image in (one, other))
        window = _window(min(_WINDOW_PX, *first.shape))
        mean, other_mean = _blurred(first, window), _blurred(second, window)
        spread = _blurred(first**2, window) - mean**2
        other_spread = _blurred(second**2, window) - other_mean**2
        shared = _blurred(first * second, window) - mean * other_mean
        light, contrast = _STEADY
        ratio = (2 * mean * other_mean + light) / (mean**2 + other_mean**2 + light)
        return float((ratio * (2 * shared + contrast) / (spread + other_spread + contrast)).mean())

    def _brightness(self, image: Image) -> np.ndarray:
        if self.side_px is not None:
            image = image.copy()
            image.thumbnail((self.side_px, self.side_px))
        return luma(srgb(image))


def _window(width: int) -> np.ndarray:
    offsets = np.arange(width) - (width - 1) / 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA_PX**2))
    shares: np.ndarray = weights / weights.sum()
    return shares


def _blurred(pixels: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Weighted means of every place where the window fits whole."""
    for axis in (0, 1):
        pixels = np.lib.stride_tricks.sliding_window_view(pixels, len(window), axis=axis) @ window
    return pixels
