"""What the protocol will take, before any weights are there: counts, and hours by rates that are measured or stated."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from artaug._internal.text import duration
from artaug.diffusion import Estimate, estimate
from benchmarks import _record as record
from benchmarks._flux import FLUX_DEV, Geometry
from benchmarks._flux_pipeline import Parts, flux_pipeline
from benchmarks._on_flux_protocol import Protocol, Training

RESULTS = Path(__file__).parent / "results" / "h200"
_MEASURED = "measured on an H200 with FLUX.1-dev's geometry and random weights"
_STATED = "stated, not measured"
PICTURE_BYTES = 2e6
"""Of 1,024 x 1,024 pixels without loss, see docs/runs.md."""
FLUX_DEV_PARTS = Parts()
_REDRAWN = 0.9
"""The share of pictures for which a critic suggests something: stated, not measured."""
_PASSES_A_STEP = 7
"""Denoiser passes of the trainer's default, a pair and step: the student forward at both pictures, and backward as two each; the
teacher at both, for two steps."""
_PASSES_MEASURED = 4
"""Those of the training step that was measured on an H200: the student forward and backward, the teacher forward."""


@dataclass(frozen=True)
class Rate:
    """Seconds that one of something takes, and how that is known."""

    seconds: float
    basis: str


def rates(results: Path = RESULTS) -> dict[str, Rate]:
    """Of one H200; another GPU scales what is measured."""
    steps, trained = (json.loads((results / f"{name}.json").read_text())["rows"] for name in ("regional", "training"))
    plain = [row["seconds"] for row in steps if row["method"] == "plain" and row["pixels"] == 1024]
    regional = [row["seconds"] for row in steps if row["method"] == "merged" and row["pixels"] == 1024]
    paired = _rows(trained, method="PairedDifference, echo=1", storage="plain", pixels=1024, batch=4)
    return {
        "step": Rate(median(plain), f"{_MEASURED} (results/h200/regional.json)"),
        "regional step": Rate(
            max(regional), f"{_MEASURED}, the most of the regions there (results/h200/regional.json)"
        ),
        "training step": Rate(
            paired[0]["seconds_per_step"] * _PASSES_A_STEP / _PASSES_MEASURED,
            f"that of PairedDifference {_MEASURED}, four pairs (results/h200/training.json), by the passes of PairedPreference",
        ),
        "encode and decode": Rate(0.5, _STATED),
        "critic's answer": Rate(4.0, f"{_STATED}: a model of 8 billion weights on this GPU, in batches"),
        "judge's answer": Rate(0.5, f"{_STATED}: a model of 8 billion weights on this GPU, a few tokens"),
        "score": Rate(0.05, _STATED),
    }


def _rows(rows: list[dict[str, Any]], **values: object) -> list[dict[str, Any]]:
    return [row for row in rows if values.items() <= row.items()]


def plan_rows(
    protocol: Protocol, *, candidates: int, scorers: int, judged: bool, known: Mapping[str, Rate]
) -> Iterator[record.Row]:
    """A row for each stage: how often, denoiser passes, and seconds.

    Args:
        protocol: what will be drawn.
        candidates: LoRAs that are compared with the base, those of the rounds included.
        scorers: of each picture.
        judged: whether a judge is asked.
        known: see `rates`.
    """
    if protocol.training is not None:
        yield from _training_rows(protocol, protocol.training, known)
    pictures = (1 + candidates) * len(protocol.prompts) * protocol.images_per_prompt
    yield _drawing("compare: draw", pictures, protocol.steps, "step", known)
    yield _row("compare: score", pictures * (scorers + 1), "scores", "score", known)
    if judged:
        questions = 2 * candidates * len(protocol.prompts) * protocol.images_per_prompt
        yield _row("compare: judge, both orders", questions, "answers", "judge's answer", known)


def _training_rows(protocol: Protocol, training: Training, known: Mapping[str, Rate]) -> Iterator[record.Row]:
    drawn = training.rounds * len(training.prompts)
    redrawn = round(_REDRAWN * drawn)
    steps = training.rounds * training.trainer.steps
    yield _drawing("rounds: draw", drawn, protocol.steps, "step", known)
    yield _row("rounds: critique", drawn, "answers", "critic's answer", known)
    yield _drawing("rounds: redraw", redrawn, protocol.steps, "regional step", known)
    yield _row("rounds: filter", 2 * 2 * redrawn, "scores", "score", known)
    yield {
        **_row("rounds: train", steps, "steps", "training step", known),
        "passes": _PASSES_A_STEP * steps * training.trainer.batch_size,
    }
    held_out = (training.rounds + 1) * len(training.held_out)
    yield _drawing("rounds: stop rule", held_out, protocol.steps, "step", known)


def _drawing(stage: str, pictures: int, steps: int, rate: str, known: Mapping[str, Rate]) -> record.Row:
    each = Rate(steps * known[rate].seconds + known["encode and decode"].seconds, known[rate].basis)
    return {**_row(stage, pictures, "pictures", "picture", {"picture": each}), "passes": pictures * steps}


def _row(stage: str, count: int, unit: str, rate: str, known: Mapping[str, Rate]) -> record.Row:
    each = known[rate]
    return {
        "stage": stage,
        "count": count,
        "unit": unit,
        "passes": 0,
        "seconds_each": each.seconds,
        "seconds": count * each.seconds,
        "basis": each.basis,
    }


def flux_sizes(protocol: Protocol, geometry: Geometry = FLUX_DEV, parts: Parts = FLUX_DEV_PARTS) -> Estimate:
    """The memory of FLUX.1-dev and of a training of it, computed on torch's meta device."""
    return estimate(
        flux_pipeline(replace(geometry, device="meta"), parts),
        trainer=protocol.training.trainer if protocol.training else None,
        width=protocol.size_px,
        height=protocol.size_px,
    )


