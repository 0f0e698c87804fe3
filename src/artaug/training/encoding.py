"""Pictures and prompts through a model's encoders once, and kept in memory or in files named by their content."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from artaug._internal.digests import digest, tensors_digest
from artaug._internal.files import atomic_write, save_tensors
from artaug.errors import ContractError, NonFiniteError, StorageError
from artaug.pairs import ImagePair, pair_digest
from artaug.regional.coverage import coverage
from artaug.training.distributed import World
from artaug.training.model import DiffusionModel

Row: TypeAlias = Mapping[str, Tensor]
"""One pair: latents ``before`` and ``after``, ``inside`` where its plan has regions, and its prompt as ``text.*``."""

TEXT = "text."
_PROBE = "a picture of a red cone"


def encode_pairs(
    model: DiffusionModel, pairs: Sequence[ImagePair], *, micro_batch_size: int, cache: Path | None, processes: World
) -> list[Row]:
    """Encode pairs of one size, at most ``micro_batch_size`` at a time.

    With a ``cache``, pairs that are in that folder are not encoded again, the others are added to it, several processes
    share the work, and rows are read from disk whenever they are looked at.

    Raises:
        ModelError: if the pictures are of a size the model does not take.
        NonFiniteError: if latents hold NaN or infinity, naming the prompt.
        ContractError: if the model loses rows.
        StorageError: if the cache cannot be written.
    """
    if cache is None:
        return list(_encoded(model, pairs, micro_batch_size=micro_batch_size))
    encoder = _fingerprint(model, pairs[0].before.size)
    files = [cache / f"{digest(encoder, pair_digest(pair, include_plan=True))}.safetensors" for pair in pairs]
    mine = processes.share(range(len(pairs)))  # whatever the others have written by now
    missing = [at for at in mine if not files[at].exists()]
    for at, row in zip(
        missing, _encoded(model, [pairs[at] for at in missing], micro_batch_size=micro_batch_size), strict=True
    ):
        _write(files[at], row)
    processes.wait()
    return [CachedPair(file) for file in files]


@dataclass(frozen=True)
class CachedPair(Mapping[str, Tensor]):
    """A row on disk, read when it is looked at."""

    path: Path

    def __getitem__(self, name: str) -> Tensor:
        with self._opened() as file:
            if name not in file.keys():  # noqa: SIM118 - no mapping
                raise KeyError(name)
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        with self._opened() as file:
            return iter(list(file.keys()))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _opened(self) -> safe_open:
        try:
            return safe_open(self.path, framework="pt")
        except (OSError, SafetensorError) as fault:
            raise StorageError(f"{self.path} of the latent cache cannot be read: {fault}. Delete it.") from None


def _fingerprint(model: DiffusionModel, size: tuple[int, int]) -> str:
    """What the encoders are, told by what they make of a fixed picture and prompt: weights have no other name."""
    width, height = size
    picture = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    return tensors_digest({"": model.encode_images([picture]), **model.encode_prompts([_PROBE])})


def _encoded(model: DiffusionModel, pairs: Sequence[ImagePair], *, micro_batch_size: int) -> Iterator[Row]:
    for start in range(0, len(pairs), micro_batch_size):
        some = pairs[start : start + micro_batch_size]
        prompts = [pair.prompt for pair in some]
        latents = {
            "before": model.encode_images([pair.before for pair in some]),
            "after": model.encode_images([pair.after for pair in some]),
        }
        texts = model.encode_prompts(prompts)
        _check_rows("encode_images", latents, len(some), "pictures")
        _check_rows("encode_prompts", texts, len(some), "prompts")
        columns = {**latents, **{f"{TEXT}{name}": one for name, one in texts.items()}}
        if any(pair.plan.regions for pair in some):
            columns["inside"] = model.encode_masks(torch.stack([_inside(pair) for pair in some]))
            _check_rows("encode_masks", {"inside": columns["inside"]}, len(some), "masks")
        for at, prompt in enumerate(prompts):
            row = {name: one[at].detach().cpu().clone() for name, one in columns.items()}
            _check_finite(row, prompt)
            yield row


def _inside(pair: ImagePair) -> Tensor:
    """How much of every pixel lies in a region of the plan, (height, width); all of it where the plan has none."""
    width, height = pair.before.size
    if not pair.plan.regions:
        return torch.ones(height, width)
    return torch.stack([coverage(region, (height, width)) for region in pair.plan.regions]).amax(0).float()


def _check_rows(method: str, columns: Mapping[str, Tensor], count: int, what: str) -> None:
    wrong = {name: tuple(one.shape) for name, one in columns.items() if len(one) != count}
    if wrong:
        raise ContractError(f"{method} returned {wrong} for {count} {what}. Expected one row each.")


def _check_finite(row: Row, prompt: str) -> None:
    for name in ("before", "after"):
        if not row[name].isfinite().all():
            raise NonFiniteError(
                f"the latents of the picture {name} of {prompt!r} hold NaN or infinity. Expected finite numbers: check "
                "the picture, and whether the VAE needs float32."
            )


def _write(path: Path, row: Row) -> None:
    remedy = "What the latent cache holds already is whole: make room and go on, or train without a cache."
    with atomic_write(path, what="the encoded pair", remedy=remedy) as partial:
        save_tensors(row, partial)
