"""For people who write their own parts: checks that a part keeps its seam's promises, and doubles that need no model.

The checks raise `AssertionError` with a sentence that says what was promised and what came; a pytest test is one line:

>>> import artaug as aa
>>> from artaug.testing import FixedCritic, check_critic
>>> check_critic(FixedCritic(aa.Critique()))
"""

import colorsys
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from PIL import Image, ImageDraw

from artaug._internal.values import from_json, to_json
from artaug.critique import Abstention, Critic, Critique
from artaug.filtering import PairFilter
from artaug.geometry import Box
from artaug.lora.lora import LoRA
from artaug.pairs import ImagePair, Verdict
from artaug.plan import Plan, Region
from artaug.scoring import Scorer
from artaug.synthesis import Synthesizer

_PROMPT = "a lighthouse above the sea, 海の上の灯台"


# --- doubles -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SwatchSynthesizer(Synthesizer):
    """Draws flat colour fields: the prompt decides the colour, regions paint theirs, the seed adds grain.

    It takes any LoRA, which changes nothing but a lighter shade, so that a loop can be rehearsed in milliseconds.
    """

    width: int = 64
    height: int = 64
    lora_scale: float = 0.0
    """Sum of the scales of the LoRAs it draws with."""

    def synthesize(self, plan: Plan, *, seed: int) -> Image.Image:
        image = Image.new("RGB", (self.width, self.height), _colour(plan.prompt, self.lora_scale))
        brush = ImageDraw.Draw(image)
        for region in plan.regions:
            if isinstance(region.area, Box):
                left, top, right, bottom = region.area.to_pixels(image.size)
                brush.rectangle((left, top, right - 1, bottom - 1), fill=_colour(region.prompt, self.lora_scale))
        grain = np.random.default_rng(seed).integers(-8, 9, size=(self.height, self.width, 1))
        return Image.fromarray(np.clip(np.asarray(image, dtype=int) + grain, 0, 255).astype(np.uint8))

    def with_lora(self, lora: LoRA, *, scale: float = 1.0) -> Self:
        return replace(self, lora_scale=self.lora_scale + scale)


@dataclass(frozen=True)
class FixedCritic(Critic):
    """Gives the same answer to every picture."""

    answer: Critique | Abstention

    def critique(self, image: Image.Image, prompt: str) -> Critique | Abstention:
        return self.answer


@dataclass(frozen=True)
class FixedScorer(Scorer):
    """Gives every picture the same score."""

    value: float = 0.0

    def score(self, image: Image.Image, prompt: str) -> float:
        return self.value


@dataclass(frozen=True)
class FixedFilter(PairFilter):
    """Keeps every pair, or none."""

    keep: bool

    def judge(self, pair: ImagePair) -> Verdict:
        return Verdict(self.keep, f"a FixedFilter {'keeps' if self.keep else 'drops'} everything", {})


# --- checks ------------------------------------------------------------------------------------------------------


def check_critic(critic: Critic) -> None:
    """Check that a critic answers any picture with a critique or an abstention, and leaves the picture alone.

    It is shown photographs' worth of sizes and modes: noise, flat colours, a single pixel, grey and transparent
    pictures, a long prompt and one in another script.

    Raises:
        AssertionError: with a sentence naming the promise that was broken.
    """
    images, prompts = _odd_pictures(), [_PROMPT, "a red ball", "", "word " * 2000, _PROMPT, "a red ball"]
    for image, prompt in zip(images, prompts, strict=True):
        untouched = image.copy()
        answer = critic.critique(image, prompt)
        shown = f"{type(critic).__name__}.critique({image.mode} picture of {image.size}, {prompt[:20]!r}...)"
        assert isinstance(answer, Critique | Abstention), (
            f"{shown} returned {type(answer).__name__}: expected artaug.Critique or artaug.Abstention"
        )
        assert image.tobytes() == untouched.tobytes(), f"{shown} changed the picture it was shown"
        assert from_json(type(answer), to_json(answer)) == answer, f"{shown} gave an answer that JSON changes"
    batch = critic.critique_batch(images, prompts)
    assert len(batch) == len(images), f"critique_batch gave {len(batch)} answers for {len(images)} pictures"
    assert all(isinstance(answer, Critique | Abstention) for answer in batch), (
        f"critique_batch returned {[type(answer).__name__ for answer in batch]}: expected Critique or Abstention"
    )
    assert critic.critique_batch([], []) == [], "critique_batch of no pictures should be an empty list"


