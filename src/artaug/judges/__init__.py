"""Judges: each says which of two pictures answers a prompt better."""

from artaug.judges.openai import OpenAIJudge

__all__ = ["OpenAIJudge"]
