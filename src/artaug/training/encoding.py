"""Encoding pairs once by the model's VAE and text encoders: kept in memory, or in a cache of files named by content.

What is kept is small where it can be: the text of a prompt once, however many pairs have it, and region masks, which are
flat nearly everywhere, compressed.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from artaug._internal.contracts import contract_error
from artaug._internal.digests import digest, tensors_digest
from artaug._internal.files import atomic_write
from artaug._internal.images import as_rgb
from artaug._internal.sealed import open_sealed, save_sealed
from artaug.errors import InvalidValueError, NonFiniteError, StorageError
from artaug.pairs import ImagePair, pair_digest
from artaug.plan import Plan
from artaug.regional.coverage import area_coverage, coverage
from artaug.training.distributed import World
from artaug.training.model import DiffusionModel
from artaug.training.objectives import Objective
from artaug.training.sampled_latents import SampledLatents
from artaug.training.samples import TrainingPrompt, TrainingSample, shown_plan
from artaug.training.steering import as_steerable

TEXT_PREFIX = "text."
_MASK = "region_mask"
_MASK_SHAPE = "region_mask_shape"
_PROBE_PROMPT = "a picture of a red cone"
_REMEDY = "What the latent cache holds already is complete: go on once the folder can be written to, or train without a cache."


@dataclass(frozen=True, eq=False)
class EncodedPair:
    """An encoded pair, or prompt without pictures, in memory or in files of the latent cache, which are read whenever it is loaded."""

    latents: Mapping[str, Tensor] | Path
    """``before`` and ``after``, and the region mask, compressed, if the plan has regions, or a canvas with a mask."""
    text: Mapping[str, Tensor] | Path
    """The encoded prompt; pairs of one prompt share it."""
    plan: Plan
    """What it shows, see `artaug.training.PromptBatch.plans`."""
    seed: int | None = None
    """What the pair was drawn with. Its noise follows from it at any time, so no file of the cache holds the noise."""
    rewards: tuple[float, float] | None = None
    """How good before and after are; None if no pair of the training says so."""
    phrase_tokens: tuple[tuple[int, ...], ...] | None = None
    """The tokens of each phrase that the objective reads; None if it reads none."""

    def load(self) -> dict[str, Tensor]:
        """Latents ``before`` and ``after`` if it has pictures, ``region_mask`` if it has one, and the encoded prompt as ``text.*``.

        Raises:
            StorageError: if a file of the cache is missing, or not as it was written.
        """
        latents = dict(_read(self.latents))
        if _MASK in latents:
            try:
                latents[_MASK] = _decompress(latents[_MASK], latents.pop(_MASK_SHAPE))
            except (LookupError, ValueError, RuntimeError, zlib.error) as error:  # sealed, and not by this program
                raise StorageError(f"{self.latents} is no file of the latent cache: {error!r}. Delete it.") from error
        return {**latents, **{f"{TEXT_PREFIX}{name}": tensor for name, tensor in _read(self.text).items()}}

    def discard_damaged(self) -> None:
        """Remove those of its files that cannot be read, so that `encode_pairs` makes them again."""
        for file in (self.latents, self.text):
            if isinstance(file, Path):
                try:
                    _read(file)
                except StorageError:
                    file.unlink(missing_ok=True)


def encode_pairs(
    model: DiffusionModel,
    pairs: Sequence[ImagePair],
    *,
    size: tuple[int, int],
    micro_batch_size: int,
    cache: Path | None,
    world: World,
) -> list[EncodedPair]:
    """Encode pairs of one size, at most ``micro_batch_size`` at a time.

    Each picture is looked at once, and dropped with its micro batch. With a ``cache``, what is in that folder is not
    encoded again, the rest is added to it, and several processes split the work.

    How a matrix product rounds depends on its size. So that a pair has the same bits whether the cache was filled by one
    process or several, in one go or in two, micro batches are always made of the same pairs, and prompts are encoded one by
    one.

    Raises:
        ModelError: if the pictures are of a size the model does not take.
        NonFiniteError: if latents hold NaN or infinity, naming the prompt.
        ContractError: if the model returns another number of rows.
        StorageError: if the cache cannot be written, or a picture that has to be encoded cannot be read.
    """
    texts = _encode_texts(model, [pair.prompt for pair in pairs], cache=cache, world=world)
    micro_batches = [
        range(len(pairs))[start : start + micro_batch_size] for start in range(0, len(pairs), micro_batch_size)
    ]
    if cache is None:
        encoded = (row for rows in micro_batches for row in _encode_latents(model, [pairs[i] for i in rows], size))
        return [
            EncodedPair(latents, texts[pair.prompt], shown_plan(pair.prompt, pair.plan))
            for pair, latents in zip(pairs, encoded, strict=True)
        ]

    image_encoder = _image_fingerprint(model, size)
    files = [
        cache / "pairs" / f"{digest(image_encoder, pair_digest(pair, include_plan=True))}.safetensors" for pair in pairs
    ]
    # Split before looking for files: other processes may be writing their files.
    for rows in world.split(micro_batches):
        if all(files[row].exists() for row in rows):
            continue
        for row, latents in zip(rows, _encode_latents(model, [pairs[row] for row in rows], size), strict=True):
            if not files[row].exists():
                _write(latents, files[row], what="the encoded pair")
    world.barrier()
    return [
        EncodedPair(file, texts[pair.prompt], shown_plan(pair.prompt, pair.plan))
        for pair, file in zip(pairs, files, strict=True)
    ]


def encode_prompts_alone(
    model: DiffusionModel,
    prompts: Sequence[TrainingPrompt],
    *,
    size: tuple[int, int],
    cache: Path | None,
    world: World,
) -> list[EncodedPair]:
    """Encode prompts without pictures, of one size: their texts, as those of `encode_pairs`, and the masks of their regions."""
    texts = _encode_texts(model, [prompt.prompt for prompt in prompts], cache=cache, world=world)
    world.barrier()
    masks = (_encode_mask(model, prompt.plan, size) for prompt in prompts)
    return [
        EncodedPair(mask, texts[prompt.prompt], shown_plan(prompt.prompt, prompt.plan))
        for prompt, mask in zip(prompts, masks, strict=True)
    ]


def _encode_texts(
    model: DiffusionModel, prompts: Sequence[str], *, cache: Path | None, world: World
) -> Mapping[str, Mapping[str, Tensor] | Path]:
    """Encode each prompt by itself, or find it in the cache; several processes split the work, and have to meet after it."""
    prompts = list(dict.fromkeys(prompts))
    if cache is None:
        return {prompt: encode_text(model, prompt) for prompt in prompts}
    text_encoder = _text_fingerprint(model)
    files = {prompt: cache / "prompts" / f"{digest(text_encoder, prompt)}.safetensors" for prompt in prompts}
    # Split before looking for files: other processes may be writing their files.
    for prompt in world.split(prompts):
        if not files[prompt].exists():
            _write(encode_text(model, prompt), files[prompt], what="the encoded prompt")
    return files


def find_phrases(
    model: DiffusionModel, samples: Sequence[TrainingSample], objective: Objective
) -> list[tuple[tuple[int, ...], ...] | None]:
    """The tokens of the phrases that an objective reads in each sample's prompt; None for all if it reads none.

    Raises:
        InvalidValueError: if a prompt does not hold one of its phrases as the model reads it, naming both.
        ModelError: if the model does not say which tokens phrases are.
    """
    phrases = [tuple(objective.phrases_of(shown_plan(sample.prompt, sample.plan))) for sample in samples]
    if not any(phrases):
        return [None] * len(samples)
    steerable = as_steerable(model, reader=type(objective).__name__)
    found = []
    for index, (sample, of_sample) in enumerate(zip(samples, phrases, strict=True)):
        tokens = tuple(tuple(numbers) for numbers in steerable.phrase_tokens(sample.prompt, of_sample))
        if absent := [phrase for phrase, numbers in zip(of_sample, tokens, strict=True) if not numbers]:
            raise InvalidValueError(
                f"{type(objective).__name__} reads the phrases {absent} of pairs[{index}], and the model does not read them in "
                f"its prompt {sample.prompt!r}. Expected whole words of the prompt, in its order, before what is cut off."
            )
        found.append(tokens)
    return list(found)


def _write(tensors: Mapping[str, Tensor], path: Path, *, what: str) -> None:
    with atomic_write(path, what=what, remedy=_REMEDY) as partial:
        save_sealed(tensors, partial, {})


def _read(source: Mapping[str, Tensor] | Path) -> Mapping[str, Tensor]:
    """Tensors in memory as they are; all those of a file at once, compared with their digests."""
    if not isinstance(source, Path):
        return source
    with open_sealed(source, what="file of the latent cache", remedy="Delete it, and it is made again.") as file:
        # Copied, since what is mapped to a file changes, or ends the process, with what is written to the file later.
        return {name: file.read(name).clone() for name in file.names}


def _text_fingerprint(model: DiffusionModel) -> str:
    """A digest of what the text encoders return for a fixed prompt, of the length they read, and of words of one's own, where it has any."""
    length, tokens = getattr(model, "max_sequence_length", None), getattr(model, "tokens_digest", "")
    return digest(tensors_digest(model.encode_prompts([_PROBE_PROMPT])), repr(length), tokens)


