"""What learns flat to 3D from real pairs: arms at equal passes, cells that are drawn once, and their pictures on the disk."""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer
from artaug.synthesis import picture_seeds
from benchmarks._emoji_base import BaseSize
from benchmarks._emoji_packages import SIDE, Pictures, to_image, to_tensor

BATCH_SIZE, RANK = 8, 8
_CHUNK = 32


@dataclass(frozen=True)
class Arm:
    """An objective, how many passes a picture of it costs, and the learning rates that are tried."""

    objective: aa.Objective
    passes: int
    """Denoiser calls a step and picture; one with gradient counts three times, for its backward pass."""
    learning_rates: Sequence[float]


ARMS: Mapping[str, Arm] = {
    "PairedDifference": Arm(aa.PairedDifference(), 4, (2e-3, 4e-3)),
    "PairedDifference, reach 1.5": Arm(aa.PairedDifference(reach=1.5), 4, (2e-3, 4e-3)),
    "PairedDifference, at before": Arm(aa.PairedDifference(at_before=0.5), 7, (2e-3, 4e-3)),
    "PairedPreference": Arm(aa.PairedPreference(), 8, (1e-3, 2e-3)),
    "PairedPreference, anchor .25": Arm(aa.PairedPreference(anchor=0.25), 8, (1e-3, 2e-3)),
    "SupervisedFineTuning": Arm(aa.SupervisedFineTuning(), 3, (2e-3, 4e-3)),
    "TwoStage, pooled": Arm(aa.TwoStage(per_pair=False), 3, (2e-3, 4e-3)),
    "DirectPreference": Arm(aa.DirectPreference(beta=5.0), 8, (1e-3, 2e-3)),
    "NegativeAware": Arm(aa.NegativeAware(), 8, (1e-3, 2e-3)),
}
"""What learns, by its name in the results."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The sizes of a run."""

    test_names: int = 64
    """Never paired: the first of the subjects."""
    tuning_names: int = 16
    """Never paired either, for the choice of learning rates: the next."""
    sizes: Sequence[int] = (8, 32, 128)
    """Numbers of pairs; the largest is how many subjects they are taken from."""
    seeds: Sequence[int] = (0, 1, 2)
    passes: int = 4096
    """Denoiser passes of a training, the same for all arms."""
    scales: Sequence[float] = (1.0, 2.0)
    """Strengths at which the LoRAs are drawn with."""
    draw_steps: int = 12
    base: BaseSize = field(default_factory=BaseSize)
    most_subjects: int | None = None
    """How many are read from the packages, for the autoencoder and to be recognized among; None for all."""
    with_google: bool = True
    """Whether the autoencoder is fitted to Google's pictures too."""

    @property
    def subjects(self) -> int:
        """How many the base learns to draw flat."""
        return self.test_names + self.tuning_names + max(self.sizes)

    @property
    def test(self) -> slice:
        """The subjects that are tested."""
        return slice(self.test_names)

    @property
    def tuning(self) -> slice:
        """The subjects that learning rates are chosen by."""
        return slice(self.test_names, self.test_names + self.tuning_names)

    @property
    def pool(self) -> slice:
        """The subjects that pairs are taken from."""
        return slice(self.test_names + self.tuning_names, self.subjects)

    def steps(self, arm: Arm) -> int:
        """Optimizer steps of an arm."""
        return max(4, round(self.passes / (arm.passes * BATCH_SIZE)))


