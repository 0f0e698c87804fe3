"""Similarity of two images, by structure (SSIM) or by embedding, and the diversity of several images."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Protocol, TypeAlias, final

import numpy as np
from PIL.Image import Image

from artaug._internal.annotations import Seam, checked
from artaug._internal.calls import call_part
from artaug._internal.contracts import check_numbers
from artaug._internal.images import as_rgb
from artaug._internal.memory import FittingBatches
from artaug.errors import ContractError, InvalidValueError, NonFiniteError
from artaug.images.photometry import luma, srgb

if TYPE_CHECKING:
    from torch import nn

_MAX_PAIRS_PER_CALL = 128
_WINDOW_PX, _SIGMA_PX = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
"""The paper's constants for pixels in [0, 1]: they keep the quotients finite where an image is black or flat."""


class ImageSimilarity(Seam):
    """Similarity of two images; higher is more similar, and 1 means the same.

    Subclass it and write `compare`.

    >>> import artaug as aa
    >>> class SameWidth(aa.ImageSimilarity):
    ...     def compare(self, first, second):
    ...         return float(first.width == second.width)
    >>> SameWidth().name
    'SameWidth'
    """

    @property
    def name(self) -> str:
        """Name of this metric in verdicts."""
        return type(self).__name__

    @property
    def models(self) -> "Sequence[nn.Module]":
        """What it computes with on a device, for `OneAtATime`, which moves these; whatever is not named stays where it is."""
        return ()

    @abstractmethod
    def compare(self, first: Image, second: Image) -> float:
        """Compare two images."""

    def compare_batch(self, first: Sequence[Image], second: Sequence[Image]) -> list[float]:
        """Compare images in pairs. Override it where a batch is faster than a loop."""
        return [self.compare(*pair) for pair in zip(first, second, strict=True)]


SimilarityMetric: TypeAlias = ImageSimilarity | Callable[[Image, Image], float]
"""An `ImageSimilarity`, or any function of two images that returns a number, higher for more similar."""


def metric_name(metric: SimilarityMetric) -> str:
    """Name of a metric: that of the `ImageSimilarity`, else of the function."""
    return metric.name if isinstance(metric, ImageSimilarity) else getattr(metric, "__name__", type(metric).__name__)


def compare_pairs(metric: SimilarityMetric, first: Sequence[Image], second: Sequence[Image]) -> list[float]:
    """Compare images in pairs and check what the metric returned: one finite number a pair.

    Where memory runs out, the batch is halved.

    Raises:
        PartError: if the metric raised; an `ArtAugError` of its own is raised as it is, with a note.
        ContractError: if there are too few numbers, or something that is not a number.
        NonFiniteError: if a number is NaN or infinite.
    """
    name, method = metric_name(metric), "compare_batch" if isinstance(metric, ImageSimilarity) else ""

    def compare(left: Sequence[Image], right: Sequence[Image]) -> Sequence[float]:
        if isinstance(metric, ImageSimilarity):
            return metric.compare_batch(left, right)
        return [metric(*pair) for pair in zip(left, right, strict=True)]

    def call(members: Sequence[int]) -> list[float]:
        inputs = f"{len(members)} pairs of pictures"
        left, right = [first[index] for index in members], [second[index] for index in members]
        numbers = call_part(lambda: compare(left, right), owner=name, inputs=inputs)
        return check_numbers(name, method, numbers, count=len(members), per="pair")

    parts = FittingBatches(_MAX_PAIRS_PER_CALL).run(
        call,
        range(len(first)),
        owner=name,
        item="pair",
        remedy="Load its model in lower precision or on another device.",
    )
    return [number for _, numbers in parts for number in numbers]


def diversity(metric: SimilarityMetric, images: Sequence[Image]) -> float:
    """Diversity of images of one prompt: 1 minus the mean similarity of all pairs of them.

    Raises:
        InvalidValueError: for fewer than two images.

    >>> from artaug.images.similarity import StructuralSimilarity, diversity
    >>> from PIL import Image
    >>> diversity(StructuralSimilarity(), [Image.new("RGB", (16, 16), "teal")] * 3)
    0.0
    """
    if len(images) < 2:
        raise InvalidValueError(f"diversity of {len(images)} picture(s): need at least 2 pictures of one prompt.")
    first, second = zip(*combinations(images, 2), strict=True)
    similarities = compare_pairs(metric, first, second)
    return 1 - math.fsum(similarities) / len(similarities)