def _image_fingerprint(model: DiffusionModel, size: tuple[int, int]) -> str:
    """A digest of what the VAE returns for a fixed picture, and of whether it is asked."""
    encoded = tensors_digest({"": model.encode_images([Image.linear_gradient("L").resize(size).convert("RGB")])})
    return encoded if _sampled(model) is None else digest(encoded, "sampled")


def encode_text(model: DiffusionModel, prompt: str) -> dict[str, Tensor]:
    """An encoded prompt, without the axis of the batch."""
    columns = model.encode_prompts([prompt])
    _check_lengths(model, "encode_prompts", columns, 1, "prompt")
    return _row(columns, 0)


def _encode_latents(
    model: DiffusionModel, pairs: Sequence[ImagePair], size: tuple[int, int]
) -> Iterator[dict[str, Tensor]]:
    """Latents, and compressed region masks, of one micro batch."""
    columns = {
        "before": _latents_of(model, [as_rgb(pair.before) for pair in pairs]),
        "after": _latents_of(model, [as_rgb(pair.after) for pair in pairs]),
    }
    _check_lengths(model, "encode_images", columns, len(pairs), "picture")
    for index, pair in enumerate(pairs):
        latents = _row(columns, index)
        for name, tensor in latents.items():
            if not tensor.isfinite().all():
                raise NonFiniteError(
                    f"the latents of the picture {name} of {pair.prompt!r} hold NaN or infinity. Expected finite "
                    "numbers: check the picture, and whether the VAE needs float32."
                )
        yield {**latents, **_encode_mask(model, pair.plan, size)}


