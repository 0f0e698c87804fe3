"""Pairs as a trainer holds them: encoded once, then drawn in batches with fresh noise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from PIL.Image import Image
from torch import Tensor

from artaug.errors import ModelError, NonFiniteError, SeamError
from artaug.pairs import ImagePair
from artaug.training.model import Conditioning, DiffusionModel
from artaug.training.noising import Noising
from artaug.training.objectives import PairBatch


@dataclass(frozen=True, eq=False)
class EncodedPairs:
    """Latents and prompts of all pairs, encoded once."""

    before: Tensor
    after: Tensor
    conditioning: Conditioning
    noising: Noising

    @classmethod
    def encode(cls, model: DiffusionModel, pairs: Sequence[ImagePair], *, at_once: int) -> "EncodedPairs":
        """Encode pairs, at most ``at_once`` pictures at a time.

        Raises:
            ModelError: if the pictures are not all of one size, or of none the model takes.
            NonFiniteError: if latents hold NaN or infinity, naming the prompt.
        """
        sizes = {pair.before.size: pair.prompt for pair in pairs}
        if len(sizes) > 1:
            shown = ", ".join(f"{width} x {height} ({sizes[width, height]!r})" for width, height in sorted(sizes))
            raise ModelError(f"the pairs have pictures of {len(sizes)} sizes: {shown}. A training needs one size.")
        prompts = [pair.prompt for pair in pairs]
        conditioning = model.encode_prompts(prompts)
        wrong = {name: tuple(one.shape) for name, one in conditioning.items() if len(one) != len(pairs)}
        if wrong:
            raise SeamError(f"encode_prompts returned {wrong} for {len(pairs)} prompts. Expected one row a prompt.")
        before, after = (
            _latents(model, pictures, prompts, at_once)
            for pictures in ([pair.before for pair in pairs], [pair.after for pair in pairs])
        )
        return cls(before, after, conditioning, model.noising)

    def batches(
        self, members: Sequence[int], *, size: int, generator: torch.Generator, within: tuple[float, float]
    ) -> Iterator[PairBatch]:
        """Draw batches without end: every member once before any comes again, with new noise every time."""
        numbers = _again_and_again(members, generator)
        while True:
            rows = torch.tensor(list(islice(numbers, size)))
            sigmas = self.noising.levels(size, generator, within=within)
            noise = torch.randn((size, *self.before.shape[1:]), generator=generator)
            yield PairBatch(
                before=_taken(self.before, rows).float(),
                after=_taken(self.after, rows).float(),
                conditioning={name: _taken(one, rows) for name, one in self.conditioning.items()},
                noise=noise.to(self.before.device),
                sigmas=sigmas.to(self.before.device),
            )


def _latents(model: DiffusionModel, pictures: Sequence[Image], prompts: Sequence[str], at_once: int) -> Tensor:
    chunks = [model.encode_images(pictures[start : start + at_once]) for start in range(0, len(pictures), at_once)]
    latents = torch.cat(chunks)
    if len(latents) != len(pictures):
        raise SeamError(f"encode_images returned {len(latents)} rows for {len(pictures)} pictures. Expected one each.")
    for row, prompt in zip(latents, prompts, strict=True):
        if not row.isfinite().all():
            raise NonFiniteError(
                f"the latents of a picture of {prompt!r} hold NaN or infinity. Expected finite numbers: check the "
                "picture, and whether the VAE needs float32."
            )
    return latents


def _again_and_again(members: Sequence[int], generator: torch.Generator) -> Iterator[int]:
    while True:
        for place in torch.randperm(len(members), generator=generator).tolist():
            yield members[place]


def _taken(rows: Tensor, numbers: Tensor) -> Tensor:
    return rows.index_select(0, numbers.to(rows.device))
