"""How one cell of `benchmarks.online` is measured."""

from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import artaug as aa
from artaug import playground
from artaug.diffusion import DiffusersSynthesizer
from artaug.scorers import Photometric
from benchmarks import _ablation_evaluation as evaluations
from benchmarks import _ablation_pairs as pair_sources
from benchmarks import _record as record
from benchmarks._ablation_bench import TrainedArm, columns_of_curve, with_loras
from benchmarks._ablation_pairs import Cost, Interaction, PairSet
from benchmarks._online_arms import ARMS, Advice, Selection, made_by
from benchmarks._online_cells import BASE, Cell, Settings
from benchmarks._online_draws import Draws, as_learned, drawn_as
from benchmarks.objectives import passes_counted


class OnlineBench:
    """Measures the cells of one seed; the model, the pictures and earlier rounds are shared among them."""

    def __init__(self, settings: Settings, *, seed: int, loras: Path) -> None:
        """Load the model; nothing is drawn yet. Every trained LoRA is written into the folder ``loras``."""
        self.settings = settings
        self.seed = seed
        self.folder = loras
        self.base = playground.synthesizer(guide=aa.RegionalAttention(), steps=settings.sampling_steps)
        self.trained: dict[Cell, TrainedArm] = {}
        self.pair_sets: dict[tuple[object, ...], PairSet] = {}
        self.drawn: dict[tuple[float, int], Draws] = {}

    def row(self, cell: Cell, _: record.Row | None = None) -> record.Row:
        """Measure a cell: its columns, and per strength one number a prompt of every measure (``curve``)."""
        if cell.arm == BASE:
            return asdict(cell) | {"made_by": BASE} | self._of_base(cell)
        trained = self._train(cell)
        measures = {0.0: self.evaluation.before} | {
            strength: self.evaluation.measure(
                evaluations.plain(with_loras(self.base, trained.loras.values(), strength=strength))
            )
            for strength in self.settings.strengths
        }
        return (
            asdict(cell)
            | {"made_by": made_by(cell.arm), "loras": [*trained.loras], "pairs": len(trained.pair_set.pairs)}
            | asdict(trained.cost)
            | {"learning_passes": trained.learning.passes}
            | columns_of_curve(measures)
        )

    @cached_property
    def evaluation(self) -> evaluations.HeldOutEvaluation:
        """The evaluation of all cells: plain prompts, as the ablation's."""
        prompts = playground.prompts(self.settings.prompts, seed=self.seed + 1, held_out=True)
        return evaluations.HeldOutEvaluation(self.base, prompts, seed=self.seed + 1)

    def _of_base(self, cell: Cell) -> dict[str, Any]:
        """How much draws of one prompt differ, and how far above the plain model they are on average."""
        draws, plain = (self._draws(self.base, spread, cell.draws, rounds=1) for spread in (cell.spread, 0.0))
        selected_by = draws.scores(pair_sources.SELECTED_BY)
        photometric = Photometric()
        return {
            "deviation": float(selected_by.std(axis=1, ddof=1).mean()),
            "best": float((selected_by.max(axis=1) - selected_by.mean(axis=1)).mean()),
            "level": float(draws.scores(photometric).mean() - plain.scores(photometric).mean()),
            "right": float(draws.right.mean()),
        }

    def _train(self, cell: Cell) -> TrainedArm:
        """Train the rounds up to that of the cell, each on pictures drawn with what the earlier ones have learned."""
        if cell not in self.trained:
            earlier = self._train(replace(cell, rounds=cell.rounds - 1)) if cell.rounds > 1 else None
            drawing = with_loras(self.base, earlier.loras.values(), strength=1.0) if earlier else self.base
            learned = self._learn(cell, self._pairs(cell, drawing), drawing)
            if earlier:
                learned = replace(
                    learned,
                    loras={**earlier.loras, **learned.loras},
                    cost=earlier.cost + learned.cost,
                    learning=earlier.learning + learned.learning,
                )
            self.trained[cell] = learned
        return self.trained[cell]

    def _learn(self, cell: Cell, pair_set: PairSet, on: DiffusersSynthesizer) -> TrainedArm:
        if not pair_set.pairs:
            return TrainedArm(loras={}, pair_set=pair_set, cost=pair_set.cost, learning=Cost())
        arm, batch_size = ARMS[cell.arm], self.settings.batch_size
        steps = arm.steps(self.settings.passes, batch_size=batch_size)
        trainer = arm.learning.trainer(rank=self.settings.rank, steps=steps, batch_size=batch_size)
        with passes_counted(on) as passes:
            training = trainer.train(pair_set.pairs, on, seed=self.seed, progress=False)
        file = training.lora.save(self.folder / f"{cell.name}.safetensors", metadata={"cell": repr(cell)})
        spent = Cost(passes=passes.denoiser_calls, seconds=training.seconds)
        return TrainedArm(
            loras={file.name: training.lora}, pair_set=pair_set, cost=pair_set.cost + spent, learning=spent
        )

    def _pairs(self, cell: Cell, drawing: DiffusersSynthesizer) -> PairSet:
        source = ARMS[cell.arm].source
        if isinstance(source, Advice):
            key = (source, cell.spread) if cell.rounds == 1 else (source, cell)
            if key not in self.pair_sets:
                self.pair_sets[key] = self._advised(source, cell, drawing)
            return self.pair_sets[key]
        return self._selected(source, cell, drawing)

    def _advised(self, source: Advice, cell: Cell, drawing: DiffusersSynthesizer) -> PairSet:
        seed = self._seed_of_round(cell.rounds)
        prompts = [
            drawn_as(prompt, spread=cell.spread, key=f"{seed} 0")
            for prompt in playground.prompts(
                self.settings.pictures + 1, seed=seed
            )  # one to find out that they are enough
        ]
        loop = Interaction(
            synthesizer=drawing,
            critic=source.critic,
            sampling_steps=self.settings.sampling_steps,
            seed=seed,
            prompts=prompts,
        )
        kept = loop.within(self.settings.pictures)
        return replace(kept, pairs=[as_learned(pair) for pair in kept.pairs])

    def _selected(self, source: Selection, cell: Cell, drawing: DiffusersSynthesizer) -> PairSet:
        start = perf_counter()
        draws = self._draws(drawing, cell.spread, cell.draws, rounds=cell.rounds)
        pairs = source(draws)
        cost = Cost(
            images=draws.pictures,
            passes=draws.pictures * self.settings.sampling_steps,
            seconds=perf_counter() - start,
        )
        return PairSet(pairs=pairs, prompts=len(draws.prompts), cost=cost)

    def _draws(self, drawing: DiffusersSynthesizer, spread: float, of_each: int, *, rounds: int) -> Draws:
        """The pictures of a round; those of the first are the same for all arms."""

        def draw() -> Draws:
            seed, pictures = self._seed_of_round(rounds), self.settings.pictures
            return Draws.drawn(drawing, pictures=pictures, of_each=of_each, spread=spread, seed=seed)

        if rounds > 1:
            return draw()
        if (spread, of_each) not in self.drawn:
            self.drawn[spread, of_each] = draw()
        return self.drawn[spread, of_each]

    def _seed_of_round(self, rounds: int) -> int:
        return self.seed + 10_000 * (rounds - 1)
