"""What a person looks at after a run or a comparison: one page with the pictures, the numbers and where they came from."""

import base64
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from PIL import Image

from artaug._internal.files import atomic_write
from artaug.errors import InvalidValueError, MissingExtraError
from artaug.evaluation.comparison import Comparison
from artaug.pairs import Dropped, Kept
from artaug.report.comparisons import gallery_of, headline_of, table_of, verdicts_of
from artaug.report.image_store import REMEDY, Album
from artaug.report.provenance import origins, usages
from artaug.report.runs import facts_of, headline_of_run, round_of
from artaug.run.results import Enhancement

__all__ = ["write_report"]

_TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    path: str | Path,
    *,
    result: Enhancement | None = None,
    comparison: Comparison | None = None,
    title: str = "What the model learned",
    about: Mapping[str, object] = MappingProxyType({}),
    pairs: int = 48,
    pictures: Literal["auto", "inline", "folder"] = "auto",
) -> Path:
    """Write a page about a run, a comparison, or both: it needs no network and no server.

    The same result and comparison give the same bytes. The page appears whole or not at all, and only when all of its
    pictures are in place.

    Args:
        path: where to write; folders in between are made.
        result: the run.
        comparison: base and candidates on held-out prompts; its last candidate is the one the headline is about.
        title: heads the page.
        about: objects of the run by name (critic, trainer, ...), printed as their ``repr`` in the provenance; text as
            it is. What a critic behind a server has used so far is told beside the times.
        pairs: how many of the pairs of each round to show: at most so many kept ones, and as many refused.
        pictures: where they are. ``inline``: in the page, which is then one file to send. ``folder``: in a folder beside
            it, ``report_pictures`` for ``report.html``, loaded when they come into view; the two travel together.
            ``auto``: inline up to 8 MB of them, else in a folder.

    Returns:
        The path written.

    Raises:
        MissingExtraError: if jinja2 is not installed.
        StorageError: if the system cannot write it.
        InvalidValueError: if there is neither a result nor a comparison, if ``pairs`` is negative, or for another word
            in ``pictures``.
    """
    try:
        import jinja2  # noqa: PLC0415 - an extra
    except ImportError:
        raise MissingExtraError("write_report", package="jinja2", extra="report") from None
    _check(result, comparison, pairs, pictures)
    path = Path(path)
    album = Album.beside(path, pictures, _shown(result, comparison, pairs))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    page = environment.get_template("report.html.j2").render(
        title=title,
        style=(_TEMPLATES / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_digest=base64.b64encode(sha256(script.encode()).digest()).decode(),
        picture_source=album.source,
        **_views(result, comparison, about, album=album, pairs=pairs),
    )
    with atomic_write(path, what="the report", remedy=REMEDY) as partial:
        partial.write_text(page, encoding="utf-8")
    album.sweep()
    return path


def _check(result: Enhancement | None, comparison: Comparison | None, pairs: int, pictures: str) -> None:
    if result is None and comparison is None:
        raise InvalidValueError("write_report received neither a result nor a comparison: need one of them, or both.")
    if pairs < 0 or pictures not in {"auto", "inline", "folder"}:
        raise InvalidValueError(
            f"write_report(pairs={pairs}, pictures={pictures!r}): need a number of pairs to show, at least 0, and "
            "pictures 'auto', 'inline' or 'folder'."
        )


def _shown(result: Enhancement | None, comparison: Comparison | None, pairs: int) -> Iterator[Image.Image]:
    """Every picture that the page will show."""
    if comparison is not None:
        for arm in (comparison.base, *comparison.candidates.values()):
            yield from arm.images
    for one in result.rounds if result else ():
        for kind in (Kept, Dropped):
            of_kind = [attempt.pair for attempt in one.attempts if isinstance(attempt, kind)]
            for pair in of_kind[:pairs]:
                yield from (pair.before, pair.after)


def _views(
    result: Enhancement | None,
    comparison: Comparison | None,
    about: Mapping[str, object],
    *,
    album: Album,
    pairs: int,
) -> dict[str, Any]:
    """What the template reads."""
    views: dict[str, Any] = {"headline": None, "gallery": None, "scorers": [], "verdicts": [], "notes": []}
    if comparison is not None:
        views = {
            "headline": headline_of(comparison),
            "gallery": gallery_of(comparison, album),
            "scorers": table_of(comparison),
            "verdicts": verdicts_of(comparison),
            "notes": comparison.notes(),
        }
    return {
        **views,
        "run": headline_of_run(result) if result else None,
        "facts": facts_of(result) if result else [],
        "rounds": [round_of(one, album=album, shown=pairs) for one in result.rounds] if result else [],
        "stop_reason": result.stop_reason if result else "",
        "usages": usages(about),
        "provenance": origins(result, comparison, about),
    }
