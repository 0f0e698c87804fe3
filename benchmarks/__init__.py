"""Benchmarks: each module runs alone as ``python -m benchmarks.NAME [--quick] [--out DIR]``."""
