"""The latents that pictures were decoded from, kept beside them: a picture that is encoded again is not quite what was sampled."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from PIL.Image import Image
from torch import Tensor

from artaug._internal.annotations import checked
from artaug._internal.files import atomic_write
from artaug._internal.sealed import open_sealed, save_sealed
from artaug.errors import StorageError
from artaug.image_files import image_digest
from artaug.training.noise_schedule import Latents

_LATENTS = "latents"


@checked
@final
@dataclass(frozen=True, eq=False)
class SampledLatents:
    """Keeps the final latents of drawings by the pixels of their pictures: in files of a folder, or in memory.

    >>> import artaug as aa
    >>> from artaug import playground
    >>> from artaug.training import SampledLatents
    >>> sampled = SampledLatents()
    >>> synthesizer = playground.synthesizer(steps=1).keeping_latents(sampled)
    >>> picture = synthesizer.synthesize(aa.Plan("a red cone"), seed=0)
    >>> sampled.of(picture).shape
    torch.Size([64, 16])
    """

    folder: str | Path | None = None
    """Where the files are, one a picture, named by its pixels; made with the first. None for memory, where those of a picture of
    1024 x 1024 pixels by FLUX.1 take 1 MiB."""
    _kept: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def add(self, images: Sequence[Image], latents: Latents) -> None:
        """Keep the latents of pictures, one row for each, in float32.

        Raises:
            StorageError: if a file cannot be written.
        """
        for image, row in zip(images, latents.detach().float().cpu(), strict=True):
            if self.folder is None:
                self._kept[image_digest(image)] = row.clone()
                continue
            with atomic_write(self._file(image), what="the latents of a drawing", remedy="") as partial:
                save_sealed({_LATENTS: row.clone()}, partial, {})

    def of(self, image: Image) -> Tensor:
        """The latents that a picture was decoded from, without the axis of the batch.

        Raises:
            StorageError: if there are none, or their file is damaged.
        """
        if self.folder is None and (kept := self._kept.get(image_digest(image))) is not None:
            return kept
        if self.folder is None or not self._file(image).exists():
            place = "memory" if self.folder is None else str(self.folder)
            raise StorageError(
                f"the latents of a picture of {image.width} x {image.height} pixels are not kept in {place}: it was not drawn by a "
                "synthesizer that keeps them there. Train with one that keeps none, which encodes pictures, or draw it again."
            )
        remedy = "Delete it and the drawings beside it, and it is drawn again."
        with open_sealed(self._file(image), what="file of sampled latents", remedy=remedy) as file:
            return file.read(_LATENTS).clone()

    def _file(self, image: Image) -> Path:
        return Path(str(self.folder)) / f"{image_digest(image)}.safetensors"
