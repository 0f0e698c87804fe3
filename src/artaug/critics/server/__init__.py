"""Critics behind a server: the OpenAI-compatible client, its retries and its token counts."""
