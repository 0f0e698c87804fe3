"""Models behind an OpenAI-compatible server: messages, requests, retries, token counts."""
