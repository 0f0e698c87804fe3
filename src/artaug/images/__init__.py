"""Measuring and showing images: similarity, photometry, HTML."""
