"""The protocol on loaded models: train rounds if asked to, draw base and candidates with the same seeds, score, and compare."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import artaug as aa
from artaug._internal.prompts import prompt_clusters
from artaug.evaluation.statistics import paired_bootstrap
from artaug.images.similarity import compare_pairs
from artaug.scorers import AestheticScore, ClipScore, PickScore
from artaug.synthesis import draw
from benchmarks import _record as record
from benchmarks._on_flux_models import Models


@dataclass(frozen=True, kw_only=True)
class Training:
    """The rounds: prompts -> critic -> regional redraw -> filter -> LoRA, as the paper runs them, with artaug's defaults.

    Thresholds, LoRA settings and prompts of the paper are not published; these are ours.
    """

    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    """Of the stop rule, in no comparison."""
    rounds: int = 3
    aesthetic_gain: float = 0.1
    """What a pair has to gain by LAION's aesthetic score, the paper's filter."""
    clip_drop: float = 0.5
    """What it may lose by CLIPScore, the paper's other filter."""
    stop_gain: float = 0.0
    """What a round has to gain by PickScore, or the rounds end."""
    trainer: aa.DifferentialLoRATrainer = field(
        default_factory=lambda: aa.DifferentialLoRATrainer(gradient_checkpointing=True)
    )
    seed: int = 0
    sample: int = 8
    """Prompts from which `artaug.plan_run` estimates the run before it begins."""
    sample_steps: int = 8


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is drawn and how: the same for every arm."""

    prompt_set: str
    """Where the prompts are from."""
    prompts: tuple[str, ...]
    images_per_prompt: int = 2
    """Seeds a prompt; at least 2, of which diversity is measured."""
    size_px: int = 1024
    steps: int = 28
    batch_size: int = 4
    seed: int = 1
    """Of the pictures; another one than the training's."""
    training: Training | None = None
    guide: aa.Guide = field(default_factory=aa.RegionalAttention)
    """How the regions of a redraw take effect."""
    tokens: int | None = None
    """Of a prompt; None for as many as the model's family reads."""
    one_at_a_time: bool = False
    """Whether models wait in host memory while others compute."""
    is_dry_run: bool = False

    @property
    def placement(self) -> aa.Placement:
        """Of all models."""
        return aa.OneAtATime() if self.one_at_a_time else aa.Resident()


def training_arguments(protocol: Protocol, models: Models, out: Path) -> dict[str, Any]:
    """What `artaug.enhance` and `artaug.plan_run` get, but for the prompts."""
    training = protocol.training
    if training is None or models.critic is None:
        raise aa.InvalidValueError("this protocol has no training, or no critic was loaded.")
    return {
        "synthesizer": models.base,
        "critic": models.critic,
        "planner": aa.GreedyPlanner(),
        "keep": pair_filter(training, models),
        "trainer": training.trainer,
        "rounds": training.rounds,
        "stop": aa.StopRule(models.scorer(PickScore), training.held_out, at_least=training.stop_gain),
        "store": out / "run",
        "seed": training.seed,
        "batch_size": protocol.batch_size,
        "chunk_size": 16 * protocol.batch_size,
        "placement": protocol.placement,
    }


def pair_filter(training: Training, models: Models) -> aa.PairFilter:
    """The paper's: more aesthetic, and as true to the prompt."""
    aesthetic, clip = models.scorer(AestheticScore), models.scorer(ClipScore)
    return aa.Gain(aesthetic, at_least=training.aesthetic_gain) & aa.Gain(clip, at_least=-training.clip_drop)


def plan(protocol: Protocol, models: Models, out: Path) -> aa.RunPlan:
    """What the training will take, measured on a few prompts, once: a call that goes on with a run reads it."""
    path, training = out / "plan.json", protocol.training
    if path.exists() or training is None:
        return aa.RunPlan.load(path)
    planned = aa.plan_run(
        training.prompts,
        **training_arguments(protocol, models, out),
        sample=training.sample,
        steps=training.sample_steps,
    )
    planned.save(path)
    return planned


