"""A cache of the frozen teacher's predictions, so that batches used several times (``echo``) need one teacher pass."""

import logging
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from artaug._internal.digests import digest, tensors_key
from artaug.training.distributed import SINGLE_PROCESS, World

_log = logging.getLogger(__name__)


class TeacherCache:
    """Predictions by a digest of the teacher's inputs, held on the CPU, or on the disk, in the dtype they came in.

    The key is the inputs' bits, so a prediction is never taken for another one's, whatever an objective asks and in
    whatever order; what is missing, as after a resumption, is computed. Several processes compute unless all of them have
    the prediction: a denoiser that is sharded over them needs all of them in every forward pass.
    """

    def __init__(self, world: World = SINGLE_PROCESS, *, folder: Path | None = None) -> None:
        self._world = world
        self._predictions: dict[str, Tensor] | _ScratchFile = {} if folder is None else _ScratchFile(folder)

    def get_or_compute(self, inputs: Mapping[str, Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """The prediction for ``inputs``, by ``compute`` if it is not known; on the device of the first input."""
        key, device = tensors_key(inputs), next(iter(inputs.values())).device
        kept = self._predictions.get(key)
        if self._world.all_agree(kept is not None, device) and kept is not None:
            return kept.to(device)
        prediction = compute().detach().cpu()
        if kept is None:
            self._predictions[key] = prediction
        return prediction.to(device)


class _ScratchFile:
    """Tensors by name in a file without a name, whose room is free again when this object, or the process, is gone."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by the finalizer
        self._entries: dict[str, _Entry] = {}
        self._end = 0
        self._is_full = False
        weakref.finalize(self, self._file.close)

    def get(self, name: str) -> Tensor | None:
        """A tensor as it was added; None if it was not, or the disk has damaged it."""
        if (entry := self._entries.get(name)) is None:
            return None
        data = bytearray(entry.size)
        self._file.seek(entry.offset)
        if self._file.readinto(data) != entry.size:
            return None
        tensor = torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)
        return tensor if digest(tensor) == entry.digest else None

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        """Add a tensor, unless the disk is full: what is not kept is computed again."""
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        try:
            self._file.seek(self._end)
            is_written = self._file.write(data) == len(data)
        except OSError:
            is_written = False
        if is_written:
            self._entries[name] = _Entry(self._end, len(data), tensor.dtype, tensor.shape, digest(tensor))
            self._end += len(data)
        elif not self._is_full:
            self._is_full = True
            _log.warning(
                "the disk of the latent cache is full: the teacher predicts again what would be read from there."
            )


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is in a scratch file, and what it is."""

    offset: int
    size: int
    """In bytes."""
    dtype: torch.dtype
    shape: torch.Size
    digest: str
