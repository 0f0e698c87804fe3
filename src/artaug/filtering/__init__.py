"""Which pairs are worth learning from: filters, each explaining itself, combined with ``&``, ``|`` and ``~``."""

from artaug.filtering.algebra import PairFilter, judged
from artaug.filtering.calibration import Calibration, calibrate
from artaug.filtering.candidates import BestOf
from artaug.filtering.decisions import pair_digest
from artaug.filtering.gates import Floor, Gain, TopFraction
from artaug.filtering.human import HumanQueue, HumanVerdicts, Standing
from artaug.filtering.several import ParetoGain, Similarity

__all__ = [
    "BestOf",
    "Calibration",
    "Floor",
    "Gain",
    "HumanQueue",
    "HumanVerdicts",
    "PairFilter",
    "ParetoGain",
    "Similarity",
    "Standing",
    "TopFraction",
    "calibrate",
    "judged",
    "pair_digest",
]
