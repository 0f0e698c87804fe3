"""The U-Nets, Stable Diffusion 1.5 and SDXL: cross-attention at several resolutions."""
