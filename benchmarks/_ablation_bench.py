"""The arms of the ablation, its axes, and how one cell of it is measured."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic
from artaug.diffusion import DiffusersSynthesizer
from benchmarks import _ablation_evaluation as evaluations
from benchmarks._ablation_pairs import BestOfK, Cost, Interaction, NoisyCritic, PairSet


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A training method of the ablation."""

    objective: aa.Objective
    learning_rate: float
    passes: int
    """Denoiser calls of a step for each picture of its batch; a backward pass counts as two."""
    best_of_k: bool = False
    """Whether it learns from the best of several draws instead of the loop's pairs."""


def direct_preference(beta: float) -> aa.DirectPreference:
    """DPO with an anchor at which beta 20 moves the model about as far as the pairs, and a smaller beta further."""
    return aa.DirectPreference(beta=beta, anchor=0.01)


OURS = "PairedDifference"
LONG = "one long round"
"""As many pairs and steps as several rounds have, all in one."""
ARMS: Mapping[str, Arm] = {
    OURS: Arm(objective=aa.PairedDifference(), learning_rate=4e-3, passes=4),
    "TwoStage": Arm(objective=aa.TwoStage(per_pair=False), learning_rate=2e-3, passes=3),
    "fine-tuning": Arm(objective=aa.SupervisedFineTuning(), learning_rate=4e-3, passes=3),
    "best of k": Arm(objective=aa.SupervisedFineTuning(), learning_rate=1e-3, passes=3, best_of_k=True),
    "DPO": Arm(objective=direct_preference(5.0), learning_rate=1e-3, passes=8),
    "DPO, best of k": Arm(objective=direct_preference(5.0), learning_rate=1e-3, passes=8, best_of_k=True),
}
"""Learning rates, and DPO's beta, are those that gained most in ``--tune`` without costing more than 0.01 of alignment."""

CONTROLS = {
    "nothing": evaluations.plain,
    "words added": evaluations.with_all_words,
    "critic's words added": evaluations.with_critic_words,
    "regional redraw": evaluations.with_regions,
}
"""Ways to draw that need no training."""

TUNED_WITH = 1000
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
BETAS = (5.0, 20.0, 80.0)
SCALES = (2.0, 3.0)
"""Scales of a LoRA above the one it was trained at."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of the ablation; one budget for all arms."""

    pairs: tuple[int, ...] = (8, 32, 128, 512)
    usual: int = 32
    """Pairs on the other axes."""
    few: int = 8
    """Pairs on the axis of the yield."""
    rounds: int = 4
    yields: tuple[float, ...] = (0.01, 0.05, 0.25, 1.0)
    noises: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5)
    draws: int = 4
    """The k of best of k."""
    steps: int = 64
    batch_size: int = 8
    rank: int = 8
    sampling_steps: int = 6
    prompts: int = 64
    """Held-out prompts of the evaluation."""
    again: int = 32
    """How many of them are drawn twice, and how many prompts that need no change are drawn."""


