"""The four solids from the front: outline, shading and highlight on a unit square.

Coordinates are relative to the centre and the radius of a thing: x to the right, y down, so that a
thing fills about [-1, 1] in both. Light comes from direction `light`, a unit vector (x, y, z) whose
z points at the viewer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from artaug.playground.world import Shape

TUBE = 0.27
"""Radius of the ring's tube; its hole has radius 1 - 2 * TUBE."""
_FRONT = 0.86
_TOP = -0.52
_BACK = (0.6, -0.95)


@dataclass(frozen=True)
class Surface:
    """The outline and shading of one solid at each point."""

    distance: Tensor
    """Signed distance to the outline in radii, negative inside."""
    light: Tensor
    """Diffuse light in [0, 1]."""
    highlight: Tensor
    """Specular highlight in [0, 1]."""


def surface(shape: Shape, x: Tensor, y: Tensor, light: Tensor) -> Surface:
    """Evaluate a solid at the points (x, y); `light` broadcasts against them in its last dimension."""
    return {"ball": _ball, "cube": _cube, "cone": _cone, "ring": _ring}[shape](x, y, light)


def outline(shape: Shape, x: Tensor, y: Tensor) -> Tensor:
    """Return the signed distance to a solid's outline, in radii, negative inside."""
    return surface(shape, x, y, x.new_tensor([0.0, 0.0, 1.0])).distance


def _lit(normal: tuple[Tensor, Tensor, Tensor], light: Tensor, *, shine: float) -> tuple[Tensor, Tensor]:
    x, y, z = light.unbind(-1)
    facing = normal[0] * x + normal[1] * y + normal[2] * z
    halfway = torch.stack([x, y, z + 1], dim=-1)
    halfway = halfway / halfway.norm(dim=-1, keepdim=True)
    mirrored = sum(part * direction for part, direction in zip(normal, halfway.unbind(-1), strict=True))
    return facing.clamp(min=0), torch.as_tensor(mirrored).clamp(min=0) ** shine


def _ball(x: Tensor, y: Tensor, light: Tensor) -> Surface:
    radius = (x * x + y * y).sqrt()
    facing, highlight = _lit((x, y, (1 - radius**2).clamp(min=0).sqrt()), light, shine=40)
    bounce = 0.14 * y.clamp(min=0)
    return Surface(radius - 1, (0.12 + 0.88 * facing + bounce).clamp(max=1), highlight)


def _cube(x: Tensor, y: Tensor, light: Tensor) -> Surface:
    side = x.abs() - _FRONT
    slope = _FRONT - _BACK[0], _TOP - _BACK[1]
    length = (slope[0] ** 2 + slope[1] ** 2) ** 0.5
    taper = ((x.abs() - _FRONT) * slope[1] + (_TOP - y) * slope[0]) / length
    distance = torch.stack([side, taper, y - 0.95, _BACK[1] - y]).amax(0)
    front = 0.50 + 0.22 * light[..., 0] * x - 0.16 * y
    top = ((_TOP - y) / 0.06 + 0.5).clamp(0, 1)
    edge = torch.exp(-(((y - _TOP) / 0.07) ** 2)) * (side < -0.05)
    return Surface(distance, front * (1 - top) + 0.92 * top, 0.4 * edge)


def _cone(x: Tensor, y: Tensor, light: Tensor) -> Surface:
    width = (0.9 * (y + 1.05) / 1.8).clamp(min=0.02)
    flank = (x.abs() * 1.8 - 0.9 * (y + 1.05)) / (1.8**2 + 0.9**2) ** 0.5
    foot = (((x / 0.9) ** 2 + ((y - 0.72) / 0.24) ** 2).sqrt() - 1) * 0.24
    distance = torch.minimum(torch.maximum(flank, y - 0.72), foot)
    across = (x / width).clamp(-1, 1)
    normal = (0.92 * across, torch.full_like(x, -0.38), 0.92 * (1 - across**2).sqrt())
    facing, highlight = _lit(normal, light, shine=30)
    return Surface(distance, (0.12 + 0.88 * facing).clamp(max=1), 0.8 * highlight * (y > -0.8))


def _ring(x: Tensor, y: Tensor, light: Tensor) -> Surface:
    radius = (x * x + y * y).sqrt().clamp(min=1e-4)
    across = ((radius - (1 - TUBE)) / TUBE).clamp(-1, 1)
    normal = (across * x / radius, across * y / radius, (1 - across**2).sqrt())
    facing, highlight = _lit(normal, light, shine=24)
    return Surface((radius - (1 - TUBE)).abs() - TUBE, (0.15 + 0.85 * facing).clamp(max=1), highlight)