def train(protocol: Protocol, models: Models, out: Path) -> aa.Enhancement:
    """Run the rounds, or go on with them, and write the LoRA of each."""
    training = protocol.training
    if training is None:
        raise aa.InvalidValueError("this protocol has no training.")
    result = aa.enhance(training.prompts, **training_arguments(protocol, models, out))
    for finished in result.rounds:
        finished.lora.save(out / "loras" / f"round-{finished.number}.safetensors")
    return result


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Base and candidates beside each other."""

    comparison: aa.Comparison
    drift: tuple[record.Row, ...]

    @property
    def judged(self) -> list[record.Row]:
        """The judge's win rates, ties as half, and how consistent it is."""
        biases = {bias.judge: bias for bias in self.comparison.position_bias}
        return [
            {
                "what": "judge",
                "judge": row.scorer,
                "candidate": row.candidate,
                "win_rate": row.enhanced,
                "ci_low": row.base + row.ci_low,
                "ci_high": row.base + row.ci_high,
                "ties": row.tie_rate,
                "p_value": row.p_value,
                "consistency": biases[row.scorer].consistency,
                "n": row.n,
            }
            for row in self.comparison.rows
            if row.judged
        ]

    @property
    def rows(self) -> list[record.Row]:
        """Of the record: a scorer's gain, a judge's win rate, or the drift, of one candidate each."""
        gains = [{"what": "score", **asdict(row)} for row in self.comparison.rows if not row.judged]
        return [*gains, *self.judged, *self.drift]


def evaluate(protocol: Protocol, models: Models, loras: Mapping[str, aa.LoRA], out: Path) -> Evaluation:
    """Draw every arm once, and measure scores, diversity and drift; pictures that are in ``out`` are read.

    Args:
        protocol: what is drawn.
        models: what draws and measures.
        loras: of the candidates, by name, in the order of the rounds.
        out: the folder.
    """
    base = aa.CachedSynthesizer(replace(models.base, guide=None), folder=out / "pictures")
    arms = {name: base.with_lora(lora) for name, lora in loras.items()}
    training = protocol.training
    comparison = aa.compare(
        base,
        arms,
        protocol.prompts,
        scorers=models.scorers,
        judges=[] if models.judge is None else [models.judge],
        seed=protocol.seed,
        images_per_prompt=protocol.images_per_prompt,
        diversity=models.similarity,
        guardrails=[aa.Guardrail("diversity", 0.05), aa.Guardrail(models.scorer(ClipScore).name, 0.02)],
        batch_size=protocol.batch_size,
        filtered_by=[] if training is None else [pair_filter(training, models)],
        placement=protocol.placement,
    )
    drift = tuple(_drift_rows(protocol, models, {"base": base, **arms}, comparison))
    return Evaluation(comparison=comparison, drift=drift)


def _drift_rows(
    protocol: Protocol, models: Models, arms: Mapping[str, aa.Synthesizer], comparison: aa.Comparison
) -> Iterator[record.Row]:
    """How far each candidate's pictures are from the base's of the same prompt and seed.

    Drift is 1 less the similarity of the two pictures; as a yardstick, that of two of the base's pictures of one prompt, which
    is the base's diversity.
    """
    candidates = [name for name in arms if name != "base"]
    distances: dict[str, list[float]] = {name: [0.0] * len(comparison.seeds) for name in candidates}
    with protocol.placement.opened(models.similarity) as placement:
        for batch, prompts in picture_batches(protocol, comparison.prompts, len(comparison.seeds)):
            drawn = {
                name: draw(arm, [aa.Plan(prompt) for prompt in prompts], seeds=comparison.seeds[batch])
                for name, arm in arms.items()
            }
            with placement.stage(models.similarity):
                for name in candidates:
                    likeness = compare_pairs(models.similarity, drawn["base"], drawn[name])
                    distances[name][batch] = [1 - number for number in likeness]
    clusters = prompt_clusters(comparison.prompts)
    diversity = comparison.row("diversity", candidates[0]).base
    for name in candidates:
        by_prompt = np.reshape(distances[name], (-1, len(comparison.prompts))).mean(axis=0)
        by_cluster = np.bincount(clusters, weights=by_prompt) / np.bincount(clusters)
        interval = paired_bootstrap(by_cluster, seed=protocol.seed)
        yield {
            "what": "drift",
            "candidate": name,
            "by": models.similarity.name,
            "drift": float(by_cluster.mean()),
            "ci_low": max(interval.low, 0.0),
            "ci_high": interval.high,
            "of_two_draws": float(by_cluster.mean()) / diversity if diversity else None,
            "n": len(by_cluster),
        }


def picture_batches(protocol: Protocol, prompts: Sequence[str], pictures: int) -> Iterator[tuple[slice, Sequence[str]]]:
    """The calls in which `artaug.compare` drew: what is asked together again is read, and not drawn.

    Yields:
        Places among the pictures, the first seed of every prompt first, and the prompts of a call.
    """
    count = len(prompts)
    for start in range(0, count, protocol.batch_size):
        together = prompts[start : start + protocol.batch_size]
        for first in range(start, pictures, count):
            yield slice(first, first + len(together)), together
