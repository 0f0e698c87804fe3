"""Add a LoRA to a checkpoint permanently: read, changed and written in chunks, whatever the size of the model.

The checkpoint itself is never changed. The part of the update that its precision cannot hold is lost, and reported.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm.auto import tqdm

from artaug._internal.files import check_disk_space
from artaug.errors import LoRAMismatchError, ModelError, StorageError
from artaug.lora.baking.checkpoint import Checkpoint, Shard, TensorInfo
from artaug.lora.baking.report import BakedCheckpoint, BakedFile, BakedLayer
from artaug.lora.baking.rounding import DTYPES, WeightUpdate
from artaug.lora.baking.stream import ByteRange, StreamWriter, atomic_output
from artaug.lora.lora import LoRA

__all__ = ["BakedCheckpoint", "BakedFile", "BakedLayer", "bake"]

_log = logging.getLogger(__name__)
_WEIGHT = ".weight"
_WARN_ABOVE = 0.5
"""Relative error from which on a warning is logged: most of what arrives is rounding noise."""


def bake(
    checkpoint: str | Path,
    lora: LoRA,
    out: str | Path,
    *,
    scale: float = 1.0,
    stochastic_seed: int | None = None,
    progress: bool = True,
) -> BakedCheckpoint:
    """Write a copy of a checkpoint with a LoRA added to its weights.

    Each weight that the LoRA names becomes its stored value plus the whole update, summed in float32 and cast once to the
    stored type. Everything else is copied byte for byte: other tensors, the header, their order, and all other files of
    the folder except hidden ones. Memory stays at some tens of megabytes and the LoRA, whatever the size of the model.

    In bfloat16 a small update is lost in part: about 17% of one with 1% of the weights' norm, most of one with 0.1%. The
    report says how much. With stochastic rounding single weights have a larger error, but the mean of many is right.
    Fuse several rounds into one LoRA first, and quantize last: baking one round after the other rounds every time.

    Args:
        checkpoint: a folder of diffusers (a pipeline, or its ``transformer`` or ``unet`` alone) or one safetensors file
            whose tensors are named by module path and ``.weight``. It is only read.
        lora: what to add.
        out: a folder or file that does not exist yet. It appears atomically, also if the process is killed; a killed run
            leaves a folder with the name of ``out`` and ``.partial``, which the next run removes.
        scale: of every update.
        stochastic_seed: round up or down at random instead of to the nearest, with this seed. None rounds to the
            nearest, as casting does.
        progress: show a progress bar.

    Returns:
        The files written, with checksums, and the rounding error of every layer.

    Raises:
        LoRAMismatchError: before anything is written, if the checkpoint lacks a layer or has it in another shape.
        ModelError: before anything is written, if there is no checkpoint, if it is damaged, or if a layer is stored in
            anything but bfloat16, float16 and float32, quantized for instance.
        NonFiniteError: if a weight is, or becomes, NaN or infinite.
        StorageError: if ``out`` exists or cannot be written, for a full disk for instance; nothing is left behind.
    """
    started = time.perf_counter()
    source, target = Path(checkpoint), Path(out)
    source_files = Checkpoint.find(source)
    updates = _weight_updates(source_files, lora, scale=scale, seed=stochastic_seed)
    try:
        _check_target(target, source, source_files.size)
        with (
            atomic_output(target, folder=source.is_dir()) as output,
            tqdm(total=source_files.size, desc="Baking", unit="B", unit_scale=True, disable=not progress) as bar,
            StreamWriter(on_bytes=bar.update) as writer,
        ):
            files = _write_files(source_files, updates, writer, output)
            layers = {name.removesuffix(_WEIGHT): update.report() for name, update in updates.items()}
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{str(target)!r} could not be written, and nothing is left of it: {error}. It takes {_gib(source_files.size)}; "
            "make room, or choose another place."
        ) from error
    baked = BakedCheckpoint(path=target, layers=layers, files=files, seconds=time.perf_counter() - started)
    if baked.relative_error > _WARN_ABOVE:
        _log.warning("%s lost %.0f%% of the update to rounding: see its report", target, 100 * baked.relative_error)
    return baked


def _weight_updates(checkpoint: Checkpoint, lora: LoRA, *, scale: float, seed: int | None) -> dict[str, WeightUpdate]:
    """The update of each tensor, by the tensor's name, in the order of the LoRA's layers."""
    tensors = checkpoint.tensors()
    missing = [name for name in lora.layers if name + _WEIGHT not in tensors]
    if missing:
        example = next((name for name, info in tensors.items() if len(info.shape) == 2), "(no matrix)")
        present = "none" if len(missing) == len(lora.layers) else f"only {len(lora.layers) - len(missing)}"
        raise LoRAMismatchError(
            f"this LoRA names {len(lora.layers)} layers and {str(checkpoint.root)!r} has {present} of them; first missing is "
            f"{missing[0] + _WEIGHT!r}, names there look like {example!r}."
        )
    updates = {}
    for name, layer in lora.layers.items():
        key = name + _WEIGHT
        _check_fits(key, tensors[key], layer.shape)
        # a convolution's weight lies in the file as the matrix (outputs, inputs * kernel)
        updates[key] = WeightUpdate(layer.flat(), scale=scale, dtype=tensors[key].dtype, seed=seed, name=key)
    return updates


def _check_fits(name: str, info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.dtype not in DTYPES:
        raise ModelError(
            f"{name!r} is stored as {info.dtype}, which artaug does not bake into: most of a small update to quantized "
            f"weights would be rounded away. Expected one of {', '.join(DTYPES)}. Bake first, then quantize; or leave the "
            "LoRA unfused."
        )
    if info.shape != shape:
        raise LoRAMismatchError(
            f"this LoRA updates {name!r} with shape {shape}, and in the checkpoint it has {info.shape}. It was "
            "trained for a model of another size."
        )
    if not info.has_size(DTYPES[info.dtype].itemsize):
        raise ModelError(
            f"{name!r} is {info.dtype} of shape {info.shape}, and has {info.end - info.start} bytes. The file is damaged."
        )


def _check_target(target: Path, source: Path, size: int) -> None:
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise StorageError(
            f"{str(target)!r} lies in the checkpoint {str(source)!r}, which is only read. Choose another."
        )
    check_disk_space(target.absolute().parent, size, what=repr(str(target)))


def _write_files(
    checkpoint: Checkpoint, updates: Mapping[str, WeightUpdate], writer: StreamWriter, output: Path
) -> dict[str, BakedFile]:
    """Write all files into the folder ``output``, or the only file of the checkpoint as ``output``."""
    ranges = {shard.path: _byte_ranges(shard, updates) for shard in checkpoint.shards}
    ranges |= {path: [ByteRange(path.stat().st_size)] for path in checkpoint.others}
    targets = {path: output / path.relative_to(checkpoint.root) if output.is_dir() else output for path in ranges}
    for path, target in targets.items():
        writer.reserve(target, sum(byte_range.size for byte_range in ranges[path]))
    base = output if output.is_dir() else output.parent
    files = {
        target.relative_to(base).as_posix(): writer.copy(path, target, ranges[path]) for path, target in targets.items()
    }
    writer.wait_synced()
    return files


def _byte_ranges(shard: Shard, updates: Mapping[str, WeightUpdate]) -> list[ByteRange]:
    """The bytes of a shard from first to last: copied, except for the weights that have an update."""
    ranges, position = [], 0
    for name, info in shard.tensors.items():
        if name in updates:
            ranges += [ByteRange(info.start - position), ByteRange(info.end - info.start, updates[name])]
            position = info.end
    return [*ranges, ByteRange(shard.size - position)]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
