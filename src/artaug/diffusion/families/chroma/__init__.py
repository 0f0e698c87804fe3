"""Chroma: FLUX.1's transformer with T5 alone, masked padding and classifier-free guidance."""
