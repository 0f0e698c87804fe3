"""The entries of the documentation's reference, over all its pages."""

import re
from pathlib import Path

_PAGES = sorted((Path(__file__).parents[2] / "docs" / "reference").glob("*.md"))


def documented(kinds: str) -> list[str]:
    """The dotted names under ``.. autoclass::`` and its like; kinds is a regular expression of what follows `auto`."""
    entry = re.compile(rf"^\.\. auto(?:{kinds}):: (\S+)$", re.MULTILINE)
    return [name for page in _PAGES for name in entry.findall(page.read_text(encoding="utf-8"))]
