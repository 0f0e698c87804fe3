"""The geometry of a FLUX transformer that benchmarks can be tried on in milliseconds."""

from benchmarks import _flux as flux

TINY = flux.Geometry(
    double_blocks=1,
    single_blocks=2,
    heads=2,
    head_channels=16,
    text_channels=24,
    pooled_channels=20,
    base_tokens=12,
    region_tokens=4,
)
