"""Encoding pairs once by the model's VAE and text encoders: kept in memory, or in a cache of files named by content."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor

from artaug._internal.contracts import contract_error
from artaug._internal.digests import digest, tensors_digest
from artaug._internal.files import atomic_write
from artaug._internal.images import as_rgb
from artaug._internal.sealed import SealedFile, open_sealed, save_sealed
from artaug.errors import NonFiniteError
from artaug.pairs import ImagePair, pair_digest
from artaug.regional.coverage import coverage
from artaug.training.distributed import World
from artaug.training.model import DiffusionModel

EncodedPair: TypeAlias = Mapping[str, Tensor]
"""Latents ``before`` and ``after``, ``region_mask`` if the plan has regions, and the encoded prompt as ``text.*``."""

TEXT_PREFIX = "text."
_PROBE_PROMPT = "a picture of a red cone"


def encode_pairs(
    model: DiffusionModel, pairs: Sequence[ImagePair], *, micro_batch_size: int, cache: Path | None, world: World
) -> list[EncodedPair]:
    """Encode pairs of one size, at most ``micro_batch_size`` at a time.

    With a ``cache``, pairs that are in that folder are not encoded again, the others are added to it, several processes
    split the work, and tensors are read from disk whenever they are used.

    Raises:
        ModelError: if the pictures are of a size the model does not take.
        NonFiniteError: if latents hold NaN or infinity, naming the prompt.
        ContractError: if the model returns another number of rows.
        StorageError: if the cache cannot be written.
    """
    if cache is None:
        return list(_encode(model, pairs, micro_batch_size=micro_batch_size))
    encoder = _encoder_fingerprint(model, pairs[0].size)
    files = [cache / f"{digest(encoder, pair_digest(pair, include_plan=True))}.safetensors" for pair in pairs]
    # Split before looking for files: other processes may be writing their files.
    missing = [index for index in world.split(range(len(pairs))) if not files[index].exists()]
    encoded = _encode(model, [pairs[index] for index in missing], micro_batch_size=micro_batch_size)
    remedy = "What the latent cache holds already is complete: go on once the folder can be written to, or train without a cache."
    for index, tensors in zip(missing, encoded, strict=True):
        with atomic_write(files[index], what="the encoded pair", remedy=remedy) as partial:
            save_sealed(tensors, partial, {})
    world.barrier()
    return [CachedPair(file) for file in files]


@dataclass(frozen=True)
class CachedPair(Mapping[str, Tensor]):
    """An encoded pair on disk, read, and compared with its digests, whenever it is used."""

    path: Path

    def __getitem__(self, name: str) -> Tensor:
        with self._open() as file:
            if name not in file.names:
                raise KeyError(name)
            return file.read(name)

    def __iter__(self) -> Iterator[str]:
        with self._open() as file:
            return iter(sorted(file.names))

    def __len__(self) -> int:
        with self._open() as file:
            return len(file.names)

    def _open(self) -> AbstractContextManager[SealedFile]:
        return open_sealed(self.path, what="pair of the latent cache", remedy="Delete it, and it is made again.")


def _encoder_fingerprint(model: DiffusionModel, size: tuple[int, int]) -> str:
    """A digest of what the encoders return for a fixed picture and prompt: it changes with their weights."""
    width, height = size
    picture = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    return tensors_digest({"": model.encode_images([picture]), **model.encode_prompts([_PROBE_PROMPT])})


def _encode(model: DiffusionModel, pairs: Sequence[ImagePair], *, micro_batch_size: int) -> Iterator[EncodedPair]:
    for start in range(0, len(pairs), micro_batch_size):
        micro_batch = pairs[start : start + micro_batch_size]
        latents = {
            "before": model.encode_images([as_rgb(pair.before) for pair in micro_batch]),
            "after": model.encode_images([as_rgb(pair.after) for pair in micro_batch]),
        }
        texts = model.encode_prompts([pair.prompt for pair in micro_batch])
        _check_lengths(model, "encode_images", latents, len(micro_batch), "picture")
        _check_lengths(model, "encode_prompts", texts, len(micro_batch), "prompt")
        columns = {**latents, **{f"{TEXT_PREFIX}{name}": text for name, text in texts.items()}}
        if any(pair.plan.regions for pair in micro_batch):
            masks = model.encode_masks(torch.stack([_region_mask(pair) for pair in micro_batch]))
            _check_lengths(model, "encode_masks", {"region_mask": masks}, len(micro_batch), "mask")
            columns["region_mask"] = masks
        for index, pair in enumerate(micro_batch):
            encoded = {name: column[index].detach().cpu().clone() for name, column in columns.items()}
            for name in ("before", "after"):
                if not encoded[name].isfinite().all():
                    raise NonFiniteError(
                        f"the latents of the picture {name} of {pair.prompt!r} hold NaN or infinity. Expected finite "
                        "numbers: check the picture, and whether the VAE needs float32."
                    )
            yield encoded


def _region_mask(pair: ImagePair) -> Tensor:
    """The highest coverage of every pixel by the plan's regions, (height, width); 1 everywhere for a plan without any."""
    width, height = pair.size
    if not pair.plan.regions:
        return torch.ones(height, width)
    return torch.stack([coverage(region, (height, width)) for region in pair.plan.regions]).amax(0).float()


def _check_lengths(model: DiffusionModel, method: str, columns: Mapping[str, Tensor], count: int, per: str) -> None:
    shapes = {name: tuple(column.shape) for name, column in columns.items() if len(column) != count}
    if shapes:
        inputs = f"{count} {per}{'s' * (count != 1)}"
        raise contract_error(
            type(model).__name__, method, received=f"tensors of shape {shapes}", inputs=inputs, expected="one row each"
        )
