"""The arms of the ablation, its axes, and how one cell of it is measured."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic
from artaug.diffusion import DiffusersSynthesizer
from benchmarks import _ablation_exam as exams
from benchmarks._ablation_pairs import BestOfSeveral, Cost, Distracted, Found, Interaction


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to learn."""

    objective: aa.Objective
    learning_rate: float
    passes: int
    """Denoiser calls of a step for each picture of its batch; a backward pass counts as two."""
    several: bool = False
    """Whether it learns from the best of several draws, not from the loop's pairs."""


def preferring(beta: float) -> aa.DirectPreference:
    """DPO with an anchor that lets it go about as far as the pairs do at a beta of 20, and further at a smaller one."""
    return aa.DirectPreference(beta=beta, anchor=0.01)


OURS = "PairedDifference"
LONG = "one long round"
"""As many pairs and steps as several rounds have, all in the first."""
ARMS: Mapping[str, Arm] = {
    OURS: Arm(objective=aa.PairedDifference(), learning_rate=4e-3, passes=4),
    "TwoStage": Arm(objective=aa.TwoStage(per_pair=False), learning_rate=2e-3, passes=3),
    "fine-tuning": Arm(objective=aa.SupervisedFineTuning(), learning_rate=4e-3, passes=3),
    "best of k": Arm(objective=aa.SupervisedFineTuning(), learning_rate=1e-3, passes=3, several=True),
    "DPO": Arm(objective=preferring(5.0), learning_rate=1e-3, passes=8),
    "DPO, best of k": Arm(objective=preferring(5.0), learning_rate=1e-3, passes=8, several=True),
}
"""Learning rates, and DPO's beta, are those that gained most in ``--tune`` without costing more than 0.01 of alignment."""

CONTROLS = {
    "nothing": exams.plainly,
    "words added": exams.with_all_words,
    "critic's words added": exams.with_asked_words,
    "regional redraw": exams.with_regions,
}
"""What needs no training."""

TUNED_WITH = 1000
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
BETAS = (5.0, 20.0, 80.0)
SCALES = (2.0, 3.0)
"""How far a LoRA is taken beyond what it was trained at."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How large the ablation is; one budget for all arms."""

    pairs: tuple[int, ...] = (8, 32, 128, 512)
    usual: int = 32
    """Pairs, where another axis is looked at."""
    few: int = 8
    """Pairs, where the yield is looked at."""
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
    """Held-out prompts of the exam."""
    again: int = 32
    """How many of them are drawn twice, and how many pictures that need nothing."""


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
    """Of the candidates, the best so many are learned from; None: those that the usual filter keeps."""
    noise: float = 0.0
    scale: float = 1.0
    """Of the LoRA, when it is drawn with."""
    learning_rate: float | None = None
    """Unless it is the arm's own."""
    beta: float | None = None


def cells(settings: Settings, seed: int) -> Iterator[Cell]:
    """Everything there is to measure with one seed."""
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
    """The learning rates to choose from, the same for all, and DPO's beta besides; one DPO stands for both."""
    for name, arm in ARMS.items():
        if arm.several and isinstance(arm.objective, aa.DirectPreference):
            continue
        for rate in LEARNING_RATES:
            for beta in BETAS if isinstance(arm.objective, aa.DirectPreference) else (None,):
                yield Cell(
                    axis="tuning", arm=name, seed=TUNED_WITH, pairs=settings.usual, learning_rate=rate, beta=beta
                )


@dataclass(frozen=True)
class Learned:
    """What to draw with, what it was learned from last, and what it took in all."""

    synthesizer: DiffusersSynthesizer
    found: Found
    cost: Cost
    learning: Cost
    """Of the cost, what learning took."""


