"""FLUX.2 and FLUX.2 Klein: one language model as text encoder, four-axis rotary positions."""
