"""Doubles of the loop's parts that need no model, so that a loop can be rehearsed in milliseconds."""

import colorsys
import hashlib
from dataclasses import dataclass, replace
from typing import Self, final

import numpy as np
from PIL import Image, ImageDraw

from artaug._internal.annotations import checked
from artaug._internal.images import as_rgb
from artaug.canvas import Canvas
from artaug.critique import Abstention, Critic, Critique
from artaug.errors import ModelError
from artaug.filtering import PairFilter
from artaug.geometry import Box
from artaug.lora.lora import LoRA
from artaug.pairs import ImagePair, Verdict
from artaug.pairwise import PairwiseJudge
from artaug.plan import Plan
from artaug.scoring import Scorer
from artaug.synthesis import Synthesizer


@checked
@final
@dataclass(frozen=True)
class SwatchSynthesizer(Synthesizer):
    """Draws flat color fields: the prompt decides the color, regions fill their boxes, the seed adds grain.

    A canvas shines through as its strength leaves it, and stays outside its mask. It takes any LoRA, which makes the colors
    lighter.
    """

    width: int = 64
    height: int = 64
    lora_scale: float = 0.0
    """Sum of the scales of the LoRAs it draws with."""

    @property
    def picture_size(self) -> tuple[int, int]:
        return self.width, self.height

    def synthesize(self, plan: Plan, *, seed: int) -> Image.Image:
        image = Image.new("RGB", (self.width, self.height), _color(plan.prompt, self.lora_scale))
        pen = ImageDraw.Draw(image)
        for region in plan.regions:
            if isinstance(region.area, Box):
                left, top, right, bottom = region.area.to_pixels(image.size)
                pen.rectangle((left, top, right - 1, bottom - 1), fill=_color(region.prompt, self.lora_scale))
        if plan.canvas is not None and plan.canvas.image is not None:
            image = _over(plan.canvas, as_rgb(plan.canvas.image), image)
        grain = np.random.default_rng(seed).integers(-8, 9, size=(self.height, self.width, 1))
        return Image.fromarray(np.clip(np.asarray(image, dtype=int) + grain, 0, 255).astype(np.uint8))

    def canvas_steps(self, canvas: Canvas) -> int:
        if canvas.size != (self.width, self.height):
            raise ModelError(
                f"{canvas!r} is not of {self.width} x {self.height} pixels, which SwatchSynthesizer draws."
            )
        return 1

    def with_lora(self, lora: LoRA, *, scale: float = 1.0) -> Self:
        return replace(self, lora_scale=self.lora_scale + scale)


@checked
@final
@dataclass(frozen=True)
class FixedCritic(Critic):
    """Gives the same answer to every picture."""

    answer: Critique | Abstention

    def critique(self, image: Image.Image, prompt: str) -> Critique | Abstention:
        return self.answer


@checked
@final
@dataclass(frozen=True)
class FixedScorer(Scorer):
    """Gives every picture the same score."""

    value: float = 0.0

    def score(self, image: Image.Image, prompt: str) -> float:
        return self.value


@checked
@final
@dataclass(frozen=True)
class FixedJudge(PairwiseJudge):
    """Gives the same answer to every question: 1 and 0 are judges that see only which picture is shown first."""

    answer: float | Abstention = 0.5

    def prefer(self, first: Image.Image, second: Image.Image, prompt: str) -> float | Abstention:
        return self.answer


@checked
@final
@dataclass(frozen=True)
class FixedFilter(PairFilter):
    """Keeps every pair, or none."""

    keep: bool

    def judge(self, pair: ImagePair) -> Verdict:
        return Verdict(self.keep, f"a FixedFilter {'keeps' if self.keep else 'drops'} everything", {})


def _over(canvas: Canvas, before: Image.Image, image: Image.Image) -> Image.Image:
    """What is drawn over the picture of a canvas."""
    drawn = Image.blend(before, image, 1.0 if canvas.strength is None else canvas.strength)
    if not isinstance(canvas.mask, Box):
        return drawn
    box = canvas.mask.to_pixels(image.size)
    before.paste(drawn.crop(box), box[:2])
    return before


def _color(prompt: str, lora_scale: float) -> tuple[int, int, int]:
    """A color for every prompt, lighter with a larger LoRA scale."""
    hue = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") / 2**32
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.6, min(0.6 + 0.1 * max(lora_scale, 0.0), 1.0))
    return round(red * 255), round(green * 255), round(blue * 255)