class Bench:
    """Measures the cells of one seed; what several of them need is made once."""

    def __init__(self, settings: Settings, *, seed: int) -> None:
        """Load the model; nothing is drawn yet."""
        self.settings = settings
        self.seed = seed
        self.base = playground.synthesizer(guide=aa.OutputMix(), steps=settings.sampling_steps)
        self.interactions: dict[float, Interaction] = {}
        self.rounds: dict[str, list[Learned]] = {}

    def row(self, cell: Cell) -> dict[str, Any]:
        """SimilarityMetric a cell."""
        if cell.axis == "control":
            told = self.exam.results(CONTROLS[cell.arm](self.base))
            return asdict(cell) | told | asdict(Cost()) | {"drawing_passes": self._passes_to_draw(cell.arm)}
        going_round = cell.axis == "rounds" and cell.arm != LONG
        learned = self._round(cell.arm, cell.rounds) if going_round else self._learned(cell)
        kept, prompts = len(learned.found.pairs), learned.found.prompts
        told = self.exam.results(exams.plainly(learned.synthesizer)) | asdict(learned.cost)
        learning = {"learning_passes": learned.learning.passes, "learning_seconds": learned.learning.seconds}
        drawing = {"drawing_passes": self.settings.sampling_steps}
        return asdict(cell) | {"kept": kept, "yield": kept / prompts} | told | learning | drawing

    @cached_property
    def exam(self) -> exams.Exam:
        """What all cells are judged by; learning rates are chosen on other prompts than those of the results."""
        tuning = self.seed == TUNED_WITH
        prompts = playground.prompts(self.settings.prompts, seed=TUNED_WITH + 1 if tuning else 1, validation=not tuning)
        return exams.Exam(self.base, prompts, self.settings.again)

    @cached_property
    def several(self) -> BestOfSeveral:
        """The best of several draws."""
        return BestOfSeveral(
            synthesizer=self.base,
            draws=self.settings.draws,
            sampling_steps=self.settings.sampling_steps,
            seed=self.seed,
        )

    def interaction(self, noise: float) -> Interaction:
        """The loop with the base model, and a critic whose boxes are wrong so often."""
        if noise not in self.interactions:
            critic = Distracted(critic=PhotometricCritic(), wrong=noise, seed=self.seed)
            self.interactions[noise] = self._looping(self.base, critic, seed=self.seed)
        return self.interactions[noise]

    def _looping(self, synthesizer: DiffusersSynthesizer, critic: aa.Critic, *, seed: int) -> Interaction:
        return Interaction(
            synthesizer=synthesizer, critic=critic, sampling_steps=self.settings.sampling_steps, seed=seed
        )

    def _passes_to_draw(self, control: str) -> float:
        """Denoiser calls for a picture once there is nothing to learn any more; the redraw's as for the loop's pairs."""
        if control == "regional redraw":
            found = self.interaction(0.0).kept(self.settings.usual)
            return found.cost.passes / found.prompts
        return self.settings.sampling_steps * (2 if control == "critic's words added" else 1)

    def _learned(self, cell: Cell) -> Learned:
        arm = ARMS[OURS if cell.arm == LONG else cell.arm]
        if cell.learning_rate is not None:
            arm = replace(arm, learning_rate=cell.learning_rate)
        if cell.beta is not None:
            arm = replace(arm, objective=preferring(cell.beta))
        if arm.several:
            found = self.several.kept(cell.pairs)
        elif cell.share is None:
            found = self.interaction(cell.noise).kept(cell.pairs)
        else:
            found = self.interaction(cell.noise).best(cell.pairs, of=cell.share)
        return self._trained(arm, found, self.base, times=cell.rounds, scale=cell.scale)

    def _round(self, arm: str, number: int) -> Learned:
        """So many rounds, each with new prompts, drawn with what the rounds before it have learned."""
        done = self.rounds.setdefault(arm, [])
        while len(done) < number:
            drawing = done[-1].synthesizer if done else self.base
            loop = self._looping(drawing, PhotometricCritic(), seed=self.seed + 10_000 * len(done))
            found = loop.kept(self.settings.usual, at_most=8 * self.settings.usual)
            learned = self._trained(ARMS[arm], found, drawing)
            if done:
                spent, learning = done[-1].cost + learned.cost, done[-1].learning + learned.learning
                learned = replace(learned, cost=spent, learning=learning)
            done.append(learned)
        return done[number - 1]

    def _trained(
        self, arm: Arm, found: Found, on: DiffusersSynthesizer, *, times: int = 1, scale: float = 1.0
    ) -> Learned:
        steps = self.settings.steps * times
        trainer = aa.DifferentialLoRATrainer(
            objective=arm.objective,
            rank=self.settings.rank,
            steps=steps,
            batch_size=self.settings.batch_size,
            learning_rate=arm.learning_rate,
        )
        training = trainer.train(found.pairs, on, seed=self.seed, progress=False)
        spent = Cost(passes=steps * self.settings.batch_size * arm.passes, seconds=training.seconds)
        return Learned(on.with_lora(training.lora, scale=scale), found, found.cost + spent, spent)
