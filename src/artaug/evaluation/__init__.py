"""Evaluation: paired comparisons of synthesizers, benchmark suites, prompt sets and their statistics."""