def memory_rows(protocol: Protocol, sizes: Estimate, *, local_models: int) -> Iterator[record.Row]:
    """What has to be in the GPU's memory: computed for FLUX.1-dev, stated for scorers and multimodal models."""
    computed = "computed by artaug.diffusion.estimate"
    yield {"what": "FLUX.1-dev with encoders and VAE", "bytes": sizes.pipeline_bytes, "basis": computed}
    if protocol.training:
        yield {"what": "the training, at its peak, without other models", "bytes": sizes.peak_bytes, "basis": computed}
    for _ in range(local_models):
        yield {"what": "a multimodal model of 8 billion weights", "bytes": 17.6e9, "basis": f"{_STATED}: bfloat16"}
    yield {"what": "scorers and DINOv2", "bytes": 12e9, "basis": f"{_STATED}: the sizes of the published files"}


def disk_bytes(protocol: Protocol, sizes: Estimate, *, candidates: int) -> float:
    """Pictures and LoRAs: those of the comparison, and those of every round, whose LoRAs grow and are there three times."""
    compared = (1 + candidates) * len(protocol.prompts) * protocol.images_per_prompt
    training = protocol.training
    pixels = (protocol.size_px / 1024) ** 2
    if training is None:
        return compared * PICTURE_BYTES * pixels
    drawn = training.rounds * len(training.prompts) * (1 + _REDRAWN) + (training.rounds + 1) * len(training.held_out)
    loras = 3 * sum(range(1, training.rounds + 1)) * sizes.lora_bytes
    return (compared + drawn) * PICTURE_BYTES * pixels + loras


def text(
    rows: list[record.Row], memory: list[record.Row], disk: float, *, hourly_price: float | None, what: str
) -> str:
    """The plan for people."""
    seconds = sum(row["seconds"] for row in rows)
    bases = list(dict.fromkeys(row["basis"] for row in rows))
    shown = [
        {
            "stage": row["stage"],
            "count": f"{row['count']:,} {row['unit']}",
            "denoiser passes": f"{row['passes']:,}" if row["passes"] else "",
            "each": f"{row['seconds_each']:.3g} s",
            "time": duration(row["seconds"]),
            "known by": f"[{bases.index(row['basis']) + 1}]",
        }
        for row in rows
    ]
    passes = sum(row["passes"] for row in rows)
    price = "" if hourly_price is None else f", {hourly_price * seconds / 3600:,.0f} at {hourly_price:g} an hour"
    advice = (
        "All at once, or the largest alone with --one-at-a-time. Where the weights are, --plan --train --measure measures "
        "the rounds instead (artaug.plan_run)."
    )
    lines = [
        f"ESTIMATE, not a measurement: {what}, on one H200",
        "",
        record.table(shown),
        "",
        *(f"[{number}] {basis}" for number, basis in enumerate(bases, start=1)),
        "",
        f"in all: {seconds / 3600:,.1f} GPU hours{price}; {passes:,} denoiser passes; {disk / 1e9:,.1f} GB on disk",
        *(f"GPU memory: {row['bytes'] / 2**30:.1f} GiB, {row['what']} ({row['basis']})" for row in memory),
        advice,
    ]
    return "\n".join(lines)
