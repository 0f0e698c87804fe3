"""What baking has made, file by file, and what it has cost, layer by layer."""

from collections.abc import Iterator
from html import escape
from math import fsum, sqrt
from pathlib import Path
from typing import Annotated

from pydantic import Field

from artaug._internal.text import table_html
from artaug._internal.values import value

_MIB = 2**20


@value
class BakedLayer:
    """What became of one layer's weight."""

    dtype: str
    """What it is stored in, as safetensors calls it: ``BF16``, ``F16``, ``F32``."""
    weights: Annotated[int, Field(ge=1)]
    """How many numbers it has."""
    unchanged: Annotated[int, Field(ge=0)]
    """How many of them are, after rounding, what they were before."""
    update: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Frobenius norm of the LoRA's update."""
    error: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Frobenius norm of what is stored less what was wanted."""

    @property
    def lost(self) -> float:
        """Rounding error as a share of the update: 0 for nothing, around 1 where no more arrives than noise."""
        return self.error / self.update if self.update else 0.0


@value
class BakedFile:
    """One file written."""

    size: Annotated[int, Field(ge=0)]
    """In bytes."""
    sha256: str


@value
class Baked:
    """A checkpoint with a LoRA added to its weights. ``print`` it, or look at it in a notebook."""

    path: Path
    """The folder or file written."""
    layers: dict[str, BakedLayer]
    """By layer name, those the LoRA updates."""
    files: dict[str, BakedFile]
    """By path in the folder, all of them."""
    seconds: float

    @property
    def size(self) -> int:
        """In bytes, all files."""
        return sum(file.size for file in self.files.values())

    @property
    def lost(self) -> float:
        """Rounding error over all layers, as a share of the whole update."""
        update = sqrt(fsum(layer.update**2 for layer in self.layers.values()))
        return sqrt(fsum(layer.error**2 for layer in self.layers.values())) / update if update else 0.0

    @property
    def unchanged(self) -> float:
        """Share of the weights, in the layers the LoRA updates, that are what they were before."""
        layers = self.layers.values()
        return sum(layer.unchanged for layer in layers) / sum(layer.weights for layer in layers)

    def __str__(self) -> str:
        worst = ", ".join(f"{name} ({layer.lost:.1%})" for name, layer in self._worst()[:3])
        return "\n".join(
            [*self._told(), f"most lost in {worst}", *(f"{sha}  {name}" for name, _, sha in self._listed())]
        )

    def _repr_html_(self) -> str:
        """The totals, then every file, then every layer, those that lost most first."""
        layers = (
            (name, one.dtype, f"{one.lost:.2%}", f"{one.unchanged / one.weights:.2%}") for name, one in self._worst()
        )
        return (
            f"<p>{'<br>'.join(map(escape, self._told()))}</p>"
            + _folded("files", table_html(("file", "MiB", "sha256"), self._listed()))
            + _folded("layers", table_html(("layer", "stored as", "lost to rounding", "weights unchanged"), layers))
        )

    def _told(self) -> list[str]:
        dtypes = ", ".join(sorted({layer.dtype for layer in self.layers.values()}))
        made = f"{len(self.files)} files, {self.size / _MIB:,.1f} MiB, {self.seconds:.1f} s"
        return [
            f"baked {len(self.layers)} layers into {self.path}: {made}",
            f"{self.lost:.2%} of the update lost to rounding ({dtypes}), {self.unchanged:.2%} of the weights unchanged",
        ]

    def _worst(self) -> list[tuple[str, BakedLayer]]:
        return sorted(self.layers.items(), key=lambda item: -item[1].lost)

    def _listed(self) -> Iterator[tuple[str, str, str]]:
        for name, file in self.files.items():
            yield name, f"{file.size / _MIB:,.1f}", file.sha256


def _folded(title: str, table: str) -> str:
    return f"<details><summary>{title}</summary><div style='max-height:20em;overflow:auto'>{table}</div></details>"
