"""Colours in OKLab (Ottosson 2020): perceptual lightness, chroma and hue, to sRGB and back."""

import torch
from torch import Tensor

_LMS_FROM_RGB = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_LAB_FROM_LMS = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)
_LMS_FROM_LAB = (
    (1.0, 0.3963377774, 0.2158037573),
    (1.0, -0.1055613458, -0.0638541728),
    (1.0, -0.0894841775, -1.2914855480),
)
_RGB_FROM_LMS = (
    (4.0767416621, -3.3077115913, 0.2309699292),
    (-1.2684380046, 2.6097574011, -0.3413193965),
    (-0.0041960863, -0.7034186147, 1.7076147010),
)
_BISECTIONS = 6


def from_srgb(rgb: Tensor) -> Tensor:
    """Turn sRGB in [0, 1] into OKLab; channels are the last dimension."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4)
    lms = linear @ rgb.new_tensor(_LMS_FROM_RGB).T
    return lms.clamp(min=0) ** (1 / 3) @ rgb.new_tensor(_LAB_FROM_LMS).T


def to_srgb(lab: Tensor) -> Tensor:
    """Turn OKLab into sRGB in [0, 1]; what sRGB cannot show loses chroma, not hue or lightness."""
    linear = _linear(lab)
    outside = ((linear < 0) | (linear > 1)).any(dim=-1)
    if outside.any():
        linear = linear.clone()
        linear[outside] = _less_chroma(lab[outside])
    linear = linear.clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055)


def _linear(lab: Tensor) -> Tensor:
    lms = (lab @ lab.new_tensor(_LMS_FROM_LAB).T) ** 3
    return lms @ lab.new_tensor(_RGB_FROM_LMS).T


def _less_chroma(lab: Tensor) -> Tensor:
    low, high = torch.zeros_like(lab[..., :1]), torch.ones_like(lab[..., :1])
    lightness = lab[..., :1].clamp(0, 1)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        linear = _linear(torch.cat([lightness, lab[..., 1:] * middle], dim=-1))
        fits = ((linear >= 0) & (linear <= 1)).all(dim=-1, keepdim=True)
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return _linear(torch.cat([lightness, lab[..., 1:] * low], dim=-1))
