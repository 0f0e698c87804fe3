"""What a checkpoint on disk consists of: safetensors files with the place of every tensor, and all the rest."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from artaug._internal.files import SafetensorsHeader
from artaug.errors import ModelError

_WEIGHTS = "diffusion_pytorch_model"
_DENOISERS = ("transformer", "unet")
_EXPECTED = (
    "Expected a safetensors file, or a folder of diffusers with diffusion_pytorch_model*.safetensors in it, in its "
    "transformer/ or in its unet/."
)


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    dtype: str
    """As safetensors calls it, ``BF16`` say."""
    shape: tuple[int, ...]
    start: int
    """In bytes from the beginning of the file."""
    end: int

    def holds(self, width: int) -> bool:
        """Whether it is as long as its shape says, at ``width`` bytes a number."""
        return self.end - self.start == math.prod(self.shape) * width


@dataclass(frozen=True)
class Shard:
    """One safetensors file."""

    path: Path
    tensors: Mapping[str, Stored]
    """In the order in which their bytes lie in the file, one behind the other to its end."""
    size: int
    """Of the file, in bytes."""

    @classmethod
    def read(cls, path: Path) -> "Shard":
        """Read the header, and make sure that the file is as long as it says.

        Raises:
            ModelError: if it is no safetensors file, or cut short.
        """
        try:
            header = SafetensorsHeader.read(path)
        except (OSError, ValueError) as fault:
            raise ModelError(f"{path} cannot be read as safetensors: {fault}. {_EXPECTED}") from None
        size = header.file_size
        tensors = _tensors(header)
        if tensors is None or (max((one.end for one in tensors.values()), default=header.data_start)) != size:
            raise ModelError(f"{path} is cut short or damaged: {size} bytes are not what its header describes.")
        return cls(path, tensors, size)


def _tensors(header: SafetensorsHeader) -> dict[str, Stored] | None:
    """The tensors in order of place; None if they do not lie one behind the other."""
    start = header.data_start
    try:
        found = {
            name: Stored(str(one["dtype"]), tuple(one["shape"]), *(start + int(at) for at in one["data_offsets"]))
            for name, one in header.tensors.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    ordered = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].end)))
    at = start
    for one in ordered.values():
        if one.start != at or one.end < at or any(not isinstance(side, int) or side < 0 for side in one.shape):
            return None
        at = one.end
    return ordered


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk."""

    root: Path
    """The folder, or the folder that the one file is in."""
    shards: tuple[Shard, ...]
    others: tuple[Path, ...] = ()
    """All other files of the folder, however deep, but for hidden ones."""

    @classmethod
    def find(cls, path: Path) -> "Checkpoint":
        """ValidationResult what is there.

        Raises:
            ModelError: if there are no weights, several sets of them, or some that are no safetensors files.
        """
        if path.is_file():
            return cls(path.parent, (Shard.read(path),))
        if not path.is_dir():
            raise ModelError(f"{str(path)!r} does not exist. {_EXPECTED}")
        weights = _weights(_denoiser(path))
        others = (file for file in _files(path) if file not in weights)
        return cls(path, tuple(map(Shard.read, weights)), tuple(others))

    @property
    def size(self) -> int:
        """In bytes, all files."""
        return sum(shard.size for shard in self.shards) + sum(file.stat().st_size for file in self.others)

    def tensors(self) -> dict[str, Stored]:
        """All tensors of all shards.

        Raises:
            ModelError: if two shards hold one tensor.
        """
        found: dict[str, Stored] = {}
        for shard in self.shards:
            if twice := found.keys() & shard.tensors.keys():
                raise ModelError(f"{shard.path} holds {min(twice)!r}, which another shard holds too. Which is meant?")
            found |= shard.tensors
        return found


def _denoiser(folder: Path) -> Path:
    """The folder with the denoiser's weights: this one or one in it."""
    found = [one for one in (folder, *map(folder.joinpath, _DENOISERS)) if any(one.glob(f"{_WEIGHTS}*.safetensors"))]
    if len(found) != 1:
        held = ", ".join(str(one.relative_to(folder)) for one in found) or sorted(one.name for one in folder.iterdir())
        raise ModelError(f"{str(folder)!r} does not hold the weights of one denoiser; there is {held}. {_EXPECTED}")
    return found[0]


def _weights(folder: Path) -> list[Path]:
    """The safetensors files of the one set of weights in a folder.

    Left alone, any other set would be without the LoRA, and someone might load it.
    """
    indices = sorted(folder.glob(f"{_WEIGHTS}*.safetensors.index*.json"))
    files = set(folder.glob(f"{_WEIGHTS}*.safetensors"))
    sets = [_indexed(index) for index in indices]
    sets += [{file} for file in sorted(files.difference(*sets)) if "-of-" not in file.name]
    strange = {file for file in folder.glob(f"{_WEIGHTS}*") if file not in files and file not in indices}
    if len(sets) != 1 or strange or files != sets[0]:
        held = sorted(file.name for file in files | strange | set(indices))
        raise ModelError(
            f"{str(folder)!r} holds {held}: not exactly one whole set of weights. Expected one safetensors file, or "
            "shards with their index. Move the others away."
        )
    return sorted(files)


def _indexed(index: Path) -> set[Path]:
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise ModelError(f"{index} is no index of shards: {fault!r}. Expected JSON with a 'weight_map'.") from None
    missing = sorted(name for name in names if not (index.parent / name).is_file())
    if missing:
        raise ModelError(f"{index} names {missing[0]!r}, which is not there. Fetch the model again.")
    return {index.parent / name for name in names}


def _files(folder: Path) -> Iterator[Path]:
    """All files in a folder, links to files included, hidden ones left out."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry
