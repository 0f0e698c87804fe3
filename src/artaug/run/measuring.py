"""Held-out pictures of a run with a store: drawn once, kept in the folder of their round, and not drawn again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, final

from PIL.Image import Image
from torch import nn

from artaug._internal.digests import digest
from artaug._internal.segments import read_segment, write_segment
from artaug._internal.values import to_json, value
from artaug.image_files import ImageFolder, image_digest
from artaug.lora.lora import LoRA
from artaug.plan import Plan
from artaug.synthesis import Synthesizer, draw


@value
class DrawnRecord:
    """The digests of the pictures of one call of a synthesizer."""

    images: tuple[str, ...]
    size: tuple[int, int]
    """Width and height of all of them."""


@final
@dataclass(frozen=True)
class RecordedSynthesizer(Synthesizer):
    """Draws as another synthesizer does, and keeps the pictures of every call: the same call reads them."""

    synthesizer: Synthesizer
    folder: Path
    """Of the records; one folder for one state of the model."""
    images: ImageFolder

    @property
    def draws_regions(self) -> bool:
        return self.synthesizer.draws_regions

    @property
    def picture_size(self) -> tuple[int, int]:
        return self.synthesizer.picture_size

    @property
    def models(self) -> Sequence[nn.Module]:
        return self.synthesizer.models

    def __repr__(self) -> str:
        return repr(self.synthesizer)

    def synthesize(self, plan: Plan, *, seed: int) -> Image:
        return self.synthesize_batch([plan], seeds=[seed])[0]

    def synthesize_batch(self, plans: Sequence[Plan], *, seeds: Sequence[int]) -> list[Image]:
        path = self.folder / f"{digest(*map(to_json, plans), *map(str, seeds))[:32]}.json"
        try:
            record = read_segment(
                path, DrawnRecord, what="record of a drawing", remedy="Delete it, and it is drawn again."
            )
            return [self.images.get(name, size=record.size).load() for name in record.images]
        except FileNotFoundError:
            pictures = draw(self.synthesizer, plans, seeds=seeds)
        record = DrawnRecord(tuple(map(image_digest, self.images.add_all(pictures))), pictures[0].size)
        write_segment(path, record, what="the record of a drawing", remedy="Run the same call to go on.")
        return pictures

    def with_lora(self, lora: LoRA, *, scale: float = 1.0) -> Self:
        folder = self.folder / digest(lora.digest, repr(scale))[:16]
        return replace(self, synthesizer=self.synthesizer.with_lora(lora, scale=scale), folder=folder)
