"""Z-Image: single-stream attention over image and text tokens."""
