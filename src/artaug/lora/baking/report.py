"""The report of a bake: every file written, and the rounding error of every layer."""

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
    """The rounding error of one layer's weight."""

    dtype: str
    """The stored type, as safetensors calls it: ``BF16``, ``F16``, ``F32``."""
    numel: Annotated[int, Field(ge=1)]
    """Number of elements."""
    unchanged: Annotated[int, Field(ge=0)]
    """Number of elements that are the same as before, after rounding."""
    update_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Frobenius norm of the LoRA's update."""
    error_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Frobenius norm of the stored weight minus the exact sum."""

    @property
    def relative_error(self) -> float:
        """Rounding error over the update, in norms: 0 is exact; around 1 nothing but rounding noise was added."""
        return self.error_norm / self.update_norm if self.update_norm else 0.0


@value
class BakedFile:
    """One file written."""

    size: Annotated[int, Field(ge=0)]
    """In bytes."""
    sha256: str


@value
class BakedCheckpoint:
    """A checkpoint with a LoRA added to its weights. ``print`` it, or display it in a notebook."""

    path: Path
    """The folder or file written."""
    layers: dict[str, BakedLayer]
    """By layer name, those that the LoRA updates."""
    files: dict[str, BakedFile]
    """By path in the folder, all of them."""
    seconds: float

    @property
    def size(self) -> int:
        """In bytes, all files."""
        return sum(file.size for file in self.files.values())

    @property
    def relative_error(self) -> float:
        """Rounding error over the update, in norms over all layers."""
        update_norm = sqrt(fsum(layer.update_norm**2 for layer in self.layers.values()))
        return sqrt(fsum(layer.error_norm**2 for layer in self.layers.values())) / update_norm if update_norm else 0.0

    @property
    def unchanged(self) -> float:
        """Share of the elements, in the layers that the LoRA updates, that are the same as before."""
        layers = self.layers.values()
        return sum(layer.unchanged for layer in layers) / sum(layer.numel for layer in layers)

    def __str__(self) -> str:
        worst = ", ".join(f"{name} ({layer.relative_error:.1%})" for name, layer in self._worst_first()[:3])
        return "\n".join(
            [*self._summary(), f"most lost in {worst}", *(f"{digest}  {name}" for name, _, digest in self._file_rows())]
        )

    def _repr_html_(self) -> str:
        """The totals, then every file, then every layer, those that lost most first."""
        layers = (
            (name, layer.dtype, f"{layer.relative_error:.2%}", f"{layer.unchanged / layer.numel:.2%}")
            for name, layer in self._worst_first()
        )
        return (
            f"<p>{'<br>'.join(map(escape, self._summary()))}</p>"
            + _details("files", table_html(("file", "MiB", "sha256"), self._file_rows()))
            + _details("layers", table_html(("layer", "stored as", "lost to rounding", "weights unchanged"), layers))
        )

    def _summary(self) -> list[str]:
        dtypes = ", ".join(sorted({layer.dtype for layer in self.layers.values()}))
        totals = f"{len(self.files)} files, {self.size / _MIB:,.1f} MiB, {self.seconds:.1f} s"
        lost, unchanged = f"{self.relative_error:.2%}", f"{self.unchanged:.2%}"
        return [
            f"baked {len(self.layers)} layers into {self.path}: {totals}",
            f"{lost} of the update lost to rounding ({dtypes}), {unchanged} of the weights unchanged",
        ]

    def _worst_first(self) -> list[tuple[str, BakedLayer]]:
        return sorted(self.layers.items(), key=lambda item: -item[1].relative_error)

    def _file_rows(self) -> Iterator[tuple[str, str, str]]:
        for name, file in self.files.items():
            yield name, f"{file.size / _MIB:,.1f}", file.sha256


def _details(title: str, table: str) -> str:
    return f"<details><summary>{title}</summary><div style='max-height:20em;overflow:auto'>{table}</div></details>"
