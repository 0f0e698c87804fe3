"""Several draws of each prompt, and the folder in which a recipe keeps what it has drawn and learned."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from PIL.Image import Image

from artaug.image_files import ImageFile, ImageFolder
from artaug.plan import Plan
from artaug.run.storage.cached_synthesizer import CachedSynthesizer
from artaug.synthesis import Synthesizer, attempt_seed, draw_batches
from artaug.training import Checkpoints, KeepsLatents, SampledLatents


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptDraws:
    """Several pictures of one prompt, each from a seed of its own."""

    prompt: str
    seeds: tuple[int, ...]
    images: tuple[Image, ...]


def draw_several(
    synthesizer: Synthesizer, prompts: Sequence[str], *, count: int, seed: int, round_number: int, batch_size: int
) -> Iterator[PromptDraws]:
    """Draw ``count`` pictures of each prompt, prompt by prompt.

    No call of the synthesizer has pictures of two prompts, so that what is drawn of one does not depend on the others.
    """
    seeds = [
        [attempt_seed(seed, round_number=round_number, prompt_index=index, candidate=number) for number in range(count)]
        for index in range(len(prompts))
    ]
    parts = [slice(start, start + batch_size) for start in range(0, count, batch_size)]
    calls = (
        ([Plan(prompt)] * len(mine[part]), mine[part])
        for prompt, mine in zip(prompts, seeds, strict=True)
        for part in parts
    )
    with closing(draw_batches(synthesizer, calls)) as drawn:
        for prompt, mine in zip(prompts, seeds, strict=True):
            images = tuple(image for _ in parts for image in next(drawn))
            yield PromptDraws(prompt=prompt, seeds=tuple(mine), images=images)


@dataclass(frozen=True)
class RecipeFolder:
    """Where a recipe keeps what it has drawn and learned, so that the same call goes on; without a path, nowhere."""

    path: str | Path | None

    def drawing(self, synthesizer: Synthesizer) -> Synthesizer:
        """The synthesizer, which draws each picture once where there is a folder."""
        if self.path is None:
            return synthesizer
        return CachedSynthesizer(synthesizer, folder=Path(self.path) / "drawings", images=self._images)

    def keeping_latents(self, synthesizer: Synthesizer) -> Synthesizer:
        """The synthesizer, keeping the latents of its drawings if it can: in the folder, else in memory, as long as it lives."""
        if not isinstance(synthesizer, KeepsLatents):
            return synthesizer
        kept = synthesizer.keeping_latents(SampledLatents(None if self.path is None else Path(self.path) / "latents"))
        return cast(Synthesizer, kept)

    def kept(self, images: Sequence[Image]) -> Sequence[Image | ImageFile]:
        """Pictures to keep, in the folder instead of in memory where there is one."""
        return images if self.path is None else self._images.add_all(images)

    def checkpoints(self, round_number: int) -> Checkpoints | None:
        """Of the training of a round."""
        if self.path is None:
            return None
        return Checkpoints(folder=Path(self.path) / f"round-{round_number}")

    @property
    def _images(self) -> ImageFolder:
        return ImageFolder(Path(str(self.path)) / "images")
