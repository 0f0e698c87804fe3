"""The report of a run or a comparison: one HTML page with the pictures, the scores and the provenance."""

import base64
import platform
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from PIL import Image

from artaug._internal.annotations import checked
from artaug._internal.arguments import check_argument
from artaug._internal.extras import optional
from artaug._internal.files import atomic_write
from artaug.errors import InvalidValueError
from artaug.evaluation.comparison import Comparison
from artaug.image_files import ImageFile
from artaug.pairs import Attempt, Dropped, Kept
from artaug.report.comparisons import gallery_context, headline_context, score_table, verdicts
from artaug.report.image_store import REMEDY, ImagePlacement, ImageStore
from artaug.report.runs import plan_context, round_context, run_headline, run_summary, untrained_context
from artaug.run.planning.run_plan import RunPlan
from artaug.run.planning.usage_counts import find_usages
from artaug.run.results import Enhancement

__all__ = ["write_report"]

_TEMPLATES = Path(__file__).parent / "templates"
_PACKAGES = ("artaug", "torch", "diffusers", "transformers", "peft", "numpy", "pillow")


@checked
def write_report(  # noqa: PLR0913 - keyword-only options of one page
    path: str | Path,
    *,
    result: Enhancement | None = None,
    attempts: Sequence[Attempt] = (),
    comparison: Comparison | None = None,
    plan: RunPlan | None = None,
    title: str = "What the model learned",
    about: Mapping[str, object] = MappingProxyType({}),
    max_pairs: int = 48,
    images: ImagePlacement = "auto",
) -> Path:
    """Write a page about a run, attempts, a comparison, or all of them: it needs no network and no server.

    The same result and comparison give the same bytes. The page is written atomically, after all of its images.

    Args:
        path: where to write; missing folders are made.
        result: the run.
        attempts: of a round without a training: those of `improve`, or of a round that is under way.
        comparison: base and candidates on held-out prompts; the headline is about its last candidate.
        plan: made by `artaug.plan_run` before the run; the page shows it beside what the run took.
        title: heads the page.
        about: objects of the run by name (critic, trainer, ...), printed as their ``repr`` in the provenance; text is
            printed as it is. What the servers behind them have counted so far is printed, too.
        max_pairs: show at most so many kept pairs of each round, and as many dropped ones.
        images: where they are. ``inline``: in the page, which is then a single file. ``folder``: in a folder beside it,
            ``report_images`` for ``report.html``, loaded when they come into view; move the two together.
            ``auto``: inline up to 8 MB of them, else in a folder.

    Returns:
        The path written.

    Raises:
        MissingExtraError: if jinja2 is not installed.
        StorageError: if the system cannot write it.
        InvalidValueError: if there is neither a result nor attempts nor a comparison, a plan without a result, if
            ``max_pairs`` is negative, or for another value of ``images``.
    """
    with optional("jinja2", required_by="write_report", extra="report"):
        import jinja2  # noqa: PLC0415 - an extra
    if result is None and comparison is None and not attempts:
        raise InvalidValueError(
            "write_report received neither a result nor a comparison nor attempts: need one of them."
        )
    check_argument("write_report", "plan", plan, RunPlan, optional=True)
    if plan is not None and result is None:
        raise InvalidValueError(
            "write_report received a plan and no result of a run to compare it with: pass result, too."
        )
    if max_pairs < 0 or images not in get_args(ImagePlacement):
        raise InvalidValueError(
            f"write_report(max_pairs={max_pairs}, images={images!r}): need a number of pairs to show, at least 0, and "
            "images 'auto', 'inline' or 'folder'."
        )
    path = Path(path)
    store = ImageStore.for_page(path, images, _shown_images(result, attempts, comparison, max_pairs))
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
        script_digest=base64.b64encode(sha256(script.encode()).digest()).decode(),  # as a security policy writes it
        image_source=store.csp_source,
        **_comparison_context(comparison, store),
        **_run_context(result, attempts, store, max_pairs),
        plan=plan_context(plan, result) if plan and result else None,
        usage=_usage_rows(about),
        provenance=_provenance_rows(result, comparison, about),
    )
    with atomic_write(path, what="the report", remedy=REMEDY) as partial:
        partial.write_text(page, encoding="utf-8")
    store.remove_stale()
    return path


