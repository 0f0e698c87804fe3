"""Doubles for benchmarks of a run: pictures like photographs from no model, and a round of attempts written directly."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

import artaug as aa
from artaug._internal.segments import write_provisional
from artaug.image_files import image_digest
from artaug.plan import plan_digest
from artaug.run.storage.records import (
    CallRecord,
    Candidate,
    Chunk,
    ChunkRecord,
    DrawingStage,
    End,
    Member,
    Picture,
)
from artaug.run.storage.round_folder import RoundFolder

CHUNK = 8
"""Prompts."""
BOXES = (aa.Box(0.08, 0.1, 0.42, 0.55), aa.Box(0.5, 0.12, 0.93, 0.6), aa.Box(0.2, 0.62, 0.88, 0.97))
SCORES = ("Exposure gain", "Chroma gain", "Contrast gain", "Sharpness gain")


def photo(number: int, size: int) -> Image.Image:
    """A square picture with the smooth colors of a photograph and the noise of its sensor, another one for each number."""
    rows, columns = divmod(number % size**2, size)
    return Image.fromarray(np.roll(_first_photo(size), (rows, columns), axis=(0, 1)))


@lru_cache(maxsize=2)
def _first_photo(size: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    rough = Image.fromarray(generator.integers(256, size=(8, 8, 3), dtype=np.uint8))
    smooth = np.asarray(rough.resize((size, size), Image.Resampling.BICUBIC), dtype=np.int16)
    noise = generator.integers(-12, 13, size=smooth.shape, dtype=np.int16)
    pixels: np.ndarray = np.clip(smooth + noise, 0, 255).astype(np.uint8)
    return pixels


@dataclass
class PhotoSynthesizer(aa.Synthesizer):
    """Draws photographs of a given size, each in a given time."""

    size: int
    """Pixels a side."""
    seconds: float = 0.0
    """A picture takes so long, simulated by sleep: what a store adds is the same on top of a model's work."""
    distinct: int | None = None
    """Pictures repeat after so many, so that the disk holds these alone; None for another picture each time."""

    @property
    def draws_regions(self) -> bool:
        return True

    @property
    def picture_size(self) -> tuple[int, int]:
        return self.size, self.size

    def synthesize(self, plan: aa.Plan, *, seed: int) -> Image.Image:
        return self.synthesize_batch([plan], seeds=[seed])[0]

    def synthesize_batch(self, plans: Sequence[aa.Plan], *, seeds: Sequence[int]) -> list[Image.Image]:
        end = time.perf_counter() + self.seconds * len(plans)
        numbers = (2 * (seed % 2**32) + bool(plan.regions) for plan, seed in zip(plans, seeds, strict=True))
        images = [photo(number % (self.distinct or 2**33), self.size) for number in numbers]
        time.sleep(max(end - time.perf_counter(), 0.0))
        return images

    def with_lora(self, lora: aa.LoRA, *, scale: float = 1.0) -> "PhotoSynthesizer":
        return self


@dataclass(frozen=True)
class ThreeBoxes(aa.Critic):
    """Suggests three changes, but nothing for every third prompt."""

    def critique(self, image: Image.Image, prompt: str) -> aa.Critique:
        number = int(prompt.rpartition(" ")[2])
        return critique(prompt) if number % 3 else aa.Critique()


@dataclass(frozen=True)
class EveryOther(aa.PairFilter):
    """Keeps the pairs of prompts with an even number. It looks at the pictures, as a filter does."""

    def judge(self, pair: aa.ImagePair) -> aa.Verdict:
        gain = (pair.after.getpixel((0, 0))[0] - pair.before.getpixel((0, 0))[0]) / 255  # type: ignore[index]
        return verdict(int(pair.prompt.rpartition(" ")[2]), gain=gain)


def prompts(count: int) -> list[str]:
    """Prompts that end with their number."""
    return [f"a photograph of a market by the harbor at dawn, people with umbrellas, number {i}" for i in range(count)]


def critique(prompt: str) -> aa.Critique:
    """Three suggestions, with reasons as long as a vision-language model's."""
    reason = "the faces are lost in shadow, and the texture of the cloth looks smeared"
    suggestions = (
        aa.Suggestion(box, f"{prompt}, part {part}, sharp, softly lit", reason) for part, box in enumerate(BOXES)
    )
    return aa.Critique(tuple(suggestions), summary="The composition is good; the light is flat.")


def verdict(number: int, *, gain: float = 0.1) -> aa.Verdict:
    """A verdict with four scores."""
    keep = number % 2 == 0
    scores = {name: round(gain / (place + 1), 4) for place, name in enumerate(SCORES)}
    return aa.Verdict(
        keep=keep, reason="all gains are positive" if keep else "Exposure gain is too small", scores=scores
    )


def write_round(folder: RoundFolder, count: int) -> None:
    """Write the files of a round with so many prompts, without their pictures.

    Files are those of a run; they are not flushed to the disk, which takes most of the time of writing.
    """
    texts = prompts(count)
    folder.begin([count])
    attempts = folder.path / "attempts"
    attempts.mkdir(parents=True)
    for place, start in enumerate(range(0, count, CHUNK)):
        record = chunk_record(texts, range(start, min(start + CHUNK, count)), folder.images)
        write_provisional(attempts / f"0-{place:05d}.json", record, what="a chunk", remedy="Make room.")


def chunk_record(texts: Sequence[str], indices: Sequence[int], images: aa.ImageFolder) -> ChunkRecord:
    """A chunk as the stages make it: a third of its prompts is skipped, half of the others kept."""
    planner, ends, calls = aa.GreedyPlanner(), [], []
    candidates: dict[Member, Candidate] = {}
    for index in indices:
        member, prompt = Member(index, 0), texts[index]
        before, after = (images.get(f"{2 * index + place:064x}", size=(1024, 1024)) for place in (0, 1))
        answer = ThreeBoxes().critique(Image.new("RGB", (1, 1)), prompt)
        plan = planner.plan(prompt, answer) if answer.suggestions else None
        candidates[member] = Candidate(member, prompt, index, before, answer, plan, after if plan else None)
        ends.append(
            End(index, 0, verdict(index)) if plan else End(index, 0, None, "the critic suggested nothing", "plan")
        )
    drawn: dict[DrawingStage, dict[Member, Picture]] = {
        "draw": {member: candidate.before for member, candidate in candidates.items() if candidate.before},
        "redraw": {member: candidate.after for member, candidate in candidates.items() if candidate.after},
    }
    for stage, files in drawn.items():
        plans = tuple(plan_digest(candidates[member].plan or aa.Plan("")) for member in files)
        calls.append(CallRecord(stage, tuple(files), plans, tuple(map(image_digest, files.values())), CHUNK, 1))
    return ChunkRecord.of(Chunk(candidates, ends, {"draw": 9.1, "critique": 2.5, "redraw": 14.2, "judge": 0.4}), calls)


def round_folder(path: Path) -> RoundFolder:
    """The folder of the first round of a run."""
    return RoundFolder(path / "round-1", aa.ImageFolder(path / "images"))
