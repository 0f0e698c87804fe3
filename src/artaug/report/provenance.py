"""Where the numbers of a page came from, and what they cost beside time."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Protocol, runtime_checkable

from artaug.evaluation.comparison import Comparison
from artaug.run.results import Enhancement

_PACKAGES = ("artaug", "torch", "diffusers", "transformers", "peft", "numpy", "pillow")


@runtime_checkable
class Used(Protocol):
    """What a server counted, like `artaug.critics.Usage`."""

    replies: int
    input_tokens: int
    output_tokens: int
    uncounted: int


def usages(about: Mapping[str, object]) -> list[tuple[str, str]]:
    """What each object that counts its use has used so far, in words."""
    counted = ((name, getattr(thing, "usage", None)) for name, thing in about.items())
    return [(name, _used(usage)) for name, usage in counted if isinstance(usage, Used)]


def _used(usage: Used) -> str:
    least = "at least " if usage.uncounted else ""
    tokens = f"{least}{usage.input_tokens:,} tokens read and {usage.output_tokens:,} written"
    return f"{usage.replies:,} replies, {tokens}"


def origins(
    result: Enhancement | None, comparison: Comparison | None, about: Mapping[str, object]
) -> list[tuple[str, str]]:
    """Objects, seeds, versions and machine, by name."""
    told = [(name, thing if isinstance(thing, str) else repr(thing)) for name, thing in about.items()]
    if result is not None:
        accepted = [one.lora for one in result.rounds if one.accepted]
        told.append(("result", repr(accepted[-1]) if accepted else "no LoRA: no round was accepted"))
    if comparison is not None:
        arms = {"base": comparison.base, **comparison.candidates}
        seeds = ", ".join(map(str, comparison.seeds[:4])) + ", …" * (len(comparison.seeds) > 4)
        told += [(f"{name} drawn by", arm.synthesizer) for name, arm in arms.items()]
        told.append(("picture seeds", f"{seeds} ({len(comparison.seeds)} in all, the same for every arm)"))
    return [
        *told,
        ("versions", ", ".join(f"{name} {version(name)}" for name in _PACKAGES)),
        ("machine", f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"),
    ]
