"""Which pairs are worth learning from: filters, each explaining itself, combined with ``&``, ``|`` and ``~``."""

from artaug.filtering.algebra import PairFilter, judged
from artaug.filtering.calibration import Calibration, calibrate
from artaug.filtering.candidates import BestOf
from artaug.filtering.gates import Floor, Gain, TopFraction
from artaug.filtering.several import ParetoGain, Similarity

__all__ = [
    "BestOf",
    "Calibration",
    "Floor",
    "Gain",
    "PairFilter",
    "ParetoGain",
    "Similarity",
    "TopFraction",
    "calibrate",
    "judged",
]
