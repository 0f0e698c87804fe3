"""Critics: they suggest what to improve in a picture, and where."""

from artaug._internal.transient import TransientErrors
from artaug.critics.conversation import Conversation, prompt_text
from artaug.critics.coordinates import FAMILIES, Coordinates, SmartResize, coordinates_for
from artaug.critics.openai import OpenAICritic
from artaug.critics.photometric import PhotometricCritic, PromptVocabulary
from artaug.critics.probing import ProbeResult
from artaug.critics.replies import parse_reply
from artaug.critics.vlm import VLMCritic
from artaug.critics.wrappers import Cached, Ensemble, Retried
from artaug.serving.chat import Message
from artaug.serving.key import ApiKey
from artaug.serving.usage import Usage

__all__ = [
    "FAMILIES",
    "ApiKey",
    "Cached",
    "Conversation",
    "Coordinates",
    "Ensemble",
    "Message",
    "OpenAICritic",
    "PhotometricCritic",
    "ProbeResult",
    "PromptVocabulary",
    "Retried",
    "SmartResize",
    "TransientErrors",
    "Usage",
    "VLMCritic",
    "coordinates_for",
    "parse_reply",
    "prompt_text",
]