class Embedder(Protocol):
    """What `EmbeddingSimilarity` needs of a model; the encoders of ``artaug.scorers`` have it."""

    @property
    def name(self) -> str:
        """Name of the model."""

    def embed_images(self, images: Sequence[Image]) -> "np.typing.ArrayLike":
        """Embed images: (images, features)."""


@checked
@final
@dataclass(frozen=True)
class EmbeddingSimilarity(ImageSimilarity):
    """Cosine similarity of the two images' embeddings, in [-1, 1]: it compares content, not pixels.

    Raises:
        NonFiniteError: when an embedding is zero or not finite, so that it has no direction.
    """

    embedder: Embedder
    """Such as ``artaug.scorers.ImageEncoder``."""

    @property
    def name(self) -> str:
        return self.embedder.name

    @property
    def models(self) -> "Sequence[nn.Module]":
        return getattr(self.embedder, "models", ())

    def compare(self, first: Image, second: Image) -> float:
        return self.compare_batch([first], [second])[0]

    def compare_batch(self, first: Sequence[Image], second: Sequence[Image]) -> list[float]:
        if not first:
            return []
        embeddings = np.asarray(self.embedder.embed_images([*first, *second]), dtype=np.float64)
        if embeddings.ndim != 2 or len(embeddings) != 2 * len(first):
            raise ContractError(
                f"{self.name}.embed_images returned shape {embeddings.shape} for {2 * len(first)} pictures. "
                "Expected a vector each."
            )
        norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        if not (np.isfinite(norms) & (norms > 0)).all():
            raise NonFiniteError(f"{self.name}.embed_images returned a vector without direction: zero, or not finite.")
        unit = embeddings / norms
        return [float(cosine) for cosine in (unit[: len(first)] * unit[len(first) :]).sum(axis=1)]


@checked
@final
@dataclass(frozen=True)
class StructuralSimilarity(ImageSimilarity):
    """SSIM of the two images' luma, in [-1, 1]: it compares structure, light and contrast pixel by pixel.

    Wang et al. 2004 (Image quality assessment: from error visibility to structural similarity), equation 13, with
    their Gaussian window of 11 pixels and standard deviation 1.5, averaged over the places where the window lies inside
    the image. It needs no model. It ignores colour, and an object that moved by a few pixels counts as a full change.

    >>> import artaug as aa
    >>> from PIL import Image
    >>> grey, lit = (Image.new("RGB", (32, 32), color) for color in ("#808080", "#a0a0a0"))
    >>> round(aa.StructuralSimilarity().compare(grey, lit), 3)
    0.976
    """

    side_px: int | None = field(default=None, kw_only=True)
    """Downscale images to at most this width and height first, so that grain does not count; None to keep their size."""

    def __post_init__(self) -> None:
        if self.side_px is not None and self.side_px < 1:
            raise InvalidValueError(f"{self!r}: need side_px of at least 1, or None.")

    def compare(self, first: Image, second: Image) -> float:
        if first.size != second.size:
            raise InvalidValueError(
                f"the two pictures differ in size, {first.size} and {second.size}: SSIM compares pixel by pixel."
            )
        x, y = self._luma(first), self._luma(second)
        window = _gaussian_window(min(_WINDOW_PX, *x.shape))
        mean_x, mean_y = _filter(x, window), _filter(y, window)
        # Var(x) = E[x^2] - E[x]^2 and Cov(x, y) = E[xy] - E[x] E[y], each expectation weighted by the window.
        variance_x = _filter(x**2, window) - mean_x**2
        variance_y = _filter(y**2, window) - mean_y**2
        covariance = _filter(x * y, window) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
        return float((luminance * (2 * covariance + _C2) / (variance_x + variance_y + _C2)).mean())

    def _luma(self, image: Image) -> np.ndarray:
        if self.side_px is not None:
            image = as_rgb(image)  # first: a palette's indices cannot be averaged
            image.thumbnail((self.side_px, self.side_px))
        return luma(srgb(image))


def _gaussian_window(width: int) -> np.ndarray:
    """A Gaussian of ``width`` samples that sum to 1: (width,)."""
    offsets = np.arange(width) - (width - 1) / 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA_PX**2))
    window: np.ndarray = weights / weights.sum()
    return window


def _filter(pixels: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Weighted means where the window lies inside: (height, width) to (height - len + 1, width - len + 1)."""
    for axis in (0, 1):  # a Gaussian is separable
        pixels = np.lib.stride_tricks.sliding_window_view(pixels, len(window), axis=axis) @ window
    return pixels
