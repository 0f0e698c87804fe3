"""Scorers: each gives a picture a number, higher is better. Models are loaded by ``from_pretrained``, not by the import."""

from artaug.scorers.aesthetic import AestheticScore
from artaug.scorers.clip import ClipScore, SiglipScore
from artaug.scorers.clip_colors import ClipColors
from artaug.scorers.clip_iqa import ClipIQA
from artaug.scorers.concept import ConceptProbability
from artaug.scorers.encoders import DualEncoder, ImageEncoder
from artaug.scorers.function import FunctionScorer
from artaug.scorers.hps import HPSv2, Letterbox
from artaug.scorers.image_reward import ImageReward
from artaug.scorers.loading import LoadOptions
from artaug.scorers.openai import OpenAIRubricScore, OpenAIVQAScore
from artaug.scorers.photometric import Chroma, Contrast, Exposure, MeanOf, Photometric, Sharpness
from artaug.scorers.pickscore import PickScore
from artaug.scorers.safety import SafetyMargin
from artaug.scorers.vqa import VQAScore

__all__ = [
    "AestheticScore",
    "Chroma",
    "ClipColors",
    "ClipIQA",
    "ClipScore",
    "ConceptProbability",
    "Contrast",
    "DualEncoder",
    "Exposure",
    "FunctionScorer",
    "HPSv2",
    "ImageEncoder",
    "ImageReward",
    "Letterbox",
    "LoadOptions",
    "MeanOf",
    "OpenAIRubricScore",
    "OpenAIVQAScore",
    "Photometric",
    "PickScore",
    "SafetyMargin",
    "Sharpness",
    "SiglipScore",
    "VQAScore",
]
