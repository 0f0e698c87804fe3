"""Detection: which things a picture shows, by chroma, hue and outline alone."""

import itertools
import math
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from artaug._internal.annotations import checked
from artaug._internal.images import as_rgb
from artaug.geometry import Box
from artaug.playground import oklab
from artaug.playground.rendering import HUES, SIZE_PX
from artaug.playground.shapes import outline
from artaug.playground.world import COLORS, PLACES, SHAPES, Color, Place, Scene, Shape, parse

_Map = NDArray[np.float64]
_Mask = NDArray[np.bool_]

_CHROMA = 0.058
_SMALLEST = 0.012
_RANK = 85
_TEMPLATE = 24
_EDGES = (0.36, 0.64)
_MOST = 4
_NEAR_PX = 4
_ROUNDING = 2.7


@checked
@dataclass(frozen=True, kw_only=True)
class DetectedThing:
    """A thing detected in a picture."""

    color: Color
    shape: Shape
    place: Place
    box: Box


@checked
@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How well a picture matches its caption; each a share of the caption's things, in [0, 1]."""

    color: float
    shape: float
    place: float
    surplus: int
    """The number of detected things beyond those that the caption asks for."""


@checked
def detect(image: Image.Image) -> list[DetectedThing]:
    """Detect the coloured things in a picture, from left to right.

    >>> from artaug import playground
    >>> image = playground.render("a red cone on the left", seed=0)
    >>> [(thing.color, thing.shape, thing.place) for thing in playground.detect(image)]
    [('red', 'cone', 'on the left')]
    """
    picture = as_rgb(image)
    if picture.size != (SIZE_PX, SIZE_PX):
        picture = picture.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX)
    return list(_detect_in(picture.tobytes()))


@lru_cache(maxsize=256)  # 3 MB: several scorers look at the same pictures of a batch, one scorer after the other
def _detect_in(rgb: bytes) -> tuple[DetectedThing, ...]:
    pixels = np.frombuffer(rgb, dtype=np.uint8).reshape(SIZE_PX, SIZE_PX, 3)
    lab = oklab.from_srgb(torch.from_numpy(pixels / 255)).numpy()
    seeds = _seeds(lab)
    # The hue of a patch is the mean of its pixels' hues, weighted by chroma.
    hues = [math.degrees(math.atan2(lab[seed, 2].sum(), lab[seed, 1].sum())) for seed in seeds]
    things = [_describe(lab, seed, hue, hues) for seed, hue in zip(seeds, hues, strict=True)]
    return tuple(sorted(things, key=lambda thing: thing.box.center))


@checked
def alignment(image: Image.Image, caption: str) -> Alignment:
    """Compare a picture with what its caption asks for.

    Each thing of the caption is matched to at most one detected thing, so that as many attributes as possible
    are right in total. A missing thing is wrong in all three attributes. An attribute that the caption leaves
    open is right if the thing is matched. Every picture matches a caption that asks for nothing.

    Raises:
        CaptionError: The caption is not one of this world.
    """
    return align_things(detect(image), parse(caption))


def align_things(detected: list[DetectedThing], scene: Scene) -> Alignment:
    """Compare detected things with a scene, as `alignment` does."""
    expected = scene.things
    candidates: list[DetectedThing | None] = [*detected, *[None] * len(expected)]  # None: not matched to any
    correct = [
        [
            (
                _matches(thing.color, candidate, 0),
                _matches(thing.shape, candidate, 1),
                _matches(thing.place, candidate, 2),
            )
            for candidate in candidates
        ]
        for thing in expected
    ]
    matchings = itertools.permutations(range(len(candidates)), len(expected))
    best = max(matchings, key=lambda match: sum(sum(correct[row][column]) for row, column in enumerate(match)))
    matched = [correct[row][column] for row, column in enumerate(best)]
    color, shape, place = (
        sum(attributes[i] for attributes in matched) / len(expected) if expected else 1.0 for i in range(3)
    )
    return Alignment(color=color, shape=shape, place=place, surplus=max(0, len(detected) - len(expected)))


def _matches(expected: str | None, thing: DetectedThing | None, attribute: int) -> bool:
    return thing is not None and expected in {None, (thing.color, thing.shape, thing.place)[attribute]}


def _seeds(lab: _Map) -> list[_Mask]:
    """Find the largest connected patches of one hue, largest first."""
    chroma = np.hypot(lab[..., 1], lab[..., 2])
    hue = np.degrees(np.arctan2(lab[..., 2], lab[..., 1]))
    nearest = np.argmin([np.abs(_angle_difference(hue - centre)) for centre in HUES], axis=0)
    patches: list[_Mask] = []
    for color in range(len(HUES)):
        patches += _patches((nearest == color) & (chroma > _CHROMA), smallest=_SMALLEST)
    patches.sort(key=lambda patch: -np.count_nonzero(patch))
    return patches[:_MOST]


