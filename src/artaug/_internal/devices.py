"""What a model is loaded as: the precision of its own weights on the GPU, where there is one, unless something else is given."""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from artaug._internal.decoding import decode_json
from artaug._internal.files import SafetensorsHeader
from artaug.errors import InvalidValueError, ModelError

DType: TypeAlias = torch.dtype | Literal["auto"]
"""Of weights: a floating-point type of torch, or that of the checkpoint."""

_log = logging.getLogger(__name__)
_STEMS = ("diffusion_pytorch_model", "model")
"""Of the files that diffusers and transformers read; those of a variant have its name in theirs, and are not read."""
_COMPUTED_IN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.bfloat16,  # which nothing computes in; bfloat16 holds its numbers exactly
    "F8_E5M2": torch.bfloat16,
}


def check_placement(owner: str, *, dtype: object, device: object) -> None:
    """Refuse what is no type of weights, or no device, before anything is read: diffusers takes a wrong type for float32.

    Args:
        owner: the caller, for the error's text.
        dtype: of the weights.
        device: to compute on.

    Raises:
        InvalidValueError: unless ``dtype`` is "auto" or a floating-point type of torch, and ``device`` is "auto" or one that
            torch can name.
    """
    if dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InvalidValueError(
            f"{owner}: dtype is {dtype!r}. Expected a type of torch, such as torch.bfloat16, or 'auto' for that of the "
            "checkpoint."
        )
    try:
        torch.device("cpu" if device == "auto" else device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        raise InvalidValueError(
            f"{owner}: device is {device!r}. Expected 'cpu', 'cuda', 'cuda:1', 'mps' or the like, or 'auto' for the GPU "
            "where there is one."
        ) from None


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that is meant: with "auto" the accelerator that torch finds (CUDA, MPS, XPU), else the CPU.

    Raises:
        ModelError: if this machine has no such device.
    """
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason, *_ = str(error).splitlines()
            raise ModelError(
                f"this machine has no device {str(device)!r}: {reason.rstrip('.')}. device='auto' takes the GPU where torch "
                "finds one, else the CPU."
            ) from None
        return torch.device(device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def computed_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What weights of a type are loaded as: float32 for float16 on a CPU, which has no fast float16 and may lack operations.

    float32 holds every float16 exactly, so nothing of the weights is lost. bfloat16, which CPUs compute in, stays.
    """
    return torch.float32 if (dtype, device.type) == (torch.float16, "cpu") else dtype


def stored_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    """The floating-point type that most of some weights have, by their bytes; float32 if none has one."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in weights.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.nbytes
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def component_dtypes(folder: Path, device: torch.device) -> dict[str, torch.dtype]:
    """The own type of each component of a pipeline, by the headers of its safetensors files; no weights are read.

    What a component holds in another type than most of it counts as the rest, as norms in float32. Components without
    safetensors files are not in the answer.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file is no safetensors file.
    """
    stored = {path.name: _component_dtype(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    return {name: computed_in(dtype, device) for name, dtype in stored.items() if dtype is not None}


def _component_dtype(folder: Path) -> torch.dtype | None:
    sizes: Counter[torch.dtype] = Counter()
    for path in _weight_files(folder):
        for name, info in SafetensorsHeader.read(path).tensors.items():
            # "x.weight.absmax" and the like are what bitsandbytes needs to read the quantized "x.weight"
            if ".weight." not in name and (dtype := _COMPUTED_IN.get(info["dtype"])) is not None:
                start, end = info["data_offsets"]
                sizes[dtype] += end - start
    return sizes.most_common(1)[0][0] if sizes else None


def _weight_files(folder: Path) -> list[Path]:
    for stem in _STEMS:
        if (index := folder / f"{stem}.safetensors.index.json").is_file():
            names = set(decode_json(index.read_bytes())["weight_map"].values())
            return [folder / name for name in sorted(names)]
        if (file := folder / f"{stem}.safetensors").is_file():
            return [file]
    return []


def log_loaded(source: object, parts: Mapping[str, nn.Module]) -> None:
    """Say at INFO level what was loaded, in which precision, where, and how large it is.

    Args:
        source: where it was loaded from.
        parts: the models by name; parts of one precision are named together.
    """
    by_dtype: dict[str, list[str]] = {}
    size, devices = 0, set()
    for name, part in parts.items():
        tensors = [*part.parameters(), *part.buffers()]
        size += sum(tensor.nbytes for tensor in tensors)
        devices |= {str(tensor.device) for tensor in tensors}
        dtype = stored_dtype(dict(part.named_parameters()))
        by_dtype.setdefault(str(dtype).removeprefix("torch."), []).append(name)
    dtypes = (
        next(iter(by_dtype))
        if len(by_dtype) == 1
        else ", ".join(f"{' and '.join(names)} {dtype}" for dtype, names in by_dtype.items())
    )
    _log.info("loaded %s: %s on %s, %.2f GiB", source, dtypes, " and ".join(sorted(devices)), size / 2**30)
