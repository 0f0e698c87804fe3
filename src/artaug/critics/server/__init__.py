"""Critics whose model runs behind an OpenAI-compatible server: the critic, its HTTP client, retries and token counts."""
