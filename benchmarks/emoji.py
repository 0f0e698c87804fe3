"""From flat emoji to 3D: pairs that the library did not make, a base trained here, and every objective at equal passes.

``python -m benchmarks.emoji`` takes about an hour of one quiet core, half of it for the base, and continues where it was
stopped. The pictures come from npm (`benchmarks._emoji_packages`) into OUT/emoji-packages, and what is trained and drawn lies
beside it. Remove OUT/emoji-SIZE/drawn to draw with another base. Flat pictures need ``pip install --group emoji``.
"""

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import matplotlib as mpl
import torch

from artaug.diffusion import DiffusersSynthesizer
from benchmarks import _record as record
from benchmarks._emoji_arms import ARMS, SIZES, Bench, Cell, Settings
from benchmarks._emoji_base import MAX_SEQUENCE_LENGTH, train_base
from benchmarks._emoji_codec import PatchComponents, reconstruct
from benchmarks._emoji_exam import Exam, Features, efficientnet
from benchmarks._emoji_packages import SIDE, Pictures, load_google, load_pictures
from benchmarks._emoji_plot import contact_sheet, plot


def prepare(folder: Path, packages: Path, settings: Settings) -> tuple[Bench, PatchComponents]:
    """Read the pictures, fit the autoencoder and train the base, or continue with it."""
    subjects = load_pictures(packages, most=settings.most_subjects)
    known = settings.subjects
    # Neither 3D picture of a name that is tested, nor one that is paired: flat to 3D is learned from the pairs alone.
    seen = [
        subjects.flat,
        subjects.solid[known:],
        *([load_google(packages)] if settings.with_google else []),
    ]
    codec = PatchComponents.fit(torch.cat(seen))
    pipeline = train_base(subjects.names[:known], subjects.flat[:known], codec, folder / "base", size=settings.base)
    base = DiffusersSynthesizer(
        pipeline=pipeline,
        width=SIDE,
        height=SIDE,
        steps=settings.draw_steps,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
    )
    return Bench(base=base, subjects=subjects, settings=settings, folder=folder / "drawn"), codec


def measure(bench: Bench, codec: PatchComponents, features: Mapping[str, Features]) -> Iterator[record.Row]:
    """Judge the controls, choose each arm's learning rate, train and judge the cells of every seed and number of pairs."""
    exam, tuning_exam = (exam_of(bench, features, tuning=tuning) for tuning in (False, True))
    for name, pictures in {
        "base": exam.base,
        "true flat": exam.flat,
        "true 3D": exam.solid,
        "true 3D, through the autoencoder": reconstruct(codec, exam.solid),
    }.items():
        yield {"arm": name, **exam.row(pictures)}
    sizes = sorted(bench.settings.sizes)
    middle, rates = sizes[(len(sizes) - 1) // 2], dict[str, float]()
    for name, arm in ARMS.items():
        tried: dict[float, float] = {}
        for rate in arm.learning_rates:
            cell = Cell(arm=name, pairs=middle, seed=0, learning_rate=rate, tuning=True)
            scale, drawn, cost = next(bench.pictures(cell))
            row = tuning_exam.row(drawn)
            tried[rate] = row["distance"]
            yield {**asdict(cell), **cost, "scale": scale, **row}
        rates[name] = min(tried, key=tried.__getitem__)
    for seed, pairs, name in product(bench.settings.seeds, bench.settings.sizes, ARMS):
        cell = Cell(arm=name, pairs=pairs, seed=seed, learning_rate=rates[name])
        for scale, drawn, cost in bench.pictures(cell):
            yield {**asdict(cell), **cost, "scale": scale, **exam.row(drawn)}


def exam_of(bench: Bench, features: Mapping[str, Features], *, tuning: bool) -> Exam:
    """The exam of the names that are drawn, which are recognized among all subjects of the base."""
    drawn: Pictures = bench.drawn(tuning=tuning)
    known = bench.subjects[: bench.settings.subjects]
    others = torch.tensor([name not in set(drawn.names) for name in known.names])
    return Exam(
        flat=drawn.flat,
        solid=drawn.solid,
        base=bench.base_pictures(tuning=tuning),
        candidates=torch.cat([drawn.flat, known.flat[others]]),
        features=features,
    )


def main() -> None:
    """Read the command line, measure, and write emoji.json, emoji.png and the contact sheet emoji-pictures.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="medium", help="how many subjects and pairs, and how long")
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", help="the same as --size quick")
    parser.add_argument("--base-steps", type=int, default=None, help="train the base for longer or shorter")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where to write")
    options = parser.parse_args()
    mpl.use("Agg")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("emoji").setLevel(logging.INFO)
    settings = SIZES[options.size]
    if options.base_steps is not None:
        settings = replace(settings, base=replace(settings.base, steps=options.base_steps))
    folder = options.out / f"emoji-{options.size}"
    recorded = record.environment() | {"quick": options.size == "quick", "settings": asdict(settings)}
    bench, codec = prepare(folder, options.out / "emoji-packages", settings)
    rows: list[record.Row] = []
    for row in measure(bench, codec, {"efficientnet": efficientnet()}):
        rows.append(row)
        record.write(options.out / "emoji.json", recorded, rows)
    print(record.table(rows))
    plot(rows).savefig(options.out / "emoji.png", dpi=150, bbox_inches="tight")
    contact_sheet(bench, cells_to_show(rows)).savefig(options.out / "emoji-pictures.png", dpi=80, bbox_inches="tight")


def cells_to_show(rows: Sequence[record.Row]) -> list[Cell]:
    """Of every arm, the cell of the first seed with most pairs."""
    trained = [row for row in rows if "pairs" in row and not row["tuning"]]
    most, first = max(row["pairs"] for row in trained), trained[0]["seed"]
    chosen = [row for row in trained if (row["pairs"], row["seed"]) == (most, first)]
    fields = ("arm", "pairs", "seed", "learning_rate", "tuning")
    return [
        Cell(**dict(values)) for values in dict.fromkeys(tuple((name, row[name]) for name in fields) for row in chosen)
    ]


if __name__ == "__main__":
    main()
