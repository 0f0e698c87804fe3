"""The files of a checkpoint: safetensors files with the position of every tensor in them, and all other files."""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from artaug._internal.decoding import decode_json
from artaug._internal.files import SafetensorsHeader
from artaug.errors import ModelError

_WEIGHTS_STEM = "diffusion_pytorch_model"
_DENOISERS = ("transformer", "unet")
_DEEPEST = 100
"""Folders of a checkpoint within each other; pipelines have two."""
_EXPECTED = (
    "Expected a safetensors file, or a folder of diffusers with diffusion_pytorch_model*.safetensors in it, in its "
    "transformer/ or in its unet/."
)


@dataclass(frozen=True)
class TensorInfo:
    """Type, shape and position of one tensor in a file."""

    dtype: str
    """As safetensors calls it, for example ``BF16``."""
    shape: tuple[int, ...]
    start: int
    """In bytes from the beginning of the file."""
    end: int


@dataclass(frozen=True)
class CheckpointFile:
    """One file of a checkpoint."""

    path: Path
    size: int
    """In bytes."""
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    """Of the denoiser, in the order of their bytes, which follow each other without gaps to the end of the file."""

    @classmethod
    def read(cls, path: Path) -> "CheckpointFile":
        """Read the header of a safetensors file; safetensors checks it against the length of the file.

        Raises:
            ModelError: if it is no safetensors file, or cut short.
        """
        try:
            header = SafetensorsHeader.read(path)
            with safe_open(path, framework="pt"):  # has checked types, shapes and offsets
                pass
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"{path} is no safetensors file, or cut short or damaged: {error}. {_EXPECTED}") from None
        tensors = {}
        for name, entry in sorted(header.tensors.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = (header.data_start + offset for offset in entry["data_offsets"])
            tensors[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]), start, end)
        return cls(path, header.file_size, tensors)


@dataclass(frozen=True)
class Checkpoint:
    """The files of a model."""

    root: Path
    """The folder, or the one file."""
    files: tuple[CheckpointFile, ...]
    """All of the folder and its subfolders, except hidden ones; of links, the files they lead to."""

    @classmethod
    def find(cls, path: Path) -> "Checkpoint":
        """Find the weights of the denoiser in a folder, or take one file.

        Raises:
            ModelError: if there are no weights, several sets of them, or weights that are no safetensors files; if the
                folder holds a link out of it, a link to a folder, or something that is no file.
        """
        if path.is_file():
            return cls(path, (CheckpointFile.read(path),))
        if not path.is_dir():
            raise ModelError(f"{str(path)!r} does not exist. {_EXPECTED}")
        try:
            files = _visible_files(path)
            weights = _weight_files(_denoiser_folder(path))
            sizes = {file: file.stat().st_size for file in files}
        except OSError as error:
            raise ModelError(f"{str(path)!r} cannot be read: {error}. {_EXPECTED}") from error
        others = (CheckpointFile(file, size) for file, size in sizes.items() if file not in weights)
        return cls(path, (*map(CheckpointFile.read, weights), *others))

    @property
    def size(self) -> int:
        """In bytes, all files."""
        return sum(file.size for file in self.files)

    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors of all files by name.

        Raises:
            ModelError: if two files hold one tensor.
        """
        tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            if duplicates := tensors.keys() & file.tensors.keys():
                raise ModelError(
                    f"{file.path} holds {min(duplicates)!r}, which another shard holds too. Fetch the model again."
                )
            tensors |= file.tensors
        return tensors


def _denoiser_folder(folder: Path) -> Path:
    """The folder with the denoiser's weights: this one, or ``transformer`` or ``unet`` in it."""
    candidates = (folder, *map(folder.joinpath, _DENOISERS))
    found = [candidate for candidate in candidates if any(candidate.glob(f"{_WEIGHTS_STEM}*.safetensors"))]
    if len(found) != 1:
        holders = ", ".join(str(candidate.relative_to(folder)) for candidate in found)
        present = holders or sorted(entry.name for entry in folder.iterdir())
        raise ModelError(f"{str(folder)!r} does not hold the weights of one denoiser; there is {present}. {_EXPECTED}")
    return found[0]


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the one set of weights in a folder.

    A second set, another variant for instance, would be copied without the LoRA, and could be loaded by mistake.
    """
    indices = sorted(folder.glob(f"{_WEIGHTS_STEM}*.safetensors.index*.json"))
    files = set(folder.glob(f"{_WEIGHTS_STEM}*.safetensors"))
    sets = [_indexed_files(index, {file.name for file in files}) for index in indices]
    sets += [{file} for file in sorted(files.difference(*sets)) if "-of-" not in file.name]
    unknown = {file for file in folder.glob(f"{_WEIGHTS_STEM}*") if file not in files and file not in indices}
    if len(sets) != 1 or unknown or files != sets[0]:
        names = sorted(file.name for file in files | unknown | set(indices))
        raise ModelError(
            f"{str(folder)!r} holds {names}: not exactly one whole set of weights. Expected one safetensors file, or "
            "shards with their index. Move the others away."
        )
    return sorted(files)


def _indexed_files(index: Path, present: Container[str]) -> set[Path]:
    """The files that an index names. They are its neighbours in ``present``; a path in an index is not followed."""
    try:
        names = set(decode_json(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of shards: {error!r}. Expected JSON with a 'weight_map'.") from None
    missing = [name for name in names if name not in present]
    if missing:
        raise ModelError(f"{index} names {missing[0]!r:.120}, which is not there. Fetch the model again.")
    return {index.parent / name for name in names}


def _visible_files(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, except hidden ones, sorted.

    The folder may come from anybody. So what it links to has to lie in it, or in the cache of the Hub that it is part of;
    no folder is entered by a link, which could lead round for ever, and nothing is opened that is no file.

    Raises:
        ModelError: naming the first entry that is anything else.
    """
    roots = (folder.resolve(), *_hub_blobs(folder.resolve()))
    files, folders = [], [folder]
    while folders:
        for entry in sorted(folders.pop().iterdir()):
            if entry.name.startswith("."):
                continue
            if entry.is_dir() and not entry.is_symlink():
                if len(entry.relative_to(folder).parts) > _DEEPEST:  # deeper than Python can recurse, in the end
                    raise ModelError(f"{str(folder)!r} has folders nested deeper than {_DEEPEST}. {_EXPECTED}")
                folders.append(entry)
            elif not entry.is_file():
                what = "a link that leads to no file" if entry.is_symlink() else "neither a file nor a folder"
                raise ModelError(f"{str(entry)!r} is {what}. Remove it, or put there what it stands for.")
            elif not any(entry.resolve().is_relative_to(root) for root in roots):
                raise ModelError(
                    f"{str(entry)!r} is a link to {str(entry.resolve())!r}, outside of the checkpoint: it could make any "
                    "file of yours part of the copy. Put a copy of the file in its place, or remove it."
                )
            else:
                files.append(entry)
    return sorted(files)


def _hub_blobs(folder: Path) -> Iterator[Path]:
    """Where the Hub's cache keeps the files of a snapshot, ``models--owner--name/snapshots/<commit>``, which holds links."""
    for parent in folder.parents:
        blobs = parent.parent / "blobs"
        if parent.name == "snapshots" and not blobs.is_symlink():
            yield blobs
