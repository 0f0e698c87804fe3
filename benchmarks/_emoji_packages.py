"""Emoji drawn flat and in 3D by their makers: fetch the packages with npm, read their pictures, match the subjects.

No picture is in this repository. The flat and the 3D pictures are Microsoft's Fluent Emoji (MIT), the further flat ones
Google's Noto (Apache-2.0), as their npm packages hold them.
"""

import io
import json
import random
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIDE = 64
"""Height and width of a picture in pixels."""
BACKGROUND = 0.875
"""A light grey in [0, 1], so that white subjects have an outline too."""
_RENDERED_SIDE = 256
_SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}


@dataclass(frozen=True)
class Package:
    """A package of the npm registry, at the version that the results were measured with."""

    name: str
    version: str

    @property
    def archive(self) -> str:
        """The name that ``npm pack`` gives the file."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


FLAT = Package("@iconify-json/fluent-emoji-flat", "1.2.6")
SOLID = Package("@lobehub/fluent-emoji-3d", "1.1.0")
GOOGLE = Package("emoji-datasource-google", "16.0.0")


class PackageError(RuntimeError):
    """A package could not be fetched, or is not what its name says."""


@dataclass(frozen=True)
class Pictures:
    """Subjects with two pictures each; rows of all tensors are in the order of ``names``."""

    names: Sequence[str]
    """Captions, such as `grinning cat`; distinct."""
    flat: Tensor
    """RGB in [0, 1], subjects x 3 x side x side."""
    solid: Tensor
    """The same subjects in 3D."""

    def __getitem__(self, rows: slice) -> "Pictures":
        return Pictures(self.names[rows], self.flat[rows], self.solid[rows])


def fetch(folder: Path, *packages: Package) -> None:
    """Fetch the archives of packages that the folder lacks, and check each one.

    Raises:
        PackageError: There is no npm, npm fails, or an archive holds another package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if not (folder / package.archive).exists():
            _pack(folder, package)
        found = json.loads(_only_file(folder, package, "package.json"))
        if (found.get("name"), found.get("version")) != (package.name, package.version):
            raise PackageError(
                f"{folder / package.archive} holds {found.get('name')} {found.get('version')}, expected {package.name} "
                f"{package.version}. Delete the file, and it is fetched again."
            )


def load_pictures(folder: Path, *, most: int | None = None) -> Pictures:
    """Read the subjects that are drawn both flat and in 3D, without variants of skin color, in an order of no meaning.

    Args:
        folder: with the archives of `FLAT` and `SOLID`, or for them.
        most: how many subjects; None for all, 1,570.

    Raises:
        PackageError: The packages have no subject in common.
    """
    fetch(folder, FLAT, SOLID)
    icons = json.loads(_only_file(folder, FLAT, "icons.json"))
    characters: Mapping[str, str] = json.loads(_only_file(folder, FLAT, "chars.json"))
    solids = {_codepoints(points): content for points, content in _files(folder, SOLID, "assets/*.webp")}
    matched = {
        name: solids[_codepoints(points)]
        for points, name in sorted(characters.items())
        if _codepoints(points) in solids and not _SKIN_TONES.intersection(_codepoints(points))
    }
    if not matched:
        raise PackageError(f"{FLAT.name} and {SOLID.name} in {folder} have no subject in common.")
    names = sorted(matched)
    random.Random(0).shuffle(names)
    names = names[:most]
    return Pictures(
        names=[name.replace("-", " ") for name in names],
        flat=torch.stack([_on_background(draw_icon(icons, name)) for name in names]),
        solid=torch.stack([_on_background(Image.open(io.BytesIO(matched[name]))) for name in names]),
    )


def load_google(folder: Path) -> Tensor:
    """Google's flat pictures, pictures x 3 x side x side in [0, 1]."""
    fetch(folder, GOOGLE)
    return torch.stack(
        [
            _on_background(Image.open(io.BytesIO(content)))
            for _, content in _files(folder, GOOGLE, "img/google/64/*.png")
        ]
    )


def draw_icon(icons: Mapping[str, Any], name: str) -> Image.Image:
    """Rasterize an icon of an Iconify JSON: its body in a view box, an alias as its parent turned over.

    Raises:
        PackageError: The set has no such icon.
        ImportError: There is no resvg-py, which the dependency group `emoji` has.
    """
    if alias := icons.get("aliases", {}).get(name):
        picture = draw_icon(icons, alias["parent"])
        if alias.get("hFlip"):
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if alias.get("vFlip"):
            picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        return picture.rotate(-90 * alias.get("rotate", 0))  # quarter turns, clockwise
    if (icon := icons["icons"].get(name)) is None:
        raise PackageError(f"The icon set {icons.get('prefix')} has no icon {name!r}.")
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    import resvg_py  # noqa: PLC0415 - not every environment of the benchmarks has it

    scale = _RENDERED_SIDE / max(width, height)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width * scale}" height="{height * scale}">{icon["body"]}</svg>'
    )
    drawn = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))).convert("RGBA")
    square = Image.new("RGBA", (_RENDERED_SIDE, _RENDERED_SIDE))
    square.paste(drawn, ((_RENDERED_SIDE - drawn.width) // 2, (_RENDERED_SIDE - drawn.height) // 2))
    return square


def to_image(picture: Tensor) -> Image.Image:
    """An image of RGB in [0, 1], 3 x height x width."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """RGB in [0, 1], 3 x height x width."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def _pack(folder: Path, package: Package) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise PackageError(
            f"npm is missing, which fetches {package.name}. Install Node.js, or run `npm pack "
            f"{package.name}@{package.version}` elsewhere and copy {package.archive} into {folder}."
        )
    done = subprocess.run(  # noqa: S603 - the constants above
        [npm, "pack", "--silent", "--pack-destination", str(folder), f"{package.name}@{package.version}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not (folder / package.archive).exists():
        raise PackageError(
            f"npm could not fetch {package.name} {package.version}: {done.stderr.strip()[-300:]}. Check the network and "
            f"npm's registry, or copy {package.archive} into {folder}."
        )


def _files(folder: Path, package: Package, pattern: str) -> Iterator[tuple[str, bytes]]:
    """The names, without their ends, and contents of the files whose path in the package matches."""
    with tarfile.open(folder / package.archive) as archive:
        for member in archive:
            path = PurePosixPath(member.name)  # below "package", as npm packs
            if path.match(f"package/{pattern}") and (content := archive.extractfile(member)) is not None:
                yield path.stem, content.read()


def _only_file(folder: Path, package: Package, name: str) -> bytes:
    with tarfile.open(folder / package.archive) as archive:
        if (member := archive.extractfile(f"package/{name}")) is None:
            raise PackageError(f"{folder / package.archive} has a folder {name}, expected a file.")
        return member.read()


def _codepoints(name: str) -> tuple[str, ...]:
    """A character's code points without the variation selector, which the packages set differently, and leading zeros."""
    return tuple(point.lstrip("0") for point in name.lower().split("-") if point != "fe0f")


def _on_background(picture: Image.Image) -> Tensor:
    """RGB in [0, 1], 3 x side x side."""
    small = picture.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    alpha = torch.from_numpy(np.array(small.getchannel("A"))).float() / 255
    return to_tensor(small) * alpha + BACKGROUND * (1 - alpha)
