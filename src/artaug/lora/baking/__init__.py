"""A LoRA added to a checkpoint for good: read, changed and written in small pieces, whatever the size of the model.

The checkpoint itself is never touched. What its precision cannot hold of the update is lost, and reported.
"""

import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm.auto import tqdm

from artaug.errors import LoRAMismatchError, ModelError, StorageError
from artaug.lora.baking.checkpoint import Checkpoint, Shard, TensorInfo
from artaug.lora.baking.report import Baked, BakedFile, BakedLayer
from artaug.lora.baking.rounding import DTYPES, Addition
from artaug.lora.baking.stream import Scribe, Stretch, staged
from artaug.lora.lora import LoRA

__all__ = ["Baked", "BakedFile", "BakedLayer", "bake"]

_log = logging.getLogger(__name__)
_WEIGHT = ".weight"
_MUCH = 0.5
"""From here on more of the update is noise than not, which deserves a warning."""


def bake(
    checkpoint: str | Path,
    lora: LoRA,
    out: str | Path,
    *,
    scale: float = 1.0,
    stochastic_seed: int | None = None,
    progress: bool = True,
) -> Baked:
    """Write a copy of a checkpoint with a LoRA added to its weights.

    Each weight the LoRA names is its stored value plus the whole update, added up in float32 and cast once to the type
    it is stored in. Everything else is copied byte for byte: other tensors, the header, their order, all other files
    of the folder but for hidden ones. Memory stays at a few megabytes and the LoRA, whatever the size of the model.

    In bfloat16 a small update is lost in part: of one with 1% of the weights' norm about 17%, of one with 0.1% most.
    The report says how much. Rounded stochastically, single weights are further off, but the mean of many is right.
    Fuse several rounds into one LoRA first, and quantize last: baking one round after the other rounds every time.

    Args:
        checkpoint: a folder of diffusers (a pipeline, or its ``transformer`` or ``unet`` alone) or one safetensors file
            whose tensors are called by module path and ``.weight``. It is only read.
        lora: what to add.
        out: a folder or file that does not exist yet. It appears whole or not at all, also if the process is killed;
            what a killed run leaves, beside it under the name of ``out`` and ``.partial``, the next one clears away.
        scale: of every update.
        stochastic_seed: round up or down by chance instead of to the nearest, with this seed. None rounds to the
            nearest, as casting does.
        progress: show a progress bar.

    Returns:
        What was written, with checksums, and what rounding has cost.

    Raises:
        LoRAMismatchError: before anything is written, if the checkpoint lacks a layer or has it in another shape.
        ModelError: before anything is written, if there is no checkpoint, if it is damaged, or if a layer is stored in
            anything but bfloat16, float16 and float32, quantized for instance.
        NonFiniteError: if a weight is, or becomes, NaN or infinite.
        StorageError: if ``out`` exists or cannot be written, for a full disk for instance; nothing is left behind.
    """
    started = time.perf_counter()
    source, target = Path(checkpoint), Path(out)
    found = Checkpoint.find(source)
    additions = _additions(found, lora, scale=scale, seed=stochastic_seed)
    try:
        _check_place(target, source, found.size)
        with (
            staged(target, folder=source.is_dir()) as place,
            tqdm(total=found.size, desc="Baking", unit="B", unit_scale=True, disable=not progress) as bar,
            Scribe(on_bytes=bar.update) as scribe,
        ):
            files = _written(found, additions, scribe, place)
            layers = {name.removesuffix(_WEIGHT): addition.report() for name, addition in additions.items()}
    except StorageError:
        raise
    except OSError as fault:
        raise StorageError(
            f"{str(target)!r} could not be written, and nothing is left of it: {fault}. It takes {_gib(found.size)}; "
            "make room, or choose another place."
        ) from fault
    baked = Baked(path=target, layers=layers, files=files, seconds=time.perf_counter() - started)
    if baked.lost > _MUCH:
        _log.warning("%s lost %.0f%% of the update to rounding: see its report", target, 100 * baked.lost)
    return baked


def _additions(found: Checkpoint, lora: LoRA, *, scale: float, seed: int | None) -> dict[str, Addition]:
    """What to do to which tensor, by the tensor's name, in the order of the LoRA's layers."""
    tensors = found.tensors()
    missing = [name for name in lora.layers if name + _WEIGHT not in tensors]
    if missing:
        known = next((name for name, one in tensors.items() if len(one.shape) == 2), "(no matrix)")
        there = "none" if len(missing) == len(lora.layers) else f"only {len(lora.layers) - len(missing)}"
        raise LoRAMismatchError(
            f"this LoRA names {len(lora.layers)} layers and {str(found.root)!r} has {there} of them; first missing is "
            f"{missing[0] + _WEIGHT!r}, names there look like {known!r}."
        )
    additions = {}
    for name, update in lora.layers.items():
        key = name + _WEIGHT
        _check_fits(key, tensors[key], update.shape)
        additions[key] = Addition(update.flat(), scale=scale, dtype=tensors[key].dtype, seed=seed, name=key)
    return additions


def _check_fits(name: str, stored: TensorInfo, shape: tuple[int, ...]) -> None:
    if stored.dtype not in DTYPES:
        raise ModelError(
            f"{name!r} is stored as {stored.dtype}, which artaug does not bake into: of a small update to quantized "
            f"weights next to nothing would arrive. Expected one of {', '.join(DTYPES)}. Bake first, then quantize; or "
            "leave the LoRA unfused."
        )
    if stored.shape != shape:
        raise LoRAMismatchError(
            f"this LoRA updates {name!r} with shape {shape}, and in the checkpoint it has {stored.shape}. It was "
            "trained for a model of another size."
        )
    if not stored.has_size(DTYPES[stored.dtype].itemsize):
        raise ModelError(f"{name!r} is {stored.dtype} of shape {stored.shape}, and not as long. The file is damaged.")


def _check_place(target: Path, source: Path, size: int) -> None:
    """Say no before anything is written, where that can be known."""
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise StorageError(
            f"{str(target)!r} lies in the checkpoint {str(source)!r}, which is only read. Choose another."
        )
    parent = next(one for one in target.absolute().parents if one.exists())
    free = shutil.disk_usage(parent).free
    if free < size:
        raise StorageError(f"{str(target)!r} takes {_gib(size)}, and {_gib(free)} are free there. Make room.")


def _written(found: Checkpoint, additions: Mapping[str, Addition], scribe: Scribe, place: Path) -> dict[str, BakedFile]:
    """Write all files, to a folder or, of a checkpoint of one file, to ``place`` itself."""
    jobs = {path: [Stretch(path.stat().st_size)] for path in found.others}
    jobs = {shard.path: _stretches(shard, additions) for shard in found.shards} | jobs
    to = {path: place / path.relative_to(found.root) if place.is_dir() else place for path in jobs}
    for path, stretches in jobs.items():
        scribe.reserve(to[path], sum(stretch.size for stretch in stretches))
    base = place if place.is_dir() else place.parent
    files = {to[path].relative_to(base).as_posix(): scribe.copy(path, to[path], jobs[path]) for path in jobs}
    scribe.finish()
    return files


def _stretches(shard: Shard, additions: Mapping[str, Addition]) -> list[Stretch]:
    """The bytes of a shard from first to last: as they are, but for the weights that get something added."""
    stretches, at = [], 0
    for name, stored in shard.tensors.items():
        if name in additions:
            stretches += [Stretch(stored.start - at), Stretch(stored.end - stored.start, additions[name])]
            at = stored.end
    return [*stretches, Stretch(shard.size - at)]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
