"""Whether batches used several times (``echo``) cost quality: the same pairs, at equal steps and at equal passes."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from matplotlib.figure import Figure

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic
from artaug.evaluation.statistics import paired_bootstrap
from benchmarks import _record as record
from benchmarks._ablation_evaluation import HeldOutEvaluation, plain
from benchmarks._ablation_pairs import Interaction

ECHOES = (1, 2, 3, 4)
SETTINGS = ((32, 64), (32, 16), (128, 64))
"""Pairs, and steps of the training that uses every batch once: many draws of noise per pair, few steps, many pairs."""
BATCH_SIZE = 8
SAMPLING_STEPS = 6
JUDGED = ("gain", "drift", "alignment", "diversity")
SAME = ("pairs", "steps_once", "equal")
"""What is the same for a line of the plot."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A training with `PairedDifference`."""

    pairs: int
    steps_once: int
    """Steps of the training that it is compared with, which uses every batch once."""
    equal: str
    """What it has in common with that training: its ``steps`` or its ``passes``."""
    echo: int

    @property
    def steps(self) -> int:
        """Of the optimizer."""
        return self.steps_once if self.equal == "steps" else round(self.steps_once * 4 / passes_of_step(self.echo))

    def columns(self) -> record.Row:
        """What it costs, and how many times a pair gets noise of its own."""
        draws = BATCH_SIZE * -(-self.steps // self.echo)
        passes = BATCH_SIZE * self.steps * passes_of_step(self.echo)
        return asdict(self) | {"steps": self.steps, "draws_per_pair": draws / self.pairs, "passes": round(passes)}


def passes_of_step(echo: int) -> float:
    """Pictures through the denoiser: the student's forward and back, which counts as two, and the teacher's for ``echo`` steps."""
    return 3 + 1 / echo


def arms(*, quick: bool) -> Iterator[Arm]:
    """All trainings of one seed."""
    for pairs, steps in ((4, 4),) if quick else SETTINGS:
        for echo in ECHOES:
            yield Arm(pairs=pairs, steps_once=steps, equal="steps", echo=echo)
            if echo > 1 and (quick or (pairs, steps) == SETTINGS[0]):
                yield Arm(pairs=pairs, steps_once=steps, equal="passes", echo=echo)


def measure(*, quick: bool) -> Iterator[record.Row]:
    """Train every arm with six seeds on pairs drawn once, and judge its pictures of held-out prompts as the ablation does.

    Gain is the mean rise of the photometric scorers, drift the mean squared change of pictures that needed none, alignment
    the share of requested colours, shapes and places that are right, diversity 1 less the similarity of two draws. The last
    rows are differences from the training that uses every batch once, on the same pairs with the same seed: means over
    the seeds, and their 95% intervals.
    """
    base = playground.synthesizer(guide=aa.OutputMix(), steps=SAMPLING_STEPS)
    interaction = Interaction(
        synthesizer=base, critic=PhotometricCritic(contrast=0.15), sampling_steps=SAMPLING_STEPS, seed=0
    )
    held_out = playground.prompts(4 if quick else 64, seed=1, held_out=True)
    evaluation = HeldOutEvaluation(base, held_out)
    rows: list[record.Row] = []
    for seed in range(2 if quick else 6):
        for arm in arms(quick=quick):
            trainer = aa.DifferentialLoRATrainer(
                echo=arm.echo, rank=8, steps=arm.steps, batch_size=BATCH_SIZE, learning_rate=4e-3
            )
            training = trainer.train(interaction.kept(arm.pairs).pairs, base, seed=seed, progress=False)
            measures = evaluation.measure(plain(base.with_lora(training.lora)))
            judged = {name: float(measures[name].mean()) for name in JUDGED}
            rows.append({"seed": seed, **arm.columns(), "seconds": training.seconds, **judged})
            yield rows[-1]
    yield from differences(rows)


def differences(rows: Sequence[record.Row]) -> Iterator[record.Row]:
    """Every arm minus its training that uses batches once, seed by seed."""
    once = {(row["seed"], row["pairs"], row["steps_once"]): row for row in rows if row["echo"] == 1}
    keys = (*SAME, "echo", "steps")
    for arm in dict.fromkeys(tuple(row[key] for key in keys) for row in rows if row["echo"] > 1):
        mine = [row for row in rows if tuple(row[key] for key in keys) == arm]
        compared: dict[str, object] = {"minus": "echo=1", "seeds": len(mine)}
        for name in JUDGED:
            values = [row[name] - once[row["seed"], row["pairs"], row["steps_once"]][name] for row in mine]
            interval = paired_bootstrap(values)
            compared |= {name: fmean(values), f"{name}_low": interval.low, f"{name}_high": interval.high}
        yield dict(zip(keys, arm, strict=True)) | compared


def plot(rows: Sequence[record.Row]) -> Figure:
    """The differences from batches used once, by echo, with their intervals."""
    compared = [row for row in rows if "minus" in row]
    lines = list(dict.fromkeys(tuple(row[key] for key in SAME) for row in compared))
    figure = Figure(figsize=(14, 3.4))
    for place, name in enumerate(JUDGED):
        axes = figure.add_subplot(1, len(JUDGED), place + 1, title=f"{name}, over that of echo=1", xlabel="echo")
        for index, line in enumerate(lines):
            mine = [row for row in compared if tuple(row[key] for key in SAME) == line]
            means, lows, highs = ([row[name + end] for row in mine] for end in ("", "_low", "_high"))
            axes.errorbar(
                [row["echo"] + 0.08 * index for row in mine],
                means,
                yerr=[
                    [mean - low for mean, low in zip(means, lows, strict=True)],
                    [high - mean for mean, high in zip(means, highs, strict=True)],
                ],
                marker="o",
                markersize=3,
                linewidth=0.8,
                label="{} pairs, {} steps, equal {}".format(*line),
            )
        axes.axhline(0, color="grey", linewidth=0.5)
    figure.axes[0].legend(fontsize=6)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    record.run("echo", measure, plot)