SIZES: Mapping[str, Settings] = {
    "quick": Settings(
        test_names=6,
        tuning_names=4,
        sizes=(2, 8),
        seeds=(0,),
        passes=256,
        scales=(1.0,),
        draw_steps=4,
        base=BaseSize(steps=20),
        most_subjects=24,
        with_google=False,
    ),
    "small": Settings(
        test_names=32, tuning_names=8, sizes=(8, 32), passes=2048, base=BaseSize(steps=1600, peak_rate=2e-3)
    ),
    "medium": Settings(),
    "full": Settings(
        test_names=128,
        tuning_names=32,
        sizes=(8, 32, 128, 512),
        base=BaseSize(heads=6, steps=20_000, batch_size=64),
    ),
}
"""On one quiet core: two minutes, a quarter of an hour, an hour, most of a day."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training."""

    arm: str
    pairs: int
    seed: int
    learning_rate: float
    tuning: bool = False
    """Whether it is drawn for the tuning names, not for those of the test."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The base, the true pictures of all subjects, and the folder that keeps what was drawn."""

    base: DiffusersSynthesizer
    subjects: Pictures
    settings: Settings
    folder: Path

    def drawn(self, *, tuning: bool) -> Pictures:
        """The subjects that are drawn."""
        return self.subjects[self.settings.tuning if tuning else self.settings.test]

    def base_pictures(self, *, tuning: bool) -> Tensor:
        """What the base draws, names x 3 x side x side in [0, 1]; drawn once."""
        path = self.folder / f"base{'-tuning' * tuning}.png"
        if not path.exists():
            _save(path, self._draw(self.base, tuning=tuning))
        return _load(path)

    def pictures(self, cell: Cell) -> Iterator[tuple[float, Tensor, Mapping[str, float]]]:
        """Each scale, what the cell's LoRA draws at it, and the cost of the training; trained and drawn once."""
        name = re.sub(r"[^\w.-]+", "-", "-".join(str(value) for value in asdict(cell).values()))
        cost_path = self.folder / f"{name}.json"
        if not cost_path.exists():
            lora, cost = self._train(cell)
            for scale in self.settings.scales:
                student = self.base.with_lora(lora, scale=scale)
                _save(self.folder / f"{name}-x{scale:g}.png", self._draw(student, tuning=cell.tuning))
            cost_path.write_text(json.dumps(cost))
        cost = json.loads(cost_path.read_text())
        for scale in self.settings.scales:
            yield scale, _load(self.folder / f"{name}-x{scale:g}.png"), cost

    def _train(self, cell: Cell) -> tuple[aa.LoRA, Mapping[str, float]]:
        arm, start = ARMS[cell.arm], time.monotonic()
        trainer = aa.DifferentialLoRATrainer(
            objective=arm.objective,
            echo=1,
            rank=RANK,
            steps=self.settings.steps(arm),
            batch_size=min(BATCH_SIZE, cell.pairs),
            learning_rate=cell.learning_rate,
        )
        result = trainer.train(self._pairs(cell), self.base, seed=cell.seed, progress=False)
        return result.lora, {"steps": trainer.steps, "seconds": time.monotonic() - start}

    def _pairs(self, cell: Cell) -> list[aa.ImagePair]:
        """The true pictures of some subjects of the pool, others for every seed."""
        pool = self.subjects[self.settings.pool]
        generator = torch.Generator().manual_seed(cell.seed)
        chosen = torch.randperm(len(pool.names), generator=generator)[: cell.pairs].tolist()
        return [
            aa.ImagePair(prompt=pool.names[row], before=to_image(pool.flat[row]), after=to_image(pool.solid[row]))
            for row in chosen
        ]

    def _draw(self, synthesizer: aa.Synthesizer, *, tuning: bool) -> Tensor:
        names = self.drawn(tuning=tuning).names
        seeds = picture_seeds(0, len(names))
        images = [
            image
            for start in range(0, len(names), _CHUNK)
            for image in synthesizer.synthesize_batch(
                [aa.Plan(name) for name in names[start : start + _CHUNK]], seeds=seeds[start : start + _CHUNK]
            )
        ]
        return torch.stack([to_tensor(image) for image in images])


def _save(path: Path, pictures: Tensor) -> None:
    """Write pictures below each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    to_image(torch.cat(list(pictures), dim=1)).save(path)


def _load(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.stack(list(to_tensor(image).split(SIDE, dim=1)))