def _shown_images(
    result: Enhancement | None, attempts: Sequence[Attempt], comparison: Comparison | None, max_pairs: int
) -> Iterator[Image.Image | ImageFile]:
    """Every image that the page will show."""
    if comparison is not None:
        for arm in (comparison.base, *comparison.candidates.values()):
            yield from arm.images
    rounds = [round_.attempts for round_ in result.rounds] if result else []
    for each in (*rounds, attempts):
        for ending in (Kept, Dropped):
            pairs = (attempt.pair for attempt in each if isinstance(attempt, ending))
            for pair in islice(pairs, max_pairs):
                yield from pair.references


def _comparison_context(comparison: Comparison | None, store: ImageStore) -> dict[str, Any]:
    if comparison is None:
        return {"headline": None, "gallery": None, "scorers": [], "verdicts": [], "notes": []}
    return {
        "headline": headline_context(comparison),
        "gallery": gallery_context(comparison, store),
        "scorers": score_table(comparison),
        "verdicts": verdicts(comparison),
        "notes": comparison.notes(),
    }


def _run_context(
    result: Enhancement | None, attempts: Sequence[Attempt], store: ImageStore, max_pairs: int
) -> dict[str, Any]:
    if result is None and not attempts:
        return {"run": None, "summary": [], "rounds": [], "stop_reason": ""}
    rounds = result.rounds if result else ()
    contexts = [round_context(round_, store=store, max_pairs=max_pairs) for round_ in rounds]
    if attempts:
        contexts.append(untrained_context(len(rounds) + 1, attempts, store=store, max_pairs=max_pairs))
    return {
        "run": run_headline(rounds, attempts),
        "summary": run_summary(rounds, attempts),
        "rounds": contexts,
        "stop_reason": result.stop_reason if result else "",
    }


def _usage_rows(about: Mapping[str, object]) -> list[tuple[str, str]]:
    """What the servers of each object have counted, as text; of a filter, those of its scorers."""
    rows = []
    for name, described in about.items():
        if usages := find_usages(described):
            replies, inputs, outputs, uncounted = (
                sum(getattr(usage, count) for usage in usages)
                for count in ("replies", "input_tokens", "output_tokens", "uncounted")
            )
            bound = "at least " if uncounted else ""
            rows.append((name, f"{replies:,} replies, {bound}{inputs:,} input and {outputs:,} output tokens"))
    return rows


def _provenance_rows(
    result: Enhancement | None, comparison: Comparison | None, about: Mapping[str, object]
) -> list[tuple[str, str]]:
    """Objects, seeds, versions and machine, by name."""
    rows = [(name, described if isinstance(described, str) else repr(described)) for name, described in about.items()]
    if result is not None:
        accepted = [round_.lora for round_ in result.rounds if round_.accepted]
        rows.append(("result", repr(accepted[-1]) if accepted else "no LoRA: no round was accepted"))
    if comparison is not None:
        arms = {"base": comparison.base, **comparison.candidates}
        seeds = ", ".join(map(str, comparison.seeds[:4])) + ", ..." * (len(comparison.seeds) > 4)
        rows += [(f"{name} drawn by", arm.synthesizer) for name, arm in arms.items()]
        rows.append(("picture seeds", f"{seeds} ({len(comparison.seeds)} in total, the same for every arm)"))
    return [
        *rows,
        ("versions", ", ".join(f"{name} {version(name)}" for name in _PACKAGES)),
        ("machine", f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"),
    ]
