"""Stand-ins for the npm packages of benchmarks/emoji.py: few pictures, in the packages' own formats."""

import io
import json
import tarfile
from pathlib import Path

from benchmarks._emoji_packages import FLAT, GOOGLE, SOLID, Package
from PIL import Image, ImageDraw

SHAPES = {
    "red-circle": ("1f534", "#f8312f", '<circle cx="16" cy="16" r="14" fill="{}"/>'),
    "blue-square": ("1f7e6", "#0074ba", '<path d="M2 2h28v28H2z" fill="{}"/>'),
    "green-triangle": ("25b2-fe0f", "#00a000", '<path d="M16 2l14 28H2z" fill="{}"/>'),
    "left-half": ("25d0", "#402a32", '<path d="M2 2h14v28H2z" fill="{}"/>'),
}
"""Name: code points, color and drawing."""


def write_packages(folder: Path) -> None:
    """Write the three archives as ``npm pack`` does: `SHAPES`, and ``right-half``, which is an alias."""
    folder.mkdir(parents=True, exist_ok=True)
    icons = {name: {"body": body.format(color)} for name, (_, color, body) in SHAPES.items()}
    icons["keycap"] = {"body": '<path d="M0 0h32v33H0z" fill="#000"/>', "height": 33}
    icons["flat-only"] = {"body": "<g/>"}
    aliases = {"right-half": {"parent": "left-half", "hFlip": True}}
    characters = {points.replace("-fe0f", ""): name for name, (points, _, _) in SHAPES.items()}
    characters |= {"25d1": "right-half", "ffff": "flat-only", "1f44b-1f3fb": "waving-hand-light"}
    flat = {
        "icons.json": json.dumps(
            {"prefix": "test", "icons": icons, "aliases": aliases, "width": 32, "height": 32}
        ).encode(),
        "chars.json": json.dumps(characters).encode(),
    }
    solid = {f"assets/{points}.webp": _picture(color, "WEBP") for points, color, _ in SHAPES.values()}
    solid |= {f"assets/{points}.webp": _picture("#101010", "WEBP") for points in ("25d1", "1f44b-1f3fb", "0001")}
    google = {
        f"img/google/64/{points}.png": _picture(color, "PNG", spot="grey") for points, color, _ in SHAPES.values()
    }
    for package, files in (
        (FLAT, flat),
        (SOLID, solid),
        (GOOGLE, google | {"img/google/sheets/64.png": b"no picture"}),
    ):
        write_package(folder, package, files)


def write_package(folder: Path, package: Package, files: dict[str, bytes], *, version: str | None = None) -> None:
    """Write one archive, whose package.json may state another version."""
    described = json.dumps({"name": package.name, "version": version or package.version}).encode()
    with tarfile.open(folder / package.archive, "w:gz") as archive:
        for name, content in {"package.json": described, **files}.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _picture(color: str, form: str, *, spot: str = "white") -> bytes:
    """A disc with a spot on nothing."""
    picture = Image.new("RGBA", (256, 256))
    pencil = ImageDraw.Draw(picture)
    pencil.ellipse((16, 16, 240, 240), fill=color)
    pencil.ellipse((70, 50, 110, 90), fill=spot)
    file = io.BytesIO()
    picture.save(file, form, lossless=True)
    return file.getvalue()
