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

from artaug._internal.annotations import checked
from artaug.playground import oklab
from artaug.playground.shapes import surface
from artaug.playground.world import (
    ADJECTIVES,
    COLORS,
    PLACES,
    SETTINGS,
    SHAPES,
    Adjective,
    Scene,
    Setting,
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

_SPECKS = 16
_CLOUDS = 3

# Lightness, chroma and hue of zenith, horizon, far hills, near ground, front ground; by setting.
_PALETTES = (
    ((0.66, 0.040, 245), (0.82, 0.020, 235), (0.62, 0.030, 160), (0.60, 0.038, 130), (0.50, 0.040, 130)),
    ((0.48, 0.040, 320), (0.82, 0.036, 60), (0.50, 0.030, 340), (0.52, 0.028, 45), (0.42, 0.028, 40)),
    ((0.24, 0.040, 275), (0.46, 0.036, 270), (0.33, 0.030, 275), (0.38, 0.030, 260), (0.32, 0.026, 260)),
    ((0.62, 0.022, 250), (0.76, 0.012, 240), (0.70, 0.016, 245), (0.84, 0.010, 240), (0.74, 0.018, 250)),
)
_HORIZON = 0.56


@dataclass(frozen=True)
class _Daylight:
    """The settings of a batch and the direction their light comes from."""

    setting: Tensor
    """Index into `SETTINGS`, one per picture."""
    direction: Tensor
    """Unit vectors towards the light, batch x 3: right, down, to the viewer."""


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


@checked
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
    light = _daylight([scene.setting for scene in scenes if scene.setting], generator)
    lab = _backdrop(light, generator)
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


def _daylight(settings: Sequence[Setting], generator: torch.Generator) -> _Daylight:
    """Choose the light: high from the left by day, from the moon's side at night, low at sunset."""
    setting = torch.tensor([SETTINGS.index(name) for name in settings], dtype=torch.long)
    side = torch.tensor([-0.55, -0.7, 0.5, -0.3])[setting]
    height = torch.tensor([-0.6, -0.4, -0.6, -0.7])[setting]
    jitter = torch.rand(2, len(settings), generator=generator) * 0.3 - 0.15
    direction = torch.stack([side + jitter[0], height + jitter[1], torch.full_like(side, 0.65)], dim=1)
    return _Daylight(setting, direction / direction.norm(dim=1, keepdim=True))


def _backdrop(light: _Daylight, generator: torch.Generator) -> Tensor:
    """Paint the settings, well lit and colourful, with a chroma that stays below any thing's: batch x 3 x 64 x 64."""
    count = len(light.setting)
    axis = (torch.arange(SIZE_PX) + 0.5) / SIZE_PX  # pixel centres, relative to the picture
    y = axis.view(1, SIZE_PX, 1).expand(count, SIZE_PX, SIZE_PX)
    wave = torch.rand(2, count, 1, generator=generator) * (2 * math.pi)
    near = _HORIZON + 0.02 * torch.sin(2 * math.pi * 0.9 * axis + wave[0])
    far = _HORIZON - 0.045 + 0.03 * torch.sin(2 * math.pi * 1.6 * axis + wave[1])
    lightness, chroma, hue = torch.tensor(_PALETTES).unbind(-1)
    angle = hue * (math.pi / 180)
    palettes = torch.stack([lightness, chroma * angle.cos(), chroma * angle.sin()], dim=-1)
    zenith, horizon, hills, back, front = palettes[light.setting].unbind(1)
    lab = _blend(zenith, horizon, (y / _HORIZON).clamp(0, 1) ** 1.2)
    lab = _add_lights(lab, light.setting, axis, generator)
    inside = ((y - far[:, None, :]) * SIZE_PX + 0.5).clamp(0, 1)[:, None]
    lab = lab + (hills[:, :, None, None] - lab) * inside
    ground = _blend(back, front, ((y - _HORIZON) / (1 - _HORIZON)).clamp(0, 1))
    inside = ((y - near[:, None, :]) * SIZE_PX + 0.5).clamp(0, 1)[:, None]
    lab = lab + (ground - lab) * inside
    flakes = torch.rand(3, count, _SPECKS, generator=generator)
    size = 0.013 + 0.008 * flakes[2]
    snow = _dots(axis, flakes[0], flakes[1], size, size).clamp(max=1) * (light.setting == 3)[:, None, None]
    lightness = lab[:, 0] + (0.97 - lab[:, 0]) * snow
    return torch.cat([lightness[:, None], lab[:, 1:]], dim=1)


def _blend(start: Tensor, end: Tensor, amount: Tensor) -> Tensor:
    """Interpolate colours (batch, 3) by an amount (batch, height, width): (batch, 3, height, width)."""
    return start[:, :, None, None] + (end - start)[:, :, None, None] * amount[:, None]


def _dots(axis: Tensor, x: Tensor, y: Tensor, width: Tensor, height: Tensor) -> Tensor:
    """Add up soft ellipses; centres and radii are batch x dots, relative to the picture."""
    across = torch.exp(-(((axis - x[..., None]) / width[..., None]) ** 2))
    down = torch.exp(-(((axis - y[..., None]) / height[..., None]) ** 2))
    return torch.einsum("bny,bnx->byx", down, across)


def _add_lights(lab: Tensor, setting: Tensor, axis: Tensor, generator: torch.Generator) -> Tensor:
    """Add what is in the sky: clouds at noon, the sun at sunset, moon and stars at night."""
    count = len(setting)
    jitter = torch.rand(2, count, generator=generator) * 0.08 - 0.04
    noon, sunset, night, _ = ((setting == kind)[:, None, None] for kind in range(4))
    where = torch.tensor([[0.5, 2.0], [0.3, 0.44], [0.8, 0.16], [0.5, 2.0]])[setting]
    x, y = where[:, 0] + jitter[0], where[:, 1] + jitter[1] * 0.6
    distance = ((axis.view(1, 1, -1) - x[:, None, None]) ** 2 + (axis.view(1, -1, 1) - y[:, None, None]) ** 2).sqrt()
    glow = torch.exp(-((distance / 0.3) ** 1.5)) * 0.12 * sunset + torch.exp(-((distance / 0.2) ** 1.5)) * 0.10 * night
    crescent = (
        (axis.view(1, 1, -1) - x[:, None, None] + 0.035) ** 2 + (axis.view(1, -1, 1) - y[:, None, None]) ** 2
    ).sqrt()
    disc = ((0.085 - distance) * len(axis) + 0.5).clamp(0, 1) * (sunset | night)
    disc = disc * torch.where(night, ((crescent - 0.07) * len(axis) + 0.5).clamp(0, 1), torch.ones_like(crescent))
    specks = torch.rand(3, count, _SPECKS, generator=generator)
    radius = 0.009 + 0.006 * specks[2]
    stars = _dots(axis, specks[0], specks[1] * 0.42, radius, radius).clamp(max=1) * night * 0.5
    puffs = torch.rand(3, count, _CLOUDS, generator=generator)
    clouds = _dots(axis, puffs[0], 0.1 + 0.22 * puffs[1], 0.1 + 0.1 * puffs[2], 0.03 + 0.02 * puffs[2])
    clouds = clouds.clamp(max=1) * noon * 0.7
    lightness = lab[:, 0] + glow + stars
    lightness = lightness + (0.94 - lightness) * torch.maximum(disc, clouds)
    color = lab[:, 1:] * (1 - torch.maximum(clouds * 0.8, disc * 0.5))[:, None]
    return torch.cat([lightness[:, None], color], dim=1)


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
