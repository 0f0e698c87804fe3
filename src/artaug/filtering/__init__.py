"""Filters that decide which pairs to train on, each with a reason; combined with ``&``, ``|`` and ``~``."""

from artaug.filtering.algebra import PairFilter, judge_pairs
from artaug.filtering.calibration import Calibration, calibrate
from artaug.filtering.candidates import BestOf
from artaug.filtering.multi import ParetoGain, Similarity
from artaug.filtering.preferred import Preferred
from artaug.filtering.thresholds import Floor, Gain, TopFraction

__all__ = [
    "BestOf",
    "Calibration",
    "Floor",
    "Gain",
    "PairFilter",
    "ParetoGain",
    "Preferred",
    "Similarity",
    "TopFraction",
    "calibrate",
    "judge_pairs",
]
