"""Pictures on disk: read when they are looked at, compared with the digest of their pixels, stored without loss by content."""

import os
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, final, overload

from PIL import Image, ImageOps

from artaug._internal.annotations import checked
from artaug._internal.arguments import argument_error, check_argument
from artaug._internal.digests import digest
from artaug._internal.files import atomic_writes, check_regular
from artaug._internal.images import as_rgb, rgb_parts
from artaug.errors import StorageError

T = TypeVar("T")

_UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
"""What PIL raises for bytes that are no picture, or only the beginning of one."""
_REMEDY = "Put back a copy of the file, or go on without what refers to it."
_LONGEST_WEBP_SIDE = 16_383
"""Pixels, the limit of the format."""
_MAX_THREADS = 8
_LONGEST_PATH = 80
"""Characters of a path in a repr."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


@checked
@final
@dataclass(frozen=True, repr=False)
class ImageFile:
    """A picture on disk, by reference: `load` reads it anew each time, and nothing of it stays in memory.

    It stands where a picture may: ``artaug.ImagePair(before=file, ...)``.

    >>> import tempfile
    >>> from PIL import Image
    >>> import artaug as aa
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = aa.ImageFolder(folder).add(Image.new("RGB", (64, 48), "teal"))
    ...     file.size, file.path.suffix, file.load().getpixel((0, 0))
    ((64, 48), '.webp', (0, 128, 128))
    """

    path: Path
    digest: str | None
    """SHA-256 of its size and RGB pixels, which are compared with it when they are read; None if it is not known."""
    size: tuple[int, int]
    """(width, height) in pixels."""
    resized: bool = False
    """Whether a picture of another size in the file is cropped around its middle to the aspect of ``size``, and resized."""

    @classmethod
    def open(cls, path: str | Path) -> "ImageFile":
        """A picture that another program wrote: of its file, the header is read. Its digest is not known.

        Raises:
            StorageError: if there is no file, or no picture in it.
        """
        return cls(Path(path), None, read_image(Path(path), lambda image: image.size))

    def load(self) -> Image.Image:
        """Read the picture, in RGB, and close the file.

        Raises:
            StorageError: if the file is missing, damaged, or holds other pixels than those of ``digest`` or ``size``.
        """
        image = read_image(self.path, as_rgb)
        if self.resized:
            image = ImageOps.fit(image, self.size, Image.Resampling.LANCZOS)
        if image.size != self.size or (self.digest is not None and image_digest(image) != self.digest):
            raise _unusable(self.path, "it holds another picture than the one that was stored in it")
        return image

    def __repr__(self) -> str:
        """The path, or its end, and the size."""
        path, (width, height) = str(self.path), self.size
        shown = path if len(path) <= _LONGEST_PATH else f"...{path[3 - _LONGEST_PATH :]}"
        return f"ImageFile({shown!r}, {width} x {height} pixels)"


class PictureField:
    """A field that holds a picture or an `ImageFile`, and is read as a picture, which a file loads anew each time."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, holder: object | None, owner: type) -> Image.Image:
        if holder is None:  # dataclass asks the class for a default, and there is none
            raise AttributeError(self._name)
        held: Image.Image | ImageFile = vars(holder)[self._name]
        return held.load() if isinstance(held, ImageFile) else held

    def __set__(self, holder: object, picture: "Image.Image | ImageFile") -> None:
        vars(holder)[self._name] = picture  # under its own name, as pickle and copy expect it


@final
@dataclass(frozen=True)
class StoredImages(Sequence[Image.Image]):
    """Pictures on disk as a sequence of pictures: each is read whenever it is looked at, and not kept."""

    files: tuple[ImageFile, ...]

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredImages": ...
    def __getitem__(self, index: int | slice) -> "Image.Image | StoredImages":
        return StoredImages(self.files[index]) if isinstance(index, slice) else self.files[index].load()

    def __repr__(self) -> str:
        return f"<{len(self)} pictures on disk>"


