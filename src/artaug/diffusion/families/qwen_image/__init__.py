"""Qwen-Image: a vision-language model as text encoder, classifier-free guidance in two calls."""
