"""How one cell of the ablation is measured."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic
from artaug.diffusion import DiffusersSynthesizer
from benchmarks import _ablation_evaluation as evaluations
from benchmarks._ablation_arms import ARMS, Arm, described, passes_a_step
from benchmarks._ablation_cells import TUNED_WITH, Cell, Settings
from benchmarks._ablation_pairs import Cost, Interaction, NoisyCritic, PairSet
from benchmarks.objectives import passes_counted

GUIDES: Mapping[str, aa.Guide] = {"RegionalAttention": aa.RegionalAttention(), "OutputMix": aa.OutputMix()}
CONTROLS: Mapping[str, Callable[[DiffusersSynthesizer], evaluations.Draw]] = {
    "nothing": evaluations.plain,
    "words added": evaluations.with_all_words,
    "critic's words added": evaluations.with_critic_words,
    "regional redraw": evaluations.with_regions,
}
SWEPT = ("front", "rounds", "tuning")
"""Axes whose LoRAs are drawn with at every strength."""


@dataclass(frozen=True, kw_only=True)
class TrainedArm:
    """The LoRAs of one or several rounds, the pairs of the last, and the total cost."""

    loras: Mapping[str, aa.LoRA]
    """By the names of their files, in the order of the rounds; a round without pairs has none."""
    pair_set: PairSet
    cost: Cost
    learning: Cost
    """The cost of training alone."""


def with_loras(base: DiffusersSynthesizer, loras: Iterable[aa.LoRA], *, strength: float) -> DiffusersSynthesizer:
    """The base with all LoRAs at one strength."""
    for lora in loras:
        base = base.with_lora(lora, scale=strength)
    return base


def strengths_of(cell: Cell, settings: Settings) -> tuple[float, ...]:
    """The strengths of a cell's row; 0 is the base model."""
    if cell.axis == "control":
        return (1.0,)
    return (0.0, *settings.strengths) if cell.axis in SWEPT else (0.0, 1.0)


def arm_of(cell: Cell) -> Arm:
    """The arm of a cell that trains, at the learning rate of the cell if it has one."""
    arm = ARMS[cell.arm]
    return arm if cell.learning_rate is None else replace(arm, learning_rate=cell.learning_rate)


def made_by(cell: Cell) -> str:
    """What a cell is measured with: a row of an arm that has changed since is measured again."""
    return cell.arm if cell.axis == "control" else described(arm_of(cell))