@checked
@final
@dataclass(frozen=True)
class ImageFolder:
    """A folder of pictures without loss, each in the file ``ab/<digest>.webp``, where ``ab`` is the digest's beginning.

    The same picture is stored once. Several processes may add to one folder.
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    def add(self, image: Image.Image | ImageFile) -> ImageFile:
        """Store a picture; see `add_all`, which is faster for several."""
        return self.add_all([image])[0]

    def add_all(self, images: Iterable[Image.Image | ImageFile]) -> list[ImageFile]:
        """Store pictures, in threads, and flush them to the disk together: after an error none of them is there, or all.

        What is stored are the RGB pixels, as everything in artaug sees them. A picture that is there already is read and
        compared, and written again only if it is damaged. A file of this folder is returned as it is.

        Args:
            images: of any size, and any mode that has RGB pixels.

        Returns:
            One file for each picture, in the same order.

        Raises:
            StorageError: if the system cannot write them (no room, no permission), or an `ImageFile` cannot be read.
            InvalidValueError: for something else than a picture, or one without RGB pixels (32-bit modes ``I``, ``F``).
        """
        pending = list(images)
        for index, image in enumerate(pending):
            if not isinstance(image, ImageFile):
                check_argument("ImageFolder.add_all", f"images[{index}]", image, Image.Image)
                image.load()  # PIL reads a file at the first look at its image, and must not do so in two threads
        distinct = {id(image): image for image in pending}
        threads = max(min(len(distinct), os.cpu_count() or 1, _MAX_THREADS), 1)
        what, remedy = f"a picture in {self.path}", "Make room, or choose a folder that can be written to."
        with atomic_writes(self.path, what=what, remedy=remedy) as place, ThreadPoolExecutor(threads) as pool:
            stored = pool.map(lambda image: self._store(image, place), distinct.values())
            files = dict(zip(distinct, stored, strict=True))
        return [files[id(image)] for image in pending]

    def get(self, digest: str, *, size: tuple[int, int] | None = None) -> ImageFile:
        """The file of a picture, by its digest.

        Args:
            digest: 64 hexadecimal digits.
            size: (width, height), if it is known: then no file is opened before the picture is loaded.

        Raises:
            StorageError: if ``size`` is not given and the picture is not there, or damaged.
            InvalidValueError: for what is no digest.
        """
        check_argument("ImageFolder.get", "digest", digest, str)
        if not _DIGEST.fullmatch(digest):
            raise argument_error("ImageFolder.get", "digest", digest, expected="64 hexadecimal digits")
        if size is not None:
            return ImageFile(self._path(digest, size), digest, size)
        small, large = self._path(digest, (1, 1)), self._path(digest, (1, _LONGEST_WEBP_SIDE + 1))
        path = large if large.exists() else small
        return ImageFile(path, digest, read_image(path, lambda image: image.size))

    def _store(self, image: Image.Image | ImageFile, place: Callable[[Path], Path]) -> ImageFile:
        """Write a picture to the path that ``place`` gives for its name, unless it is there already."""
        if isinstance(image, ImageFile):
            if image.digest is not None and image.path == self._path(image.digest, image.size):
                return image
            image = image.load()
        rgb = as_rgb(image)
        digest = image_digest(rgb)
        file = ImageFile(self._path(digest, rgb.size), digest, rgb.size)
        if not _is_whole(file):
            # Of 1,024 x 1,024 pixels with a photo's noise, WebP's fastest setting takes 32 ms and 2.20 MB, the next one
            # 147 ms and 2.16 MB; PNG at its fastest takes 115 ms and 2.47 MB. A quality of 80, PIL's default, takes 120 ms.
            partial = place(file.path)
            if file.path.suffix == ".webp":
                rgb.save(partial, "webp", lossless=True, method=0, quality=0)
            else:
                rgb.save(partial, "png", compress_level=1)
        return file

    def _path(self, digest: str, size: tuple[int, int]) -> Path:
        suffix = "webp" if max(size) <= _LONGEST_WEBP_SIDE else "png"
        return self.path / f"{digest[:2]}/{digest}.{suffix}"  # one join: runs have many pictures


@final
@dataclass(frozen=True)
class LoadedImages(Sequence[Image.Image]):
    """Pictures of which each is loaded when it is looked at, and not kept; those in memory are as they are."""

    references: Sequence[Image.Image | ImageFile]

    def __len__(self) -> int:
        return len(self.references)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | Sequence[Image.Image]:
        if isinstance(index, slice):
            return LoadedImages(self.references[index])
        held = self.references[index]
        return held.load() if isinstance(held, ImageFile) else held


def select_images(images: Sequence[Image.Image], members: Sequence[int]) -> Sequence[Image.Image]:
    """Some of the pictures; of `LoadedImages`, none is read."""
    if isinstance(images, LoadedImages):
        return LoadedImages([images.references[index] for index in members])
    return [images[index] for index in members]


def image_digest(image: Image.Image | ImageFile) -> str:
    """SHA-256 of a picture's size and RGB pixels, as 64 hexadecimal digits, whatever its mode or the format of its file.

    A file whose digest is known is not read.

    Raises:
        InvalidValueError: for a picture that has no RGB pixels (32-bit modes ``I`` and ``F``).
        StorageError: for a file that cannot be read.
    """
    if isinstance(image, ImageFile):
        if image.digest is not None:
            return image.digest
        image = image.load()
    return digest(*rgb_parts(image))


def _is_whole(file: ImageFile) -> bool:
    """Whether a file holds its picture. What a power failure or a copy has cut short must not be trusted for its name."""
    if not file.path.exists():
        return False
    try:
        file.load()
    except StorageError:
        return False
    return True


def read_image(path: Path, look: Callable[[Image.Image], T]) -> T:
    """What ``look`` makes of the picture in a file, which is closed after that.

    Raises:
        StorageError: if the file cannot be read.
    """
    try:
        check_regular(path)
        with Image.open(path) as image:
            return look(image)
    except FileNotFoundError:
        raise _unusable(path, "there is no such file") from None
    except _UNREADABLE as error:
        raise _unusable(path, f"it is no picture, or a damaged one: {error}") from error


def _unusable(path: Path, what: str) -> StorageError:
    return StorageError(f"the picture {path} cannot be used: {what}. {_REMEDY}")
