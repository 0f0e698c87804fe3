"""Provenance of a report: objects, seeds, versions and machine, and what servers counted."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Protocol, runtime_checkable

from artaug.evaluation.comparison import Comparison
from artaug.run.results import Enhancement

_PACKAGES = ("artaug", "torch", "diffusers", "transformers", "peft", "numpy", "pillow")


@runtime_checkable
class UsageCounts(Protocol):
    """What a client of a server has counted, as `artaug.critics.Usage` does."""

    replies: int
    input_tokens: int
    output_tokens: int
    uncounted: int


def usage_rows(about: Mapping[str, object]) -> list[tuple[str, str]]:
    """The usage of each object that has a ``usage``, as text."""
    usages = {name: getattr(described, "usage", None) for name, described in about.items()}
    return [(name, _format_usage(usage)) for name, usage in usages.items() if isinstance(usage, UsageCounts)]


def _format_usage(usage: UsageCounts) -> str:
    bound = "at least " if usage.uncounted else ""
    return f"{usage.replies:,} replies, {bound}{usage.input_tokens:,} input and {usage.output_tokens:,} output tokens"


def provenance_rows(
    result: Enhancement | None, comparison: Comparison | None, about: Mapping[str, object]
) -> list[tuple[str, str]]:
    """Objects, seeds, versions and machine, by name."""
    rows = [(name, described if isinstance(described, str) else repr(described)) for name, described in about.items()]
    if result is not None:
        accepted = [round_.lora for round_ in result.rounds if round_.accepted]
        rows.append(("result", repr(accepted[-1]) if accepted else "no LoRA: no round was accepted"))
    if comparison is not None:
        arms = {"base": comparison.base, **comparison.candidates}
        seeds = ", ".join(map(str, comparison.seeds[:4])) + ", …" * (len(comparison.seeds) > 4)
        rows += [(f"{name} drawn by", arm.synthesizer) for name, arm in arms.items()]
        rows.append(("picture seeds", f"{seeds} ({len(comparison.seeds)} in total, the same for every arm)"))
    return [
        *rows,
        ("versions", ", ".join(f"{name} {version(name)}" for name in _PACKAGES)),
        ("machine", f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"),
    ]
