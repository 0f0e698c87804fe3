"""Judges: each says which of two pictures answers a prompt better."""

from artaug.judges.openai import OpenAIJudge
from artaug.judges.vlm import VLMJudge

__all__ = ["OpenAIJudge", "VLMJudge"]
