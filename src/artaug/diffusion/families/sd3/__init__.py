"""Stable Diffusion 3 and 3.5: three text encoders, joint attention, classifier-free guidance."""
