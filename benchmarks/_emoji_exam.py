"""How far drawn emoji went from flat to 3D, how far beside the way, and whether they still show their subject."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from artaug.evaluation.statistics import paired_bootstrap
from benchmarks import _record as record
from benchmarks._emoji_packages import to_image
from benchmarks._outside_judges import EfficientNetLite0


class Features(Protocol):
    """A judge that is not ours: from pictures in [0, 1] to one vector each."""

    def __call__(self, pictures: Tensor, /) -> Tensor:
        """Pictures x numbers."""


def efficientnet() -> Features:
    """EfficientNet-Lite0 of ImageNet."""
    judge = EfficientNetLite0.load()

    def features(pictures: Tensor) -> Tensor:
        return torch.from_numpy(judge.features([to_image(picture) for picture in pictures])).float()

    return features


def pixels(pictures: Tensor) -> Tensor:
    """The plainest features: the colors themselves."""
    return pictures.flatten(1)


@dataclass(frozen=True, kw_only=True)
class Exam:
    """The true pictures of the names that are drawn, and what the base draws of them."""

    flat: Tensor
    """The true flat pictures, names x 3 x side x side in [0, 1]."""
    solid: Tensor
    """The true 3D pictures."""
    base: Tensor
    """What the base draws."""
    candidates: Tensor
    """The true flat pictures of all subjects of the base, those of the names first: what a drawn one is recognized among."""
    features: Mapping[str, Features]
    """Further judges by name; pixels are always there."""

    def row(self, drawn: Tensor) -> record.Row:
        """The columns of a row: means over names, with 95% intervals of the two that decide.

        With ``d`` the true 3D picture less the true flat one and ``m`` what was drawn less what the base draws with the same
        seed, ``progress`` is the part of ``d`` that was gone, ``<m, d> / |d|^2``: 0 for the base, 1 for all the way.
        ``beside`` is the squared length of the rest of ``m``, relative to ``|d|^2``. ``distance`` is the distance to the true
        3D picture relative to that of the base, ``nearer_3d`` the share of pictures nearer to the 3D than to the flat
        one, ``subject`` the share whose nearest flat picture among all subjects is that of their own name.
        ``subject_3d`` is the same among the true 3D pictures of the tested names.
        """
        judged: dict[str, float] = {}
        for name, (features, references) in self._judges.items():
            found = _judge(features(drawn), *references)
            judged |= {f"{name}_{key}".lstrip("_"): float(values.mean()) for key, values in found.items()}
            if not name:
                for key in ("progress", "subject"):
                    interval = paired_bootstrap(found[key].numpy())
                    judged |= {f"{key}_low": interval.low, f"{key}_high": interval.high}
        return judged

    @cached_property
    def _judges(self) -> Mapping[str, tuple[Features, Sequence[Tensor]]]:
        """Each judge, and what it makes of the pictures that all drawn ones are compared with."""
        references = (self.flat, self.solid, self.base, self.candidates)
        return {
            name: (features, [features(pictures) for pictures in references])
            for name, features in {"": pixels, **self.features}.items()
        }


def _judge(own: Tensor, flat: Tensor, solid: Tensor, base: Tensor, candidates: Tensor) -> Mapping[str, Tensor]:
    change, moved = solid - flat, own - base
    size = change.square().sum(1).clamp(min=1e-12)
    progress = (moved * change).sum(1) / size
    to_solid, to_flat = (own - solid).norm(dim=1), (own - flat).norm(dim=1)
    return {
        "progress": progress,
        "beside": (moved - progress[:, None] * change).square().sum(1) / size,
        "distance": to_solid / (base - solid).norm(dim=1).clamp(min=1e-12),
        "nearer_3d": (to_solid < to_flat).float(),
        "subject": _recognized(own, candidates),
        "subject_3d": _recognized(own, solid),
    }


def _recognized(own: Tensor, candidates: Tensor) -> Tensor:
    """1 where the nearest candidate is that of the same row."""
    return (torch.cdist(own, candidates).argmin(1) == torch.arange(len(own))).float()