def _patches(mask: _Mask, *, smallest: float) -> list[_Mask]:
    """Split a mask into its connected parts, without those that cover less than ``smallest`` of the picture."""
    remaining, parts = mask.copy(), []
    while remaining.mean() > smallest:
        seed = np.zeros_like(remaining)
        seed[np.unravel_index(np.argmax(remaining), remaining.shape)] = True
        part = _flood_fill(seed, remaining)
        remaining &= ~part
        if part.mean() > smallest:
            parts.append(part)
    return parts


def _flood_fill(seed: _Mask, mask: _Mask) -> _Mask:
    """The part of a mask that is connected to a seed."""
    grown, size = seed & mask, 0
    while (count := int(np.count_nonzero(grown))) != size:
        size, grown = count, _dilate(grown, 1) & mask
    return grown


def _dilate(mask: _Mask, steps: int) -> _Mask:
    for _ in range(steps):
        wider = mask.copy()
        wider[1:] |= mask[:-1]
        wider[:-1] |= mask[1:]
        wider[:, 1:] |= mask[:, :-1]
        wider[:, :-1] |= mask[:, 1:]
        mask = wider
    return mask


def _angle_difference(degrees: _Map) -> _Map:
    """Wrap differences of angles to [-180, 180)."""
    return (degrees + 180) % 360 - 180


def _describe(lab: _Map, seed: _Mask, hue: float, hues: list[float]) -> DetectedThing:
    """Refine a patch to half of its own chroma, then name what it is."""
    angle = math.radians(hue)
    along = lab[..., 1] * math.cos(angle) + lab[..., 2] * math.sin(angle)
    around = _dilate(seed, _NEAR_PX) & (np.hypot(lab[..., 1], lab[..., 2]) < _CHROMA)
    behind = max(0.0, float(np.median(along[around]))) if around.any() else 0.0
    cover = np.clip((along - behind) / (np.percentile(along[seed], _RANK) - behind), 0, 1)
    hues_at_pixels = np.degrees(np.arctan2(lab[..., 2], lab[..., 1]))
    nearest = np.min([np.abs(_angle_difference(hues_at_pixels - candidate)) for candidate in hues], axis=0)
    mask = _flood_fill(
        seed, (cover > 0.5) & ((np.abs(_angle_difference(hues_at_pixels - hue)) <= nearest) | (cover < 0.7) | seed)
    )
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    centre = (left + right) / 2 / SIZE_PX
    return DetectedThing(
        color=COLORS[
            int(np.argmin([abs(float(_angle_difference(np.asarray(hue - candidate)))) for candidate in HUES]))
        ],
        shape=_shape(mask[top:bottom, left:right], cover[top:bottom, left:right]),
        place=PLACES[sum(centre > edge for edge in _EDGES)],
        box=Box.from_pixels(float(left), float(top), float(right), float(bottom), size=(SIZE_PX, SIZE_PX)),
    )


def _shape(mask: _Mask, cover: _Map) -> Shape:
    """Choose the solid whose outline, scaled to the same box, differs least."""
    outline_map = _resize(np.where(mask, np.clip(3 * cover - 1, 0, 1), 0.0))
    aspect = math.log(mask.shape[1] / mask.shape[0])
    distances = [
        float(np.abs(outline_map - template).mean()) + 0.15 * abs(aspect - template_aspect)
        for _, template, template_aspect in _templates()
    ]
    return _templates()[int(np.argmin(distances))][0]


@cache
def _templates() -> tuple[tuple[Shape, _Map, float], ...]:
    """Outlines with their aspects; the cube's also with the round corners that blur gives it."""
    axis = torch.linspace(-1.2, 1.2, 97, dtype=torch.float64)
    x, y = axis[None, :].expand(97, 97), axis[:, None].expand(97, 97)
    solids: list[tuple[Shape, Tensor]] = [(shape, outline(shape, x, y) < 0) for shape in SHAPES]
    templates = []
    for shape, inside in (*solids, ("cube", x.abs() ** _ROUNDING + y.abs() ** _ROUNDING < 1)):
        rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
        cut = inside[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
        templates.append((shape, _resize(cut.double().numpy()), math.log(cut.shape[1] / cut.shape[0])))
    return tuple(templates)


def _resize(mask: _Map) -> _Map:
    picture = Image.fromarray(mask.astype(np.float32))
    return np.asarray(picture.resize((_TEMPLATE, _TEMPLATE), Image.Resampling.BILINEAR), dtype=np.float64)
