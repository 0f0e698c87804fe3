"""Scorers: pictures to numbers, higher is better."""

from artaug.scorers.photometric import Chroma, Contrast, Exposure, MeanOf, Photometric, Sharpness

__all__ = ["Chroma", "Contrast", "Exposure", "MeanOf", "Photometric", "Sharpness"]