QUICK = Settings(
    pairs=(4,),
    usual=4,
    few=2,
    rounds=2,
    yields=(0.5, 1.0),
    noises=(0.0, 0.5),
    draws=2,
    steps=2,
    batch_size=2,
    sampling_steps=2,
    prompts=4,
    again=2,
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row to measure."""

    axis: str
    arm: str
    seed: int
    pairs: int = 0
    rounds: int = 1
    share: float | None = None
    """The share of the candidates that is learned from, the best ones; None: those that the usual filter keeps."""
    noise: float = 0.0
    scale: float = 1.0
    """Of the LoRA, for the pictures of the evaluation."""
    learning_rate: float | None = None
    """None: that of the arm."""
    beta: float | None = None


def cells(settings: Settings, seed: int) -> Iterator[Cell]:
    """All cells of one seed."""
    yield from (Cell(axis="control", arm=name, seed=seed) for name in CONTROLS)
    for noise in settings.noises:
        for share in (None, 1.0):
            yield Cell(axis="noise", arm=OURS, seed=seed, pairs=settings.usual, noise=noise, share=share)
    yield from _round_cells(settings, seed)
    for share in sorted(settings.yields, reverse=True):
        for name in (OURS, "fine-tuning"):
            yield Cell(axis="yield", arm=name, seed=seed, pairs=settings.few, share=share)
    for name in (OURS, "fine-tuning"):
        for scale in SCALES:
            yield Cell(axis="scale", arm=name, seed=seed, pairs=settings.usual, scale=scale)
    for name in ARMS:
        yield from (Cell(axis="pairs", arm=name, seed=seed, pairs=count) for count in settings.pairs)


def _round_cells(settings: Settings, seed: int) -> Iterator[Cell]:
    for number in range(1, settings.rounds + 1):
        for name in (OURS, "fine-tuning"):
            yield Cell(axis="rounds", arm=name, seed=seed, pairs=settings.usual, rounds=number)
        if number in {2, settings.rounds}:
            yield Cell(axis="rounds", arm=LONG, seed=seed, pairs=settings.usual * number, rounds=number)


def trials(settings: Settings) -> Iterator[Cell]:
    """The learning rates to choose from, the same for all, and DPO's betas; the loop's DPO is tuned for both DPO arms."""
    for name, arm in ARMS.items():
        if arm.best_of_k and isinstance(arm.objective, aa.DirectPreference):
            continue
        for rate in LEARNING_RATES:
            for beta in BETAS if isinstance(arm.objective, aa.DirectPreference) else (None,):
                yield Cell(
                    axis="tuning", arm=name, seed=TUNED_WITH, pairs=settings.usual, learning_rate=rate, beta=beta
                )


@dataclass(frozen=True)
class TrainedArm:
    """A synthesizer with the trained LoRA, the pairs of its last training, and the total cost."""

    synthesizer: DiffusersSynthesizer
    pair_set: PairSet
    cost: Cost
    learning: Cost
    """The cost of training alone."""


class Bench:
    """Measures the cells of one seed; models, pairs and rounds are shared among them."""

    def __init__(self, settings: Settings, *, seed: int) -> None:
        """Load the model; nothing is drawn yet."""
        self.settings = settings
        self.seed = seed
        self.base = playground.synthesizer(guide=aa.OutputMix(), steps=settings.sampling_steps)
        self.interactions: dict[float, Interaction] = {}
        self.rounds: dict[str, list[TrainedArm]] = {}

    def row(self, cell: Cell) -> dict[str, Any]:
        """Measure a cell."""
        if cell.axis == "control":
            columns = self.evaluation.results(CONTROLS[cell.arm](self.base))
            return asdict(cell) | columns | asdict(Cost()) | {"drawing_passes": self._passes_to_draw(cell.arm)}
        going_round = cell.axis == "rounds" and cell.arm != LONG
        learned = self._round(cell.arm, cell.rounds) if going_round else self._train_cell(cell)
        kept, prompts = len(learned.pair_set.pairs), learned.pair_set.prompts
        columns = self.evaluation.results(evaluations.plain(learned.synthesizer)) | asdict(learned.cost)
        learning = {"learning_passes": learned.learning.passes, "learning_seconds": learned.learning.seconds}
        drawing = {"drawing_passes": self.settings.sampling_steps}
        return asdict(cell) | {"kept": kept, "yield": kept / prompts} | columns | learning | drawing

    @cached_property
    def evaluation(self) -> evaluations.HeldOutEvaluation:
        """The evaluation of all cells; learning rates are chosen on other prompts than those of the results."""
        tuning = self.seed == TUNED_WITH
        prompts = playground.prompts(self.settings.prompts, seed=TUNED_WITH + 1 if tuning else 1, held_out=not tuning)
        return evaluations.HeldOutEvaluation(self.base, prompts, self.settings.again)

    @cached_property
    def best_of_k(self) -> BestOfK:
        """The best of several draws."""
        return BestOfK(
            synthesizer=self.base,
            draws=self.settings.draws,
            sampling_steps=self.settings.sampling_steps,
            seed=self.seed,
        )

    def interaction(self, noise: float) -> Interaction:
        """The loop with the base model and a critic whose boxes are wrong with this chance."""
        if noise not in self.interactions:
            critic = NoisyCritic(critic=PhotometricCritic(), wrong=noise, seed=self.seed)
            self.interactions[noise] = self._new_interaction(self.base, critic, seed=self.seed)
        return self.interactions[noise]

    def _new_interaction(self, synthesizer: DiffusersSynthesizer, critic: aa.Critic, *, seed: int) -> Interaction:
        return Interaction(
            synthesizer=synthesizer, critic=critic, sampling_steps=self.settings.sampling_steps, seed=seed
        )

    def _passes_to_draw(self, control: str) -> float:
        """Denoiser calls per picture after training; those of the redraw are the mean over the loop's pairs."""
        if control == "regional redraw":
            pair_set = self.interaction(0.0).kept(self.settings.usual)
            return pair_set.cost.passes / pair_set.prompts
        return self.settings.sampling_steps * (2 if control == "critic's words added" else 1)

    def _train_cell(self, cell: Cell) -> TrainedArm:
        arm = ARMS[OURS if cell.arm == LONG else cell.arm]
        if cell.learning_rate is not None:
            arm = replace(arm, learning_rate=cell.learning_rate)
        if cell.beta is not None:
            arm = replace(arm, objective=direct_preference(cell.beta))
        if arm.best_of_k:
            pair_set = self.best_of_k.kept(cell.pairs)
        elif cell.share is None:
            pair_set = self.interaction(cell.noise).kept(cell.pairs)
        else:
            pair_set = self.interaction(cell.noise).best(cell.pairs, of=cell.share)
        return self._train(arm, pair_set, self.base, times=cell.rounds, scale=cell.scale)

    def _round(self, arm: str, number: int) -> TrainedArm:
        """Train ``number`` rounds, each with new prompts, drawn with what the earlier rounds have learned."""
        done = self.rounds.setdefault(arm, [])
        while len(done) < number:
            drawing = done[-1].synthesizer if done else self.base
            loop = self._new_interaction(drawing, PhotometricCritic(), seed=self.seed + 10_000 * len(done))
            pair_set = loop.kept(self.settings.usual, at_most=8 * self.settings.usual)
            learned = self._train(ARMS[arm], pair_set, drawing)
            if done:
                spent, learning = done[-1].cost + learned.cost, done[-1].learning + learned.learning
                learned = replace(learned, cost=spent, learning=learning)
            done.append(learned)
        return done[number - 1]

    def _train(
        self, arm: Arm, pair_set: PairSet, on: DiffusersSynthesizer, *, times: int = 1, scale: float = 1.0
    ) -> TrainedArm:
        steps = self.settings.steps * times
        trainer = aa.DifferentialLoRATrainer(
            objective=arm.objective,
            echo=1,  # as `Arm.passes` counts
            rank=self.settings.rank,
            steps=steps,
            batch_size=self.settings.batch_size,
            learning_rate=arm.learning_rate,
        )
        training = trainer.train(pair_set.pairs, on, seed=self.seed, progress=False)
        spent = Cost(passes=steps * self.settings.batch_size * arm.passes, seconds=training.seconds)
        return TrainedArm(on.with_lora(training.lora, scale=scale), pair_set, pair_set.cost + spent, spent)
