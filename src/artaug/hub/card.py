"""The model card of a push: what the LoRA is, how to load it, how it was trained, what was measured, its licence."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from urllib.parse import quote

from huggingface_hub import ModelCardData

from artaug.evaluation.comparison import Comparison
from artaug.hub.values import Base, Sample
from artaug.run.results import Enhancement

TAG = "artaug"
"""The tag of repositories that artaug has pushed to."""
_BAR = "\\|"
"""A vertical bar within the cell of a table."""
_TAGS = ("text-to-image", "diffusers", "lora", "template:sd-lora", TAG)
_LOAD = """\
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({base}, {revision}dtype=torch.bfloat16).to("cuda")
pipeline.load_lora_weights("{repo}", adapter_name="{adapter}")
pipeline.set_adapters("{adapter}", {multiplier:g})
"""


@dataclass(frozen=True, kw_only=True)
class CardFields:
    """The values that a card shows."""

    repo: str
    endpoint: str
    """The URL of the Hub."""
    base: Base | None
    layers: int
    rank: int
    multiplier: float
    peft_file: str
    kohya_file: str
    has_kohya_file: bool
    """False where the format has no names for the layers."""
    enhancement: Enhancement | None
    comparison: Comparison | None
    about: Mapping[str, object]
    samples: Sequence[Sample]
    image_paths: Sequence[str]
    """The paths of the samples' images in the repository."""


def render_card(fields: CardFields) -> str:
    """The text of README.md."""
    return f"---\n{_metadata(fields).to_yaml()}\n---\n\n" + "\n\n".join(_sections(fields)) + "\n"


def _metadata(fields: CardFields) -> ModelCardData:
    """The YAML header, which the Hub reads."""
    base = fields.base
    widget = [
        {"text": _one_line(sample.prompt), "output": {"url": path}}
        for sample, path in zip(fields.samples, fields.image_paths, strict=True)
    ]
    return ModelCardData(
        base_model=None if base is None else base.repo,
        base_model_relation=None if base is None else "adapter",
        library_name="diffusers",
        license=None if base is None else base.license,
        license_name=None if base is None or base.license_name is None else _one_line(base.license_name),
        license_link=None if base is None else _web_link(base.license_link),
        pipeline_tag="text-to-image",
        tags=list(_TAGS),
        widget=widget or None,
    )


def _sections(fields: CardFields) -> Iterator[str]:
    name = fields.repo.partition("/")[2]
    yield f"# {name}"
    if fields.samples:
        yield "<Gallery />"
    base = "a text-to-image model" if fields.base is None else _link(fields.base, fields.endpoint)
    with_artaug = f"with artaug {version('artaug')}"  # whose defaults are what the card does not name
    origin = f"made {with_artaug}."
    if fields.enhancement is not None:
        origin = (
            f"trained {with_artaug} on the model's own pictures before and after a critique (the method of ArtAug, arXiv "
            "2412.12888). It needs no trigger word."
        )
    size = f"{fields.layers} layers, rank {fields.rank}"
    yield f"A LoRA for {base}, {origin} {size}; recommended strength {fields.multiplier:g}."
    yield f"## Loading\n\n{_loading(fields)}"
    if fields.enhancement is not None or fields.about:
        yield "## How it was made\n\n" + "\n\n".join(_training_details(fields))
    if fields.comparison is not None:
        yield f"## What was measured\n\n{_measurements(fields.comparison)}"
    yield f"## Licence\n\n{_licence(fields.base, fields.endpoint)}"


def _link(base: Base, endpoint: str) -> str:
    revision = "" if base.revision is None else f" (revision {_code(base.revision)})"
    return f"[{base.repo}]({endpoint}/{base.repo}){revision}"  # a checked name: letters, digits, "-", "_", "."


