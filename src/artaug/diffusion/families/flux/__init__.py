"""FLUX.1: guidance-distilled, two text encoders, joint attention in double and single blocks."""
