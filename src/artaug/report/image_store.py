"""Where the images of a report are: inside the page as data URLs, or in a folder beside it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self, TypeAlias
from urllib.parse import quote

from PIL import Image

from artaug._internal.digests import digest
from artaug._internal.files import atomic_write, remove_abandoned
from artaug._internal.images import data_url
from artaug.image_files import ImageFile, image_digest
from artaug.images.html import encode_image

INLINE_BYTES = 8_000_000
"""Images of more bytes than this go to a folder where ``placement`` is ``auto``."""
REMEDY = "Write the report elsewhere, or let the folder be written to; nothing else of the run is touched."

ImagePlacement: TypeAlias = Literal["auto", "inline", "folder"]

_STORED_NAME = re.compile(r"[0-9a-f]{32}\.(?:png|webp)")


@dataclass(kw_only=True)
class ImageStore:
    """Gives every image a URL that the page can load.

    In a folder the name of a file is the digest of its content. So a file that exists is correct, and a page that is
    written again leaves the images of the old page in place until it replaces that page.
    """

    folder: Path
    inline: bool
    _encoded: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    """By digest, images that were encoded to add up their sizes."""
    _names: set[str] = field(default_factory=set)

    @classmethod
    def for_page(cls, page: Path, placement: ImagePlacement, images: Iterable[Image.Image | ImageFile]) -> Self:
        """Make the store for a page that will show ``images``."""
        store = cls(folder=page.with_name(f"{page.stem}_images"), inline=placement != "folder")
        if placement == "auto":
            store.inline = store._fits_inline(images)
        return store

    @property
    def csp_source(self) -> str:
        """The ``img-src`` of the page's content security policy."""
        return "data:" if self.inline else "data: 'self'"

    def url(self, image: Image.Image | ImageFile) -> str:
        """The URL of an image; in a folder, its file exists when this returns."""
        data, image_format = self._encode(image)
        if self.inline:
            return data_url(data, image_format)
        name = f"{digest(data)[:32]}.{image_format}"
        if name not in self._names and not (self.folder / name).exists():
            with atomic_write(self.folder / name, what="the report's picture", remedy=REMEDY) as partial:
                partial.write_bytes(data)
        self._names.add(name)
        return f"{quote(self.folder.name)}/{name}"

    def remove_stale(self) -> None:
        """Remove images of an earlier page of this name that this one does not show, and no other file."""
        if not self.folder.is_dir():
            return
        remove_abandoned(self.folder)
        for path in self.folder.iterdir():
            if _STORED_NAME.fullmatch(path.name) and path.name not in self._names:
                path.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _fits_inline(self, images: Iterable[Image.Image | ImageFile]) -> bool:
        total = 0
        for image in images:
            data, image_format = self._encode(image)
            self._encoded[image_digest(image)] = data, image_format
            total += len(data)
            if total > INLINE_BYTES:
                return False
        return True

    def _encode(self, image: Image.Image | ImageFile) -> tuple[bytes, str]:
        """The bytes of an image and their format."""
        known = self._encoded.get(image_digest(image)) if self._encoded else None
        return known or encode_image(image.load() if isinstance(image, ImageFile) else image)