def check_synthesizer(synthesizer: Synthesizer) -> None:
    """Check that a synthesizer draws the same picture for the same arguments, other ones for other seeds, and regions.

    Raises:
        AssertionError: with a sentence naming the promise that was broken.
    """
    name, plan = type(synthesizer).__name__, Plan("a red ball")
    first, other = synthesizer.synthesize(plan, seed=1), synthesizer.synthesize(plan, seed=2)
    again = synthesizer.synthesize(plan, seed=1)
    assert isinstance(first, Image.Image), f"{name}.synthesize returned {type(first).__name__}: expected a PIL image"
    assert first.tobytes() == again.tobytes(), f"{name} drew two pictures for the same plan and seed"
    assert first.tobytes() != other.tobytes(), f"{name} drew the same picture for two seeds"
    regional = Plan("a red ball", (Region(Box(0, 0, 0.5, 0.5), "a blue cube"),))
    drawn = synthesizer.synthesize(regional, seed=1)
    assert drawn.size == first.size, f"{name} drew {drawn.size} with a region and {first.size} without"
    assert drawn.tobytes() != first.tobytes(), f"{name} read no region: the picture is the same with and without it"
    batch = synthesizer.synthesize_batch([plan, regional], seeds=[1, 1])
    assert [image.size for image in batch] == [first.size] * 2, (
        f"{name}.synthesize_batch gave sizes {[image.size for image in batch]} for 2 plans of {first.size}"
    )


def check_scorer(scorer: Scorer) -> None:
    """Check that a scorer gives finite numbers, the same alone and in a batch, to any picture.

    Raises:
        AssertionError: with a sentence naming the promise that was broken.
    """
    images = [image.convert("RGB").resize((64, 64)) for image in _odd_pictures()]
    prompts = [_PROMPT] * len(images)
    alone = [scorer.score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    assert all(math.isfinite(number) for number in alone), f"{scorer.name} gave {alone}: expected finite numbers"
    batch = scorer.score_batch(images, prompts)
    close = len(batch) == len(alone) and all(map(_nearly, alone, batch))
    assert close, f"{scorer.name} gave {alone} one by one and {list(batch)} in a batch"
    assert scorer.name, f"{type(scorer).__name__}.name is empty: tables have nothing to call it"


def check_filter(keep: PairFilter) -> None:
    """Check that a filter gives a verdict with a reason to every pair, and one for each in a batch.

    Raises:
        AssertionError: with a sentence naming the promise that was broken.
    """
    draw = SwatchSynthesizer()
    plans = [Plan("a red ball", (Region(Box(0, 0, 0.5, 1), f"part {part}"),)) for part in range(3)]
    pairs = [
        ImagePair(
            prompt=plan.prompt,
            seed=seed,
            before=draw.synthesize(Plan(plan.prompt), seed=seed),
            after=draw.synthesize(plan, seed=seed),
            plan=plan,
        )
        for seed, plan in enumerate(plans)
    ]
    name = type(keep).__name__
    for verdict in [*(keep.judge(pair) for pair in pairs), *keep.judge_batch(pairs)]:
        assert isinstance(verdict, Verdict), f"{name} returned {type(verdict).__name__}: expected artaug.Verdict"
        assert verdict.reason, f"{name} gave no reason: {verdict!r}"
    batch = keep.judge_batch(pairs)
    assert len(batch) == len(pairs), f"{name}.judge_batch gave {len(batch)} verdicts for {len(pairs)} pairs"
    assert all(one.keep != two.keep for one, two in zip(batch, (~keep).judge_batch(pairs), strict=True)), (
        f"~{name} does not keep what {name} drops"
    )


def _odd_pictures() -> Sequence[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, size=(48, 64, 3), dtype=np.uint8)
    return [
        Image.fromarray(noise),
        Image.new("RGB", (64, 64), "black"),
        Image.new("RGB", (1, 1), "white"),
        Image.fromarray(noise).convert("L"),
        Image.fromarray(noise).convert("RGBA"),
        Image.new("RGB", (200, 10), (200, 30, 30)),
    ]


def _nearly(one: float, two: float) -> bool:
    return math.isclose(one, two, rel_tol=1e-4, abs_tol=1e-5)


def _colour(prompt: str, worn: float) -> tuple[int, int, int]:
    """A colour of its own for every prompt, lighter the more LoRA is worn."""
    hue = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") / 2**32
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.6, min(0.6 + 0.1 * max(worn, 0.0), 1.0))
    return round(red * 255), round(green * 255), round(blue * 255)