def _loading(fields: CardFields) -> str:
    base = fields.base
    code = _LOAD.format(
        base=json.dumps("the base model" if base is None else base.repo),
        revision="" if base is None or base.revision is None else f"revision={json.dumps(base.revision)}, ",
        repo=fields.repo,
        adapter=TAG,
        multiplier=fields.multiplier,
    )
    if not fields.has_kohya_file:
        kohya_note = (
            "There is no file for programs that read kohya's names only: that format has no names for these layers."
        )
    else:
        kohya_note = (
            f"ComfyUI and other programs that read kohya's names: put `{fields.kohya_file}` where they look for LoRAs "
            f"(`models/loras`) and load it at strength {fields.multiplier:g}."
        )
    return f"With diffusers (`{fields.peft_file}`):\n\n```python\n{code}```\n\n{kohya_note}"


def _training_details(fields: CardFields) -> Iterator[str]:
    if fields.enhancement is not None:
        headings = ("round", "prompts", "kept pairs", "steps", "held-out gain (95% interval, n)", "part of the result")
        rows = []
        for round_ in fields.enhancement.rounds:
            gain = "not measured"
            if (row := round_.gain) is not None:
                gain = f"{_code(row.scorer)} {row.delta:+.4g} ({row.ci_low:+.4g} to {row.ci_high:+.4g}, {row.n})"
            counts = (round_.number, len(round_.attempts), round_.training.pairs, round_.training.steps)
            rows.append((*map(str, counts), gain, "yes" if round_.accepted else "no"))
        yield _table(headings, rows)
    if fields.about:
        yield "\n".join(f"- {_code(name)}: {_code(value)}" for name, value in fields.about.items())


def _measurements(comparison: Comparison) -> str:
    headings = ("scorer", "candidate", "n", "base", "enhanced", "difference", "95% interval", "wins", "p")
    rows = (
        (
            _code(row.scorer) + " *" * row.filtered_by,
            _code(row.candidate),
            str(row.n),
            f"{row.base:.{row.decimals}f}",
            f"{row.enhanced:.{row.decimals}f}",
            f"{row.delta:+.{row.decimals}f}",
            f"{row.ci_low:+.{row.decimals}f} to {row.ci_high:+.{row.decimals}f}",
            f"{row.win_rate:.1%}",
            f"{row.p_value:.2g}",
        )
        for row in comparison.rows
    )
    verdicts = (f"- {_code(name)}: {_code(comparison.verdict(name))}." for name in comparison.candidates)
    # Not the notes on failures: they quote an exception, which may quote anything.
    return "\n\n".join([_table(headings, rows), "\n".join(verdicts), " ".join(comparison.design_notes())])


def _licence(base: Base | None, endpoint: str) -> str:
    if base is None:
        return "The base model was not named when this was pushed. Its licence governs what may be done with this file."
    if base.license is None:
        return f"{_link(base, endpoint)} states no licence that could be passed on. Ask its authors before using this file."
    name, link = _code(base.license_name or base.license), _web_link(base.license_link)
    terms = name if link is None else f"[{name}]({link})"
    return f"This is a derivative of {_link(base, endpoint)} and comes under its licence: {terms}."


def _table(headings: Sequence[str], rows: Iterable[tuple[str, ...]]) -> str:
    """A table of cells that are Markdown. A bar ends a cell wherever it stands, in code too."""
    lines = [tuple(headings), ("---",) * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', _BAR) for cell in line)} |" for line in lines)


# What is not ours (names, prompts, the licence of somebody's model) stands on the card as code. In plain text no escape
# holds everywhere: a reader makes links of bare addresses and of names after @, also where their characters are escaped.


def _code(value: object) -> str:
    """Inline code of a ``repr``, or of text as it is: between more backticks than it contains in a row."""
    text = _one_line(value if isinstance(value, str) else repr(value)) or "(nothing)"
    longest = max(map(len, re.findall("`+", text)), default=0)
    ticks = "`" * (longest + 1)
    pad = " " if longest else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _one_line(text: str) -> str:
    """Text without line breaks and control characters, none of which may end a paragraph or the header."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _web_link(link: str | None) -> str | None:
    """A link to a page of the web, with every character escaped that could end it; None for any other."""
    if link is None or not link.startswith(("https://", "http://")):
        return None
    return quote(link, safe=":/?#@!$&*+,;=%~-._")
