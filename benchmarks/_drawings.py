"""Whole drawings of the playground's model, three regions a picture: every method, and how often what is called."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.profiler import record_function

import artaug as aa
from artaug import playground
from artaug.diffusion import DiffusersSynthesizer
from benchmarks import _grid as grid
from benchmarks import _layouts as world
from benchmarks import _memory as memory
from benchmarks import _record as record
from benchmarks import _timing as timing

METHODS = ("plain", "dense", "merged", "output_mix", "auto")
"""All that can follow the default isolation, without `flex`."""
REGIONS = 3
_DENOISER = "denoiser"
_VARIANTS = ("vivid", "softly lit", "sharp", "glowing")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pictures drawn in one call."""

    size: int
    rows: Literal["alike", "unlike"] = "alike"
    """Whether the regions of all pictures have the same boxes, or each picture its own; prompts differ in both."""

    def plans(self, number: int) -> list[aa.Plan]:
        """Plans whose region prompts are other texts for every number."""
        layouts = world.layouts(self.size, seed=number, regions=REGIONS)
        boxes = layouts[0].boxes
        style = ", ".join(word for bit, word in enumerate(_VARIANTS) if number >> bit & 1)
        plans = [layout.plan() if self.rows == "unlike" else replace(layout, boxes=boxes).plan() for layout in layouts]
        return [
            replace(
                plan,
                regions=tuple(
                    replace(region, prompt=f"{region.prompt}, {style}".rstrip(", ")) for region in plan.regions
                ),
            )
            for plan in plans
        ]


BATCHES = (Batch(size=1), Batch(size=16), Batch(size=16, rows="unlike"))


def measured(batches: Sequence[Batch] = BATCHES, *, rounds: int, steps: int | None = None) -> Iterator[record.Row]:
    """A row for every batch and method.

    Args:
        batches: what to draw.
        rounds: drawings of each method.
        steps: sampling steps; None for the playground's own.
    """
    synthesizer = playground.synthesizer() if steps is None else playground.synthesizer(steps=steps)
    for batch in batches:
        yield from batch_rows(synthesizer, batch, rounds=rounds)


def batch_rows(synthesizer: DiffusersSynthesizer, batch: Batch, *, rounds: int) -> list[dict[str, Any]]:
    """The rows of one batch. Every drawing has prompts that have not been drawn before."""
    numbers = itertools.count(1)
    ways = {name: Way(replace(synthesizer, guide=grid.make_guide(name, None)), batch, numbers) for name in METHODS}
    calls = {name: way.calls() for name, way in ways.items()}
    seconds = timing.interleaved({name: way.seconds for name, way in ways.items()}, rounds=rounds)
    choice = next(
        (name for name in grid.EXACT if name in calls and calls[name].attention == calls["auto"].attention), None
    )
    rows: list[dict[str, Any]] = []
    for name in METHODS:
        row: dict[str, Any] = {
            "part": "drawing",
            "image_tokens": round(1 / world.TOKEN) ** 2,
            "regions": REGIONS,
            "batch": batch.size,
            "rows": batch.rows,
            "layout": "playground",
            "dtype": "float32",
            "gradients": False,
            "method": name,
            "steps": synthesizer.steps,
            **timing.timed_columns(seconds, name),
            "attention_calls": sum(calls[name].attention.values()),
            "encoder_calls": calls[name].encoder,
            "encoder_calls_again": calls[name].encoder_again,
        }
        if name == "auto":
            row |= {"choice": choice, **timing.regret(seconds, name, among=grid.EXACT, choice=choice).columns}
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Calls:
    """How often a drawing called what."""

    attention: dict[str, int]
    """Attention kernels of the denoiser."""
    encoder: int
    """The text encoder (T5), with prompts not seen before."""
    encoder_again: int
    """The same, for the same plans once more."""


@dataclass(frozen=True)
class Way:
    """One method on one batch."""

    synthesizer: DiffusersSynthesizer
    batch: Batch
    numbers: Iterator[int]

    def seconds(self) -> float:
        """The time of one drawing of new prompts."""
        draw = self._drawing(next(self.numbers))
        start = time.perf_counter()
        draw()
        return time.perf_counter() - start

    def calls(self) -> Calls:
        """Count the calls of a drawing."""
        draw, pipeline = self._drawing(next(self.numbers)), self.synthesizer.pipeline
        encoder = []
        for _ in range(2):
            with counted(pipeline.text_encoder_2) as calls:
                draw()
            encoder.append(len(calls))
        with recorded(pipeline.transformer):  # the same prompts for every method, since their lengths are in the shapes
            observed = memory.observe(self._drawing(0), inputs=(), within=_DENOISER)
        return Calls(dict(observed.attention_calls), *encoder)

    def _drawing(self, number: int) -> Callable[[], object]:
        plans = self.batch.plans(number)
        if self.synthesizer.guide is None:
            plans = [aa.Plan(plan.prompt) for plan in plans]
        return partial(self.synthesizer.synthesize_batch, plans, seeds=range(len(plans)))


@contextmanager
def counted(module: nn.Module) -> Iterator[list[None]]:
    """A list that grows with every call of a module."""
    calls: list[None] = []
    hook = module.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


@contextmanager
def recorded(module: nn.Module) -> Iterator[None]:
    """Name a module's calls to the profiler."""
    block = record_function(_DENOISER)
    hooks = [
        module.register_forward_pre_hook(lambda *_: block.__enter__() and None),
        module.register_forward_hook(lambda *_: block.__exit__(None, None, None)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