class Bench:
    """Measures the cells of one seed; models, pairs and rounds are shared among them."""

    def __init__(self, settings: Settings, *, seed: int, loras: Path) -> None:
        """Load the models; nothing is drawn yet. Every trained LoRA is written into the folder ``loras``."""
        self.settings = settings
        self.seed = seed
        self.folder = loras
        self.bases = {
            kind: playground.synthesizer(guide=guide, steps=settings.sampling_steps) for kind, guide in GUIDES.items()
        }
        self.interactions: dict[tuple[str, float], Interaction] = {}
        self.rounds: dict[tuple[str, str], list[TrainedArm]] = {}

    def completed_row(self, cell: Cell, row: Mapping[str, Any] | None) -> dict[str, Any]:
        """The row of a cell, of which there is a part or nothing."""
        return self.row(cell) if row is None else self.extended(row, cell)

    def row(self, cell: Cell) -> dict[str, Any]:
        """Measure a cell: its columns, and per strength one number a prompt of every measure (``curve``)."""
        base = self.bases[cell.kind]
        row = asdict(cell) | {"made_by": made_by(cell)}
        if cell.axis == "control":
            measures = self.evaluation.measure(CONTROLS[cell.arm](base))
            drawing = {"drawing_passes": self._passes_to_draw(cell)}
            return row | asdict(Cost()) | drawing | columns_of_curve({1.0: measures})
        trained = self._round(cell) if cell.axis == "rounds" else self._train_cell(cell)
        curve = self._curve(cell, trained.loras.values(), strengths_of(cell, self.settings))
        kept, prompts = len(trained.pair_set.pairs), trained.pair_set.prompts
        learning = {"learning_passes": trained.learning.passes, "learning_seconds": trained.learning.seconds}
        return (
            row
            | {
                "loras": [*trained.loras],
                "kept": kept,
                "yield": kept / prompts,
                "drawing_passes": self.settings.sampling_steps,
            }
            | asdict(trained.cost)
            | learning
            | curve
        )

    def extended(self, row: Mapping[str, Any], cell: Cell) -> dict[str, Any]:
        """The row of a cell with the strengths that it lacks, drawn with the LoRAs that were kept."""
        missing = [strength for strength in strengths_of(cell, self.settings) if strength not in row["strengths"]]
        loras = [aa.LoRA.load(self.folder / name) for name in row["loras"]]
        new = self._curve(cell, loras, missing)
        strengths, numbers = zip(
            *sorted((s, n) for n, s in enumerate([*row["strengths"], *new["strengths"]])), strict=True
        )
        both = {name: [*row["curve"][name], *new["curve"][name]] for name in row["curve"]}
        curve = {name: [values[number] for number in numbers] for name, values in both.items()}
        return {**row, "strengths": list(strengths), "curve": curve}

    def _curve(self, cell: Cell, loras: Iterable[aa.LoRA], strengths: Iterable[float]) -> dict[str, Any]:
        base, loras = self.bases[cell.kind], list(loras)
        return columns_of_curve(
            {
                strength: self.evaluation.measure(evaluations.plain(with_loras(base, loras, strength=strength)))
                if strength
                else self.evaluation.before
                for strength in strengths
            }
        )

    def estimate_seconds(self, cells: Iterable[Cell]) -> float:
        """About how long these cells take: their denoiser calls, at the pace of the base model's pictures."""
        start = perf_counter()
        evaluations.plain(self.bases["OutputMix"])(self.evaluation.prompts, range(len(self.evaluation.prompts)))
        pace = (perf_counter() - start) / (len(self.evaluation.prompts) * self.settings.sampling_steps)
        return sum(self._denoiser_calls(cell) for cell in cells) * pace

    def _denoiser_calls(self, cell: Cell) -> float:
        """Of a cell, roughly; a round draws its pairs too, from twice as many prompts."""
        strengths = len(self.settings.strengths) if cell.axis in SWEPT else 1
        drawn = strengths * self.evaluation.pictures + (6 * cell.pairs if cell.axis == "rounds" else 0)
        learned = 0 if cell.axis == "control" else cell.steps * self.settings.batch_size * passes_a_step(arm_of(cell))
        return learned + drawn * self.settings.sampling_steps

    @cached_property
    def evaluation(self) -> evaluations.HeldOutEvaluation:
        """The evaluation of all cells: prompts of this seed, and learning rates on other prompts than those of the results."""
        tuning = self.seed == TUNED_WITH
        prompts = playground.prompts(self.settings.prompts, seed=self.seed + 1, held_out=not tuning)
        return evaluations.HeldOutEvaluation(self.bases["OutputMix"], prompts, seed=self.seed + 1)

    def interaction(self, kind: str, noise: float = 0.0) -> Interaction:
        """The loop with the base model and a critic whose boxes are wrong with this chance."""
        if (kind, noise) not in self.interactions:
            critic = NoisyCritic(critic=PhotometricCritic(contrast=0.15), wrong=noise, seed=self.seed)
            self.interactions[kind, noise] = self._new_interaction(self.bases[kind], critic, seed=self.seed)
        return self.interactions[kind, noise]

    def _new_interaction(self, synthesizer: DiffusersSynthesizer, critic: aa.Critic, *, seed: int) -> Interaction:
        return Interaction(
            synthesizer=synthesizer, critic=critic, sampling_steps=self.settings.sampling_steps, seed=seed
        )

    def _passes_to_draw(self, control: Cell) -> float:
        """Denoiser calls per picture after training; those of the redraw are the mean over the loop's pairs."""
        if control.arm == "regional redraw":
            pair_set = self.interaction(control.kind).kept(self.settings.usual)
            return pair_set.cost.passes / pair_set.prompts
        return self.settings.sampling_steps * (2 if control.arm == "critic's words added" else 1)

    def _train_cell(self, cell: Cell) -> TrainedArm:
        interaction = self.interaction(cell.kind, cell.noise)
        pair_set = interaction.kept(cell.pairs) if cell.share is None else interaction.best(cell.pairs, of=cell.share)
        return self._train(cell, pair_set, self.bases[cell.kind])

    def _round(self, cell: Cell) -> TrainedArm:
        """Train the rounds up to that of the cell, each with new prompts, drawn with what the earlier ones have learned."""
        done = self.rounds.setdefault((cell.kind, cell.arm), [])
        base = self.bases[cell.kind]
        while len(done) < cell.rounds:
            drawing = with_loras(base, done[-1].loras.values(), strength=1.0) if done else base
            loop = self._new_interaction(drawing, PhotometricCritic(contrast=0.15), seed=self.seed + 10_000 * len(done))
            pair_set = loop.kept(cell.pairs, at_most=8 * cell.pairs)
            learned = self._train(replace(cell, rounds=len(done) + 1), pair_set, drawing)
            if done:
                spent, learning = done[-1].cost + learned.cost, done[-1].learning + learned.learning
                learned = replace(learned, loras={**done[-1].loras, **learned.loras}, cost=spent, learning=learning)
            done.append(learned)
        return done[cell.rounds - 1]

    def _train(self, cell: Cell, pair_set: PairSet, on: DiffusersSynthesizer) -> TrainedArm:
        if not pair_set.pairs:
            return TrainedArm(loras={}, pair_set=pair_set, cost=pair_set.cost, learning=Cost())
        trainer = arm_of(cell).trainer(rank=self.settings.rank, steps=cell.steps, batch_size=self.settings.batch_size)
        with passes_counted(on) as passes:
            training = trainer.train(pair_set.pairs, on, seed=self.seed, progress=False)
        file = training.lora.save(self.folder / f"{cell.name}.safetensors", metadata={"cell": repr(cell)})
        spent = Cost(passes=passes.denoiser_calls, seconds=training.seconds)
        return TrainedArm(
            loras={file.name: training.lora}, pair_set=pair_set, cost=pair_set.cost + spent, learning=spent
        )


def columns_of_curve(measures_by_strength: Mapping[float, evaluations.Measures]) -> dict[str, Any]:
    """The strengths, and of every measure a list per strength, rounded for the journal: (strengths, prompts)."""
    strengths: Sequence[float] = sorted(measures_by_strength)
    names = measures_by_strength[strengths[0]]
    curve = {name: [measures_by_strength[s][name].round(8).tolist() for s in strengths] for name in names}
    return {"strengths": list(strengths), "curve": curve}