def _latents_of(model: DiffusionModel, images: Sequence[Image.Image]) -> Tensor:
    """Those that the pictures were decoded from, where the model's synthesizer keeps them, else their encoding."""
    sampled = _sampled(model)
    return model.encode_images(images) if sampled is None else torch.stack([sampled.of(image) for image in images])


def _sampled(model: DiffusionModel) -> SampledLatents | None:
    return getattr(model, "sampled", None)


def _encode_mask(model: DiffusionModel, plan: Plan | None, size: tuple[int, int]) -> dict[str, Tensor]:
    """The mask of a plan's regions and of its canvas, compressed; nothing for a plan without either."""
    if plan is None or not (plan.regions or (plan.canvas is not None and plan.canvas.mask is not None)):
        return {}
    masks = model.encode_masks(_region_mask(plan, size)[None])
    _check_lengths(model, "encode_masks", {_MASK: masks}, 1, "mask")
    return compress_mask(masks[0])


def _row(columns: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: column[index].detach().cpu().clone() for name, column in columns.items()}


def _region_mask(plan: Plan, size: tuple[int, int]) -> Tensor:
    """The highest coverage of every pixel by the plan's regions, and by the mask of its canvas: (height, width)."""
    (width, height), canvas = size, plan.canvas
    covered = [coverage(region, (height, width)) for region in plan.regions]
    if canvas is not None and canvas.mask is not None:
        covered.append(area_coverage(canvas.mask, (height, width)))
    return torch.stack(covered).amax(0).float()


def compress_mask(mask: Tensor) -> dict[str, Tensor]:
    """A mask as the latents of an `EncodedPair` have it, without loss: bytes, a hundredth of the mask, and its shape."""
    data = zlib.compress(mask.detach().cpu().float().contiguous().numpy().data, level=1)
    return {_MASK: torch.from_numpy(np.frombuffer(data, np.uint8).copy()), _MASK_SHAPE: torch.tensor(mask.shape)}


def _decompress(data: Tensor, shape: Tensor) -> Tensor:
    """The mask that `compress_mask` was given, in float32."""
    mask = np.frombuffer(zlib.decompress(data.numpy().data), np.float32).copy()
    return torch.from_numpy(mask).reshape(shape.tolist())


def _check_lengths(model: DiffusionModel, method: str, columns: Mapping[str, Tensor], count: int, per: str) -> None:
    shapes = {name: tuple(column.shape) for name, column in columns.items() if len(column) != count}
    if shapes:
        inputs = f"{count} {per}{'s' * (count != 1)}"
        raise contract_error(
            type(model).__name__, method, received=f"tensors of shape {shapes}", inputs=inputs, expected="one row each"
        )
