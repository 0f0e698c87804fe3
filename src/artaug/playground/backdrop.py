"""Backdrops behind the things: sky, hills, ground, sun, moon, stars, clouds and snow, in OKLab.

They are well lit and as colourful as they get; their chroma stays low, so that chroma alone separates things from them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from artaug.playground.world import SETTINGS, Setting

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
class Daylight:
    """The settings of a batch and the direction their light comes from."""

    setting: Tensor
    """Index into `SETTINGS`, one per picture."""
    direction: Tensor
    """Unit vectors towards the light, batch x 3: right, down, to the viewer."""


def daylight(settings: Sequence[Setting], generator: torch.Generator) -> Daylight:
    """Choose the light: high from the left by day, from the moon's side at night, low at sunset."""
    setting = torch.tensor([SETTINGS.index(name) for name in settings], dtype=torch.long)
    side = torch.tensor([-0.55, -0.7, 0.5, -0.3])[setting]
    height = torch.tensor([-0.6, -0.4, -0.6, -0.7])[setting]
    jitter = torch.rand(2, len(settings), generator=generator) * 0.3 - 0.15
    direction = torch.stack([side + jitter[0], height + jitter[1], torch.full_like(side, 0.65)], dim=1)
    return Daylight(setting, direction / direction.norm(dim=1, keepdim=True))


def backdrop(light: Daylight, *, size_px: int, generator: torch.Generator) -> Tensor:
    """Paint the settings: batch x 3 x size x size."""
    count = len(light.setting)
    axis = (torch.arange(size_px) + 0.5) / size_px  # pixel centres, relative to the picture
    y = axis.view(1, size_px, 1).expand(count, size_px, size_px)
    wave = torch.rand(2, count, 1, generator=generator) * (2 * math.pi)
    near = _HORIZON + 0.02 * torch.sin(2 * math.pi * 0.9 * axis + wave[0])
    far = _HORIZON - 0.045 + 0.03 * torch.sin(2 * math.pi * 1.6 * axis + wave[1])
    zenith, horizon, hills, back, front = _palette(light.setting).unbind(1)
    lab = _blend(zenith, horizon, (y / _HORIZON).clamp(0, 1) ** 1.2)
    lab = _add_lights(lab, light.setting, axis, generator)
    lab = _cover(lab, hills, ((y - far[:, None, :]) * size_px + 0.5).clamp(0, 1))
    ground = _blend(back, front, ((y - _HORIZON) / (1 - _HORIZON)).clamp(0, 1))
    inside = ((y - near[:, None, :]) * size_px + 0.5).clamp(0, 1)[:, None]
    lab = lab + (ground - lab) * inside
    return _add_snow(lab, light.setting, axis, generator)


def _palette(setting: Tensor) -> Tensor:
    table = torch.tensor(_PALETTES)
    lightness, chroma, hue = table.unbind(-1)
    angle = hue * (math.pi / 180)
    return torch.stack([lightness, chroma * angle.cos(), chroma * angle.sin()], dim=-1)[setting]


def _blend(start: Tensor, end: Tensor, amount: Tensor) -> Tensor:
    """Interpolate colours (batch, 3) by an amount (batch, height, width): (batch, 3, height, width)."""
    return start[:, :, None, None] + (end - start)[:, :, None, None] * amount[:, None]


def _cover(lab: Tensor, color: Tensor, amount: Tensor) -> Tensor:
    return lab + (color[:, :, None, None] - lab) * amount[:, None]


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


def _add_snow(lab: Tensor, setting: Tensor, axis: Tensor, generator: torch.Generator) -> Tensor:
    flakes = torch.rand(3, len(setting), _SPECKS, generator=generator)
    size = 0.013 + 0.008 * flakes[2]
    white = _dots(axis, flakes[0], flakes[1], size, size).clamp(max=1) * (setting == 3)[:, None, None]
    lightness = lab[:, 0] + (0.97 - lab[:, 0]) * white
    return torch.cat([lightness[:, None], lab[:, 1:]], dim=1)
