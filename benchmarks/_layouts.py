"""Random regional layouts of the playground's world, and what can be measured of a picture of one."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

import artaug as aa
from artaug import playground
from artaug.playground.world import COLORS, PLACES, SETTINGS, SHAPES, Scene, Setting, Thing, is_held_out

TOKEN = 1 / 8
"""An image token of the playground's model, as a fraction of the picture's side."""

_EDGES = (0.36, 0.64)  # between what the detector calls left, middle and right
_SKY = 0.2
_SKIES = 24


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A plain scene, and where things are to be in it."""

    setting: Setting
    boxes: tuple[aa.Box, ...]
    things: tuple[Thing, ...]

    @property
    def scene(self) -> str:
        """The plan's prompt."""
        return Scene(setting=self.setting).caption

    @property
    def long_prompt(self) -> str:
        """Everything in one sentence: also three things and four, of which this world has no captions."""
        return f"{' and '.join(str(thing) for thing in self.things)} {self.setting}"

    def plan(self, *, weight: float = 1.0, feather: float = 0.0) -> aa.Plan:
        """The scene, and a region a thing."""
        asked = [Scene(things=(thing,), setting=self.setting).caption for thing in self.things]
        placed = zip(self.boxes, asked, strict=True)
        return aa.Plan(self.scene, tuple(aa.Region(*one, weight=weight, feather=feather) for one in placed))


def layouts(count: int, *, seed: int) -> list[Layout]:
    """Random layouts, of two, three and four regions in turn."""
    chooser = random.Random(seed)
    return [_layout(chooser, 2 + number % 3) for number in range(count)]


def _layout(chooser: random.Random, count: int) -> Layout:
    """Boxes side by side, with gaps, on the ground, where things of this world stand; each thing of its own colour."""
    inner = [(number + chooser.uniform(-0.12, 0.12)) / count for number in range(1, count)]
    boxes = tuple(
        aa.Box(
            left + chooser.uniform(0, 0.03),
            chooser.uniform(0.25, 0.4),
            right - chooser.uniform(0, 0.03),
            chooser.uniform(0.9, 1.0),
        )
        for left, right in zip([0.0, *inner], [*inner, 1.0], strict=True)
    )
    things = []
    for box, color in zip(boxes, chooser.sample(COLORS, count), strict=True):
        place = PLACES[sum(box.center[0] > edge for edge in _EDGES)]
        every = [Thing(color=color, shape=shape, place=place) for shape in SHAPES]
        things.append(chooser.choice([thing for thing in every if not is_held_out(thing)]))
    return Layout(setting=chooser.choice(SETTINGS), boxes=boxes, things=tuple(things))


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Shares of a picture's regions, in [0, 1]."""

    color: float
    """Those in which a thing of the asked colour has its centre."""
    thing: float
    """Those in which it has the asked shape, too."""
    mixed: float
    """Those in which there is a thing of another region's colour."""


def placed(image: Image, layout: Layout) -> Placed:
    """Which regions of a picture show what they ask for."""
    found = playground.detect(image)
    colors = {thing.color for thing in layout.things}
    seen = [[one for one in found if _holds(box, one.box.center)] for box in layout.boxes]
    pairs = list(zip(layout.things, seen, strict=True))
    return Placed(
        color=fmean(any(one.color == asked.color for one in here) for asked, here in pairs),
        thing=fmean(any((one.color, one.shape) == (asked.color, asked.shape) for one in here) for asked, here in pairs),
        mixed=fmean(any(one.color in colors - {asked.color} for one in here) for asked, here in pairs),
    )


def change_outside(before: Image, after: Image, boxes: Sequence[aa.Box]) -> float:
    """Mean change of pixels in [0, 1] more than half a token away from all boxes; 0 if there are none."""
    outside = ~_inside([box.padded(TOKEN / 2) for box in boxes], before)
    change = np.abs(_pixels(after) - _pixels(before)).mean(axis=2)[outside]
    return float(change.mean()) if change.size else 0.0


def seam(image: Image, boxes: Sequence[aa.Box]) -> float:
    """Mean gradient across the borders of boxes, over that between all neighbours in the picture; 1 is no seam."""
    pixels = _pixels(image)
    marked = _inside(boxes, image)
    steps = [np.abs(np.diff(pixels, axis=axis)).mean(axis=2) for axis in (0, 1)]
    borders = [np.diff(marked.astype(int), axis=axis) != 0 for axis in (0, 1)]
    across = np.concatenate([step[border] for step, border in zip(steps, borders, strict=True)])
    everywhere = np.concatenate([step.ravel() for step in steps])
    return float(across.mean() / everywhere.mean())


def skies() -> Mapping[Setting, NDArray[np.float64]]:
    """The mean colour of the sky in every setting, of rendered pictures."""
    pictures = {setting: [playground.render(setting, seed=seed) for seed in range(_SKIES)] for setting in SETTINGS}
    return {setting: np.mean([_sky(image) for image in images], axis=0) for setting, images in pictures.items()}


def setting_of(image: Image, known: Mapping[Setting, NDArray[np.float64]]) -> Setting:
    """The setting whose sky is nearest to a picture's."""
    here = _sky(image)
    return min(known, key=lambda setting: float(np.abs(known[setting] - here).sum()))


def _sky(image: Image) -> NDArray[np.float64]:
    pixels = _pixels(image)
    return np.asarray(pixels[: round(_SKY * len(pixels))].mean(axis=(0, 1)))


def _pixels(image: Image) -> NDArray[np.float64]:
    return np.asarray(image, dtype=np.float64) / 255


def _holds(box: aa.Box, point: tuple[float, float]) -> bool:
    return box.left <= point[0] <= box.right and box.top <= point[1] <= box.bottom


def _inside(boxes: Sequence[aa.Box], image: Image) -> NDArray[np.bool_]:
    """Which pixels lie in a box."""
    marked = np.zeros((image.height, image.width), dtype=bool)
    for box in boxes:
        left, top, right, bottom = box.to_pixels(image.size)
        marked[top:bottom, left:right] = True
    return marked
