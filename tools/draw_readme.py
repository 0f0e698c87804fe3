"""Draw the picture of the README, ``docs/home.png``: what the first cell of the home page shows, for which it trains a LoRA.

Run ``python tools/draw_readme.py`` after a change of that cell, or of what it draws with.
"""

import re
from pathlib import Path
from typing import Any

HOME = Path("docs/index.md")
PICTURE = Path("docs/home.png")
CELL = re.compile(r"^```\{code-cell\} ipython3\n---\n.*?\n---\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def main() -> None:
    """Run the cell as the docs build does, and keep the picture that it ends with."""
    (program,) = CELL.findall(HOME.read_text("utf-8"))
    *_, last = program.rstrip().splitlines()
    names: dict[str, Any] = {}
    exec(compile(program.replace(last, f"picture = {last}"), HOME, "exec"), names)  # noqa: S102 - our own page
    names["picture"].save(PICTURE, optimize=True)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
