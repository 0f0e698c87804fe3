"""Add a LoRA to a checkpoint permanently: read, changed and written in chunks, whatever the size of the model.

The checkpoint itself is never changed. The part of the update that its precision cannot hold is lost, and reported.
"""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm

from artaug._internal.annotations import checked
from artaug._internal.files import atomic_output, check_disk_space
from artaug.errors import LoRAMismatchError, ModelError, StorageError
from artaug.lora.baking.checkpoint import Checkpoint, CheckpointFile
from artaug.lora.baking.report import BakedCheckpoint, BakedFile, BakedLayer
from artaug.lora.baking.rounding import DTYPES, WeightUpdate
from artaug.lora.baking.stream import ByteRange, copy_file, reserve_file
from artaug.lora.lora import LoRA

__all__ = ["BakedCheckpoint", "BakedFile", "BakedLayer", "bake"]

_log = logging.getLogger(__name__)
_WEIGHT = ".weight"
_WARN_ABOVE = 0.5
"""Relative error from which on a warning is logged: most of what arrives is rounding noise."""


@checked
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
            leaves a hidden folder, ``.artaug-partial``, which the next one removes.
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
    source, target = Checkpoint.find(Path(checkpoint)), Path(out)
    _check_fits(source, lora)
    folder = source.root.is_dir()
    if folder and target.resolve().is_relative_to(source.root.resolve()):
        raise StorageError(
            f"{str(target)!r} lies in the checkpoint {str(source.root)!r}, which is only read. Choose another."
        )
    files: dict[str, BakedFile] = {}
    layers: dict[str, BakedLayer] = {}
    try:
        with (
            atomic_output(target) as output,
            tqdm(total=source.size, desc="Baking", unit="B", unit_scale=True, disable=not progress) as bar,
        ):
            check_disk_space(target.absolute().parent, source.size, what=repr(str(target)))
            placed = [
                (file, output / file.path.relative_to(source.root) if folder else output) for file in source.files
            ]
            for file, place in placed:
                reserve_file(place, file.size)
            for file, place in placed:
                ranges = _byte_ranges(file, lora, layers, scale=scale, seed=stochastic_seed)
                name = place.relative_to(output if folder else output.parent).as_posix()
                files[name] = copy_file(file.path, place, ranges, on_bytes=bar.update)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{str(target)!r} could not be written, and nothing is left of it: {error}. It takes {_gib(source.size)}; "
            "make room, or choose another place."
        ) from error
    baked = BakedCheckpoint(
        path=target,
        layers={name: layers[name] for name in lora.layers},
        files=files,
        seconds=time.perf_counter() - started,
    )
    if baked.relative_error > _WARN_ABOVE:
        _log.warning("%s lost %.0f%% of the update to rounding: see its report", target, 100 * baked.relative_error)
    return baked


def _check_fits(checkpoint: Checkpoint, lora: LoRA) -> None:
    """Refuse a LoRA that is not for this checkpoint, and weights that cannot be baked into."""
    tensors = checkpoint.tensors()
    missing = [name for name in lora.layers if name + _WEIGHT not in tensors]
    if missing:
        example = next((name for name, info in tensors.items() if len(info.shape) == 2), "(no matrix)")
        present = "none" if len(missing) == len(lora.layers) else f"only {len(lora.layers) - len(missing)}"
        raise LoRAMismatchError(
            f"this LoRA names {len(lora.layers)} layers and {str(checkpoint.root)!r} has {present} of them; first missing is "
            f"{missing[0] + _WEIGHT!r}, names there look like {example!r}."
        )
    for name, layer in lora.layers.items():
        info = tensors[name + _WEIGHT]
        if info.dtype not in DTYPES:
            raise ModelError(
                f"{name + _WEIGHT!r} is stored as {info.dtype}, which artaug does not bake into: most of a small update to "
                f"quantized weights would be rounded away. Expected one of {', '.join(DTYPES)}. Bake first, then quantize; "
                "or leave the LoRA unfused."
            )
        if info.shape != layer.shape:
            raise LoRAMismatchError(
                f"this LoRA updates {name + _WEIGHT!r} with shape {layer.shape}, and in the checkpoint it has "
                f"{info.shape}. It was trained for a model of another size."
            )


def _byte_ranges(
    file: CheckpointFile, lora: LoRA, layers: dict[str, BakedLayer], *, scale: float, seed: int | None
) -> Iterator[ByteRange]:
    """The bytes of a file from first to last: copied, except for the weights that have an update.

    Between a weight and what follows it, the weight's report is put into ``layers``.
    """
    position = 0
    for name, info in file.tensors.items():
        layer = name.removesuffix(_WEIGHT)
        if name.endswith(_WEIGHT) and layer in lora.layers:
            yield ByteRange(info.start - position)
            # a convolution's weight lies in the file as the matrix (outputs, inputs * kernel)
            update = WeightUpdate(lora.layers[layer].flat(), scale=scale, dtype=info.dtype, seed=seed, name=name)
            yield ByteRange(info.end - info.start, update.add_to, update.row_bytes)
            layers[layer] = update.report()
            position = info.end
    yield ByteRange(file.size - position)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
