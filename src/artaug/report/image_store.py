"""Where the pictures of a page are: in it, or in a folder beside it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self
from urllib.parse import quote

from PIL import Image

from artaug._internal.digests import digest
from artaug._internal.files import atomic_write
from artaug._internal.images import data_url
from artaug.images.html import encoded

INLINE_BYTES = 8_000_000
"""How much of pictures a page holds before they move to a folder."""
REMEDY = "Write the report elsewhere, or make room; nothing else of the run is touched."

_NAME = re.compile(r"[0-9a-f]{32}\.(?:png|webp)(?:\.[0-9a-f]{16}\.partial)?")


@dataclass(kw_only=True)
class Album:
    """Gives every picture an address that the page can load.

    In a folder a picture is called by its content, so one that is there is never wrong, and a page written anew leaves
    the pictures of the page before in place until it has replaced it.
    """

    folder: Path
    inline: bool
    _encoded: dict[int, tuple[bytes, str]] = field(default_factory=dict)
    """By identity: what was encoded to see how much there is. Emptied as it is used."""
    _names: set[str] = field(default_factory=set)

    @classmethod
    def beside(cls, page: Path, pictures: Literal["auto", "inline", "folder"], shown: Iterable[Image.Image]) -> Self:
        """Choose the place for all pictures that a page will show."""
        album = cls(folder=page.with_name(f"{page.stem}_pictures"), inline=pictures != "folder")
        if pictures == "auto":
            album.inline = album._fits(shown)
        return album

    @property
    def source(self) -> str:
        """What the page's security policy has to allow."""
        return "data:" if self.inline else "data: 'self'"

    def address(self, image: Image.Image) -> str:
        """The address of a picture; in a folder, it is there when this returns."""
        data, kind = self._encoded.pop(id(image)) if id(image) in self._encoded else encoded(image)
        if self.inline:
            return data_url(data, kind)
        name = f"{digest(data)[:32]}.{kind}"
        if name not in self._names and not (self.folder / name).exists():
            with atomic_write(self.folder / name, what="the report's picture", remedy=REMEDY) as partial:
                partial.write_bytes(data)
        self._names.add(name)
        return f"{quote(self.folder.name)}/{name}"

    def sweep(self) -> None:
        """Remove what an earlier page of this name showed and this one does not; nothing that we did not write."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if _NAME.fullmatch(path.name) and path.name not in self._names:
                path.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _fits(self, shown: Iterable[Image.Image]) -> bool:
        total = 0
        for image in shown:
            self._encoded[id(image)] = encoded(image)
            total += len(self._encoded[id(image)][0])
            if total > INLINE_BYTES:
                return False
        return True
