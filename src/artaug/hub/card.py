"""The model card: what the LoRA is, how to load it, where it comes from, what was measured. Nothing nobody asked for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from huggingface_hub import ModelCardData

from artaug.evaluation.comparison import Comparison
from artaug.hub.values import Base, Sample
from artaug.run.results import Enhancement

TAG = "artaug"
"""By this tag a repository is known as one that artaug has pushed to."""
_TAGS = ("text-to-image", "diffusers", "lora", "template:sd-lora", TAG)
_LOAD = """\
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{base}", {revision}dtype=torch.bfloat16).to("cuda")
pipeline.load_lora_weights("{repo}", adapter_name="{adapter}")
pipeline.set_adapters("{adapter}", {multiplier:g})
"""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """All that a card can speak of."""

    repo: str
    home: str
    """The address of the Hub."""
    base: Base | None
    layers: int
    rank: int
    multiplier: float
    universal: str
    """The file in PEFT format."""
    twin: str
    """The file in kohya's, or in words why there is none."""
    twin_written: bool
    made: Enhancement | None
    comparison: Comparison | None
    about: Mapping[str, object]
    samples: Sequence[Sample]
    pictures: Sequence[str]
    """The paths of the samples' pictures in the repository."""


def card(contents: Contents) -> str:
    """The whole text of README.md."""
    return f"---\n{_data(contents).to_yaml()}\n---\n\n" + "\n\n".join(_sections(contents)) + "\n"


def _data(contents: Contents) -> ModelCardData:
    """What the Hub reads."""
    base = contents.base
    widget = [
        {"text": sample.prompt, "output": {"url": path}}
        for sample, path in zip(contents.samples, contents.pictures, strict=True)
    ]
    return ModelCardData(
        base_model=None if base is None else base.repo,
        base_model_relation=None if base is None else "adapter",
        library_name="diffusers",
        license=None if base is None else base.license,
        license_name=None if base is None else base.license_name,
        license_link=None if base is None else base.license_link,
        pipeline_tag="text-to-image",
        tags=list(_TAGS),
        widget=widget or None,
    )


def _sections(contents: Contents) -> Iterator[str]:
    name = contents.repo.partition("/")[2]
    yield f"# {name}"
    if contents.samples:
        yield "<Gallery />"
    on = "a text-to-image model" if contents.base is None else _link(contents.base, contents.home)
    how = "made with artaug."
    if contents.made is not None:
        how = (
            "trained with artaug on the model's own pictures before and after a critique (the method of ArtAug, arXiv "
            "2412.12888). It needs no trigger word."
        )
    size = f"{contents.layers} layers, rank {contents.rank}"
    yield f"A LoRA for {on}, {how} {size}; recommended strength {contents.multiplier:g}."
    yield f"## Loading\n\n{_loading(contents)}"
    if contents.made is not None or contents.about:
        yield "## How it was made\n\n" + "\n\n".join(_making(contents))
    if contents.comparison is not None:
        yield f"## What was measured\n\n{_measured(contents.comparison)}"
    yield f"## Licence\n\n{_licence(contents.base, contents.home)}"


def _link(base: Base, home: str) -> str:
    at = "" if base.revision is None else f" (revision `{base.revision}`)"
    return f"[{base.repo}]({home}/{base.repo}){at}"


def _loading(contents: Contents) -> str:
    base = contents.base
    code = _LOAD.format(
        base="the base model" if base is None else base.repo,
        revision="" if base is None or base.revision is None else f'revision="{base.revision}", ',
        repo=contents.repo,
        adapter=TAG,
        multiplier=contents.multiplier,
    )
    if contents.twin_written:
        other = (
            f"ComfyUI and other programs that read kohya's names: put `{contents.twin}` where they look for LoRAs "
            f"(`models/loras`) and load it at strength {contents.multiplier:g}."
        )
    else:
        other = f"There is no file for programs that read kohya's names only: {_inline(contents.twin)}"
    return f"With diffusers (`{contents.universal}`):\n\n```python\n{code}```\n\n{other}"


def _making(contents: Contents) -> Iterator[str]:
    if contents.made is not None:
        heads = ("round", "prompts", "kept pairs", "steps", "held-out gain (95% interval, n)", "part of the result")
        yield _table(heads, _rounds(contents.made))
        yield f"It ended because {_inline(contents.made.stop_reason)}."
    if contents.about:
        yield "\n".join(f"- {_inline(name)}: {_code(thing)}" for name, thing in contents.about.items())


def _rounds(made: Enhancement) -> Iterator[tuple[str, ...]]:
    for one in made.rounds:
        gain = "not measured"
        if one.gain is not None:
            row = one.gain
            gain = f"{row.scorer} {row.delta:+.4g} ({row.ci_low:+.4g} to {row.ci_high:+.4g}, {row.n})"
        used = "yes" if one.accepted else "no"
        yield str(one.number), str(len(one.attempts)), str(one.training.pairs), str(one.training.steps), gain, used


def _measured(comparison: Comparison) -> str:
    heads = ("scorer", "candidate", "n", "base", "enhanced", "difference", "95% interval", "wins", "p")
    rows = (
        (
            row.scorer + " †" * row.filtered_by,
            row.candidate,
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
    verdicts = (f"- {_inline(name)}: {_inline(comparison.verdict(name))}." for name in comparison.candidates)
    notes = " ".join(_inline(note) for note in comparison.notes())
    return "\n\n".join([_table(heads, rows), "\n".join(verdicts), notes])


def _licence(base: Base | None, home: str) -> str:
    if base is None:
        return "The base model was not named when this was pushed. Its licence governs what may be done with this file."
    if base.license is None:
        return f"{_link(base, home)} states no licence that could be passed on. Ask its authors before using this file."
    name = base.license_name or base.license
    terms = name if base.license_link is None else f"[{name}]({base.license_link})"
    return f"This is a derivative of {_link(base, home)} and comes under its licence: {terms}."


def _table(heads: Sequence[str], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [tuple(heads), ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(_inline(cell) for cell in line)} |" for line in lines)


def _inline(text: str) -> str:
    """One line of text that is neither a table's border nor markup."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _code(thing: object) -> str:
    """A ``repr``, or text as it is, that no backtick in it can end."""
    text = " ".join((thing if isinstance(thing, str) else repr(thing)).split())
    longest = max((len(run) for run in "".join(one if one == "`" else " " for one in text).split()), default=0)
    ticks = "`" * (longest + 1)
    pad = " " if longest else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"
