"""Rendering scenes: the ground truth that a model of this world is trained on and measured against.

A picture without adjectives is dull: dim, pale, blurred and flat. Each adjective improves one of these,
everywhere or around one thing. All colours are OKLab until the last step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from artaug.playground import oklab
from artaug.playground.backdrop import backdrop, daylight
from artaug.playground.shapes import surface
from artaug.playground.world import (
    ADJECTIVES,
    COLORS,
    PLACES,
    SETTINGS,
    SHAPES,
    Adjective,
    Scene,
    Thing,
    is_held_out,
    parse,
)

SIZE_PX = 64

HUES = (25.0, 62.0, 100.0, 145.0, 262.0, 315.0)
"""Hue of each of `COLORS` in OKLab, in degrees."""
_CHROMAS = (0.20, 0.155, 0.16, 0.18, 0.18, 0.19)
_LIGHTNESSES = (0.57, 0.71, 0.85, 0.66, 0.54, 0.52)
_DULL_CHROMA = 0.105
_DULL_LIGHT = 0.58
_BLUR_PX = 1.5
_REACH = (1.25, 1.9)


@dataclass(frozen=True)
class _Style:
    """The strength of each adjective at each pixel, in [0, 1]."""

    vivid: Tensor
    soft: Tensor
    sharp: Tensor
    glow: Tensor

    @classmethod
    def of(cls, adjectives: Sequence[Sequence[Adjective]]) -> "_Style":
        """One row per scene or thing, shaped to broadcast over pictures."""
        flags = torch.tensor([[float(word in words) for word in ADJECTIVES] for words in adjectives])
        return cls(*rearrange(flags, "rows adjectives -> adjectives rows 1 1"))

    def mixed(self, other: "_Style", amount: Tensor) -> "_Style":
        """Interpolate to the other style by an amount in [0, 1]."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Style(*(start + (end - start) * amount for start, end in pairs))


@dataclass(frozen=True)
class _Layer:
    """One thing of some of the scenes, drawn by itself; `rows` are the numbers of these scenes."""

    rows: Tensor
    lab: Tensor
    cover: Tensor
    shadow: Tensor
    halo: Tensor
    reach: Tensor
    style: _Style


def render(caption: str, *, seed: int) -> Image.Image:
    """Draw a caption, 64 by 64 pixels; the seed decides what the caption leaves open.

    >>> from artaug import playground
    >>> playground.render("a red cone on the left at night", seed=0).size
    (64, 64)

    Raises:
        CaptionError: The caption is not one of this world.
    """
    picture = render_batch([parse(caption)], generator=torch.Generator().manual_seed(seed))[0]
    pixels = (
        (rearrange(picture, "channels height width -> height width channels") * 255).round().to(torch.uint8).numpy()
    )
    return Image.fromarray(pixels)


def render_batch(scenes: Sequence[Scene], *, generator: torch.Generator) -> Tensor:
    """Draw many scenes at once: sRGB in [0, 1], batch x 3 x 64 x 64, in float32."""
    scenes = [_complete(scene, generator) for scene in scenes]
    light = daylight([scene.setting for scene in scenes if scene.setting], generator)
    lab = backdrop(light, size_px=SIZE_PX, generator=generator)
    style = _Style.of([scene.adjectives for scene in scenes])
    style = style.mixed(style, lab.new_zeros(len(scenes), SIZE_PX, SIZE_PX))
    slots = range(max(len(scene.things) for scene in scenes))
    layers = [_layer(scenes, slot, light.direction, generator) for slot in slots]
    for layer in layers:
        lab, style = _cast_shadow(lab, style, layer)
    lab = _apply_tone(lab, style)
    for layer in layers:
        lab, style = _composite(lab, style, layer)
    lab = rearrange(_focus(lab, style.sharp), "batch channels height width -> batch height width channels")
    return rearrange(oklab.to_srgb(lab), "batch height width channels -> batch channels height width")


