"""Draw the rooms of the package, floor by floor, as docs/architecture.svg; a test holds the picture against the code.

Run ``python tools/draw_house.py`` after a change of rooms or floors.
"""

import ast
import re
import textwrap
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
WIDTH, GAP, LINE, MARGIN = 1080, 12, 15, 16
CHARACTER = 5.9
"""Mean width of a character of the small text, in pixels."""
INKS = {"room": "#1b3a57", "fill": "#eef3f8", "text": "#26323d", "arrow": "#8a97a5"}


def floors() -> list[list[str]]:
    """Rooms that exist, from the highest floor to the lowest, as import-linter's contract in pyproject.toml has them."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(one for one in pyproject["tool"]["importlinter"]["contracts"] if one["type"] == "layers")
    rooms = [[room.strip(" ()") for room in re.split(r"[|:]", layer)] for layer in contract["layers"]]
    return [present for floor in rooms if (present := [room for room in floor if source_of(room).exists()])]


def source_of(room: str) -> Path:
    """The file whose docstring says what a room is about."""
    package = ROOT / "src" / "artaug" / room
    return package / "__init__.py" if package.is_dir() else package.with_suffix(".py")


def about(room: str) -> str:
    """The first line of a room's docstring."""
    docstring = ast.get_docstring(ast.parse(source_of(room).read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].replace("`", "")


def draw() -> str:
    """The whole picture: one row a floor, an arrow down between rows."""
    parts: list[str] = []
    top = MARGIN
    for number, rooms in enumerate(floors()):
        if number:
            middle = WIDTH / 2
            parts.append(
                f'<path d="M{middle} {top - GAP - 6}v{GAP}m-4 -5l4 5l4 -5" stroke="{INKS["arrow"]}" fill="none"/>'
            )
        width = (WIDTH - 2 * MARGIN - GAP * (len(rooms) - 1)) / len(rooms)
        texts = [textwrap.wrap(about(room), int((width - 20) / CHARACTER)) for room in rooms]
        height = 32 + LINE * max(map(len, texts))
        for place, (room, lines) in enumerate(zip(rooms, texts, strict=True)):
            left = MARGIN + place * (width + GAP)
            parts.append(
                f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{height}" rx="5" fill="{INKS["fill"]}" '
                f'stroke="{INKS["room"]}"/>'
                f'<text x="{left + 10:.1f}" y="{top + 19}" class="room">{escape(room)}</text>'
            )
            parts += [
                f'<text x="{left + 10:.1f}" y="{top + 35 + LINE * row}">{escape(line)}</text>'
                for row, line in enumerate(lines)
            ]
        top += height + 2 * GAP
    style = (
        f"text{{font:11.5px system-ui,sans-serif;fill:{INKS['text']}}}"
        f".room{{font:600 14px ui-monospace,monospace;fill:{INKS['room']}}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" role="img" '
        f'aria-label="The rooms of artaug, floor by floor; an import points down only">\n'
        f'<style>{style}</style>\n<rect width="{WIDTH}" height="{top}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
