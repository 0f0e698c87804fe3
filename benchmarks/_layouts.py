"""Random regional layouts of the playground's world, and metrics of their pictures."""

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
"""Side of an image token of the playground's model, as a fraction of the picture's."""

_EDGES = (0.36, 0.64)  # between what the detector calls left, middle and right
_SKY = 0.2
_SKIES = 24


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A plain scene, and things, each with the box where it should be."""

    setting: Setting
    boxes: tuple[aa.Box, ...]
    things: tuple[Thing, ...]

    @property
    def scene(self) -> str:
        """The plan's prompt."""
        return Scene(setting=self.setting).caption

    @property
    def long_prompt(self) -> str:
        """All in one sentence, three and four things as well, for which this world has no captions."""
        return f"{' and '.join(str(thing) for thing in self.things)} {self.setting}"

    def plan(self, *, weight: float = 1.0, feather: float = 0.0) -> aa.Plan:
        """The scene, and a region for each thing."""
        prompts = [Scene(things=(thing,), setting=self.setting).caption for thing in self.things]
        regions = [
            aa.Region(box, prompt, weight=weight, feather=feather)
            for box, prompt in zip(self.boxes, prompts, strict=True)
        ]
        return aa.Plan(self.scene, tuple(regions))


def layouts(count: int, *, seed: int, regions: int | None = None) -> list[Layout]:
    """Random layouts of so many regions, or of two, three and four in turn."""
    rng = random.Random(seed)
    return [_layout(rng, regions or 2 + number % 3) for number in range(count)]


def _layout(rng: random.Random, count: int) -> Layout:
    """Boxes side by side, with gaps, on the ground, as things of this world are; each thing has another colour."""
    cuts = [(number + rng.uniform(-0.12, 0.12)) / count for number in range(1, count)]
    boxes = tuple(
        aa.Box(
            left + rng.uniform(0, 0.03),
            rng.uniform(0.25, 0.4),
            right - rng.uniform(0, 0.03),
            rng.uniform(0.9, 1.0),
        )
        for left, right in zip([0.0, *cuts], [*cuts, 1.0], strict=True)
    )
    things = []
    for box, color in zip(boxes, rng.sample(COLORS, count), strict=True):
        place = PLACES[sum(box.center[0] > edge for edge in _EDGES)]
        candidates = [Thing(color=color, shape=shape, place=place) for shape in SHAPES]
        things.append(rng.choice([thing for thing in candidates if not is_held_out(thing)]))
    return Layout(setting=rng.choice(SETTINGS), boxes=boxes, things=tuple(things))


@dataclass(frozen=True, kw_only=True)
class RegionAccuracy:
    """Shares of a picture's regions, in [0, 1]."""

    color: float
    """Those that contain the centre of a thing of the requested colour."""
    thing: float
    """Those in which its shape is right as well."""
    mixed: float
    """Those that contain a thing of another region's colour."""


def region_accuracy(image: Image, layout: Layout) -> RegionAccuracy:
    """The shares of regions that show what their prompts ask for."""
    detected = playground.detect(image)
    colors = {thing.color for thing in layout.things}
    things_by_region = [[thing for thing in detected if _contains(box, thing.box.center)] for box in layout.boxes]
    pairs = list(zip(layout.things, things_by_region, strict=True))
    return RegionAccuracy(
        color=fmean(any(thing.color == requested.color for thing in things) for requested, things in pairs),
        thing=fmean(
            any((thing.color, thing.shape) == (requested.color, requested.shape) for thing in things)
            for requested, things in pairs
        ),
        mixed=fmean(any(thing.color in colors - {requested.color} for thing in things) for requested, things in pairs),
    )


def change_outside(before: Image, after: Image, boxes: Sequence[aa.Box]) -> float:
    """Mean change of pixels in [0, 1] more than half a token away from all boxes; 0 if there are none."""
    outside = ~_box_mask([box.padded(TOKEN / 2) for box in boxes], before)
    change = np.abs(_pixels(after) - _pixels(before)).mean(axis=2)[outside]
    return float(change.mean()) if change.size else 0.0


def seam(image: Image, boxes: Sequence[aa.Box]) -> float:
    """Mean gradient across the borders of boxes, over that between all neighbours in the picture; 1 is no seam."""
    pixels = _pixels(image)
    mask = _box_mask(boxes, image)
    steps = [np.abs(np.diff(pixels, axis=axis)).mean(axis=2) for axis in (0, 1)]
    borders = [np.diff(mask.astype(int), axis=axis) != 0 for axis in (0, 1)]
    across = np.concatenate([step[border] for step, border in zip(steps, borders, strict=True)])
    everywhere = np.concatenate([step.ravel() for step in steps])
    return float(across.mean() / everywhere.mean())


def sky_colors() -> Mapping[Setting, NDArray[np.float64]]:
    """The mean colour of the sky in every setting, of rendered pictures."""
    pictures = {setting: [playground.render(setting, seed=seed) for seed in range(_SKIES)] for setting in SETTINGS}
    return {setting: np.mean([_sky_color(image) for image in images], axis=0) for setting, images in pictures.items()}


def nearest_setting(image: Image, colors: Mapping[Setting, NDArray[np.float64]]) -> Setting:
    """The setting with the sky colour nearest to a picture's."""
    sky = _sky_color(image)
    return min(colors, key=lambda setting: float(np.abs(colors[setting] - sky).sum()))


def _sky_color(image: Image) -> NDArray[np.float64]:
    pixels = _pixels(image)
    return np.asarray(pixels[: round(_SKY * len(pixels))].mean(axis=(0, 1)))


def _pixels(image: Image) -> NDArray[np.float64]:
    return np.asarray(image, dtype=np.float64) / 255


def _contains(box: aa.Box, point: tuple[float, float]) -> bool:
    return box.left <= point[0] <= box.right and box.top <= point[1] <= box.bottom


def _box_mask(boxes: Sequence[aa.Box], image: Image) -> NDArray[np.bool_]:
    """Which pixels are inside any of the boxes: bool, (height, width)."""
    mask = np.zeros((image.height, image.width), dtype=bool)
    for box in boxes:
        left, top, right, bottom = box.to_pixels(image.size)
        mask[top:bottom, left:right] = True
    return mask