def _complete(scene: Scene, generator: torch.Generator) -> Scene:
    """Choose the setting and the places that a scene leaves open, never a held-out combination."""

    def pick(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    things: list[Thing] = []
    for thing in scene.things:
        occupied = {other.place for other in (*scene.things, *things)}
        free = [place for place in PLACES if place not in occupied]
        options = [Thing(**{**vars(thing), "place": place}) for place in free] if thing.place is None else [thing]
        trained = [option for option in options if not is_held_out(option)] or options
        things.append(trained[pick(len(trained))])
    return Scene(
        things=tuple(things), setting=scene.setting or SETTINGS[pick(len(SETTINGS))], adjectives=scene.adjectives
    )


def _layer(scenes: Sequence[Scene], slot: int, direction: Tensor, generator: torch.Generator) -> _Layer:
    rows = [row for row, scene in enumerate(scenes) if slot < len(scene.things)]
    things = [scenes[row].things[slot] for row in rows]
    crowded = torch.tensor([len(scenes[row].things) > 1 for row in rows])
    jitter = torch.rand(3, len(rows), generator=generator) * 2 - 1
    radius = torch.where(crowded, 9.0 + 0.4 * jitter[0], 11.2 + 0.7 * jitter[0])
    step = torch.where(crowded, 0.305, 0.28) * SIZE_PX
    where = torch.tensor([PLACES.index(thing.place) - 1.0 for thing in things if thing.place])
    centre = SIZE_PX / 2 + where * step + torch.where(crowded, 0.5, 1.3) * jitter[1]
    height = 0.66 * SIZE_PX + 1.2 * jitter[2]
    grid = torch.arange(SIZE_PX) + 0.5
    x = (grid[None, None, :] - centre[:, None, None]) / radius[:, None, None]
    y = (grid[None, :, None] - height[:, None, None]) / radius[:, None, None]
    x, y = torch.broadcast_tensors(x, y)
    style = _Style.of([thing.adjectives for thing in things])
    scene_style = _Style.of([scenes[row].adjectives for row in rows])
    style = _Style(
        *(torch.maximum(a, b) for a, b in zip(vars(style).values(), vars(scene_style).values(), strict=True))
    )
    sun = direction[rows]
    lab, cover = _bodies(things, x, y, sun, radius, style)
    distance = (x * x + y * y).sqrt()
    shade = ((x + 0.35 * sun[:, None, None, 0]) / 1.15) ** 2 + ((y - 0.94) / 0.27) ** 2
    ramp = ((_REACH[1] - distance) / (_REACH[1] - _REACH[0])).clamp(0, 1)
    return _Layer(
        rows=torch.tensor(rows, dtype=torch.long),
        lab=lab,
        cover=cover,
        shadow=torch.exp(-1.3 * shade**1.5),
        halo=torch.exp(-(((distance - 0.8).clamp(min=0) / 0.75) ** 1.5)),
        reach=ramp * ramp * (3 - 2 * ramp),
        style=style,
    )


def _bodies(
    things: Sequence[Thing], x: Tensor, y: Tensor, sun: Tensor, radius: Tensor, style: _Style
) -> tuple[Tensor, Tensor]:
    light, shine, cover = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    for shape in SHAPES:
        chosen = [row for row, thing in enumerate(things) if thing.shape == shape]
        if chosen:
            solid = surface(shape, x[chosen], y[chosen], sun[chosen][:, None, None, :])
            light[chosen], shine[chosen] = solid.light, solid.highlight
            cover[chosen] = (0.5 - solid.distance * radius[chosen][:, None, None]).clamp(0, 1)
    colors = [COLORS.index(thing.color) for thing in things]
    base, chroma, hue = (
        torch.tensor([table[color] for color in colors])[:, None, None] for table in (_LIGHTNESSES, _CHROMAS, HUES)
    )
    depth = 0.26 + 0.16 * style.glow + 0.04 * style.soft
    lightness = base * (1.02 + depth * (light - 0.62)) * (_DULL_LIGHT + (1 - _DULL_LIGHT) * style.soft)
    lightness = lightness + (0.06 + 0.18 * style.glow) * shine * (0.6 + 0.4 * style.soft) + 0.02 * style.glow
    chroma = _DULL_CHROMA + (chroma - _DULL_CHROMA) * style.vivid
    angle = hue * (math.pi / 180)
    return torch.stack(
        [
            torch.minimum(lightness.clamp(min=0.16), 0.06 + 1.1 * base),
            chroma * angle.cos() + 0 * x,
            chroma * angle.sin() + 0 * x,
        ],
        1,
    ), cover


def _cast_shadow(lab: Tensor, style: _Style, layer: _Layer) -> tuple[Tensor, _Style]:
    """Darken the ground under a thing, and give its style to the ground around it."""
    lab = lab.clone()
    weight = 0.24 + 0.14 * layer.style.glow
    lab[layer.rows, 0] *= 1 - weight * layer.shadow
    return lab, _mix_style(style, layer, layer.reach)


def _composite(lab: Tensor, style: _Style, layer: _Layer) -> tuple[Tensor, _Style]:
    """Put a thing in front of what is drawn so far."""
    lab = lab.clone()
    behind = lab[layer.rows]
    glow = layer.style.glow * layer.halo
    warm = torch.stack([0.3 * glow * (0.95 - behind[:, 0]).clamp(min=0), 0.002 * glow, 0.008 * glow], 1)
    front = layer.cover[:, None]
    lab[layer.rows] = (behind + warm) * (1 - front) + layer.lab * front
    return lab, _mix_style(style, layer, layer.cover)


def _mix_style(style: _Style, layer: _Layer, amount: Tensor) -> _Style:
    fields = {name: field.clone() for name, field in vars(style).items()}
    mixed = _Style(**{name: field[layer.rows] for name, field in fields.items()}).mixed(layer.style, amount)
    for name, field in fields.items():
        field[layer.rows] = getattr(mixed, name)
    return _Style(**fields)


def _apply_tone(lab: Tensor, style: _Style) -> Tensor:
    """Turn a well lit, colourful backdrop into what the style leaves of it."""
    mean = lab[:, 0].mean(dim=(1, 2), keepdim=True)
    lightness = mean + (lab[:, 0] - mean) * (0.75 + 0.05 * style.soft + 0.45 * style.glow)
    lightness = lightness * (_DULL_LIGHT + (1 - _DULL_LIGHT) * style.soft)
    color = lab[:, 1:] * (0.5 + 0.5 * style.vivid)[:, None]
    return torch.cat([lightness.clamp(0.05, 0.97)[:, None], color], dim=1)


def _focus(lab: Tensor, sharp: Tensor) -> Tensor:
    """Blur by a Gaussian wherever a picture is not sharp. The blur is separable: one matrix for each axis."""
    axis = torch.arange(float(SIZE_PX))
    kernel = torch.exp(-((axis[:, None] - axis) ** 2) / (2 * _BLUR_PX**2))
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    blurred = kernel @ lab @ kernel.T
    return blurred + (lab - blurred) * sharp[:, None]
