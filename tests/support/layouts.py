"""Hypothesis strategies for regional layouts: regions on a grid, the sequence around it, and an isolation."""

from dataclasses import dataclass

import torch
from hypothesis import assume, reject
from hypothesis import strategies as st

import artaug as aa
from artaug.regional.attention_mask import joint_mask
from artaug.regional.denoiser import Span
from artaug.regional.region_weights import split_grid
from support.strategies import boxes, masks

areas = boxes() | masks() | st.just(aa.Box(0, 0, 1, 1))
hard_areas = st.sampled_from([aa.Box(x / 4, y / 4, 1, 1) for x in range(4) for y in range(4)])
isolations = st.builds(
    aa.Isolation,
    image_to_image=st.sampled_from(["open", "background", "regions"]),
    image_to_text=st.sampled_from(["open", "regions"]),
    text_to_image=st.sampled_from(["open", "regions"]),
    text_to_text=st.sampled_from(["open", "own"]),
    base_weight=st.sampled_from([0.0, 0.2, 1.0]),
)


@dataclass(frozen=True)
class Layout:
    """Regions of one picture, and the sequence that holds their prompts and the image tokens."""

    grid: tuple[int, int]
    regions: tuple[aa.Region, ...]
    spans: tuple[Span, ...]
    isolation: aa.Isolation
    overlap: str

    @property
    def region_weights(self):
        try:
            return split_grid(self.regions, self.grid, base_weight=self.isolation.base_weight, overlap=self.overlap)
        except aa.GuideError:  # a region that covers next to nothing
            reject()

    @property
    def mask(self):
        return joint_mask(self.spans, self.region_weights, self.isolation)


@st.composite
def layouts(draw, *, hard=False, max_regions=16):
    """Odd grids, overlaps, full cover, soft weights, none to many regions, prompts before or behind the image."""
    grid = (4, 8) if hard else draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    weights = st.just(1.0) if hard else st.floats(0.1, 4)
    feathers = st.just(0.0) if hard else st.sampled_from([0.0, 0.1])
    region = st.builds(aa.Region, hard_areas if hard else areas, st.just("a"), weight=weights, feather=feathers)
    regions = tuple(draw(st.lists(region, max_size=max_regions)))
    overlap = "over" if hard else draw(st.sampled_from(["share", "over"]))
    isolation = draw(isolations)
    if hard:
        assume(isolation.base_weight != 0.2)
    texts = [Span("text", draw(st.integers(1, 5)), prompt) for prompt in range(len(regions) + 1)]
    image = [Span("image", grid[0] * grid[1])]
    others = draw(st.lists(st.sampled_from([Span("padding", 2), Span("reference", 3)]), max_size=2, unique=True))
    spans = draw(st.sampled_from([[*texts, *others, *image], [*image, *others, *texts]]))
    return Layout(grid, regions, tuple(spans), isolation, overlap)


@dataclass(frozen=True)
class Batch:
    """Rows whose layouts differ: other regions and prompts, on one grid, in sequences of one length."""

    rows: tuple[Layout, ...]

    @property
    def masks(self):
        return [row.mask for row in self.rows]


@st.composite
def batches(draw):
    grid = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    isolation = draw(isolations)
    region = st.builds(aa.Region, areas, st.just("a"), weight=st.floats(0.1, 4), feather=st.sampled_from([0.0, 0.1]))
    regions = draw(st.lists(st.lists(region, max_size=4), min_size=2, max_size=3))
    lengths = [draw(st.lists(st.integers(1, 4), min_size=len(row), max_size=len(row))) for row in regions]
    own = draw(st.integers(1, 5))
    longest = max(sum(row) for row in lengths)
    rows = []
    for row, row_lengths in zip(regions, lengths, strict=True):
        texts = [Span("text", length, number) for number, length in enumerate(row_lengths, start=1)]
        padding = [Span("padding", longest - sum(row_lengths))] if longest > sum(row_lengths) else []
        spans = (*texts, *padding, Span("text", own), Span("image", grid[0] * grid[1]))
        rows.append(Layout(grid, tuple(row), spans, isolation, "share"))
    return Batch(tuple(rows))


def random_tokens(count, *, seed=0, batch=1, dtype=torch.float32):
    """Random queries, keys or values: two heads of eight channels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, count, 8, generator=generator, dtype=dtype)


def random_qkv(mask, *, seed=0, batch=1):
    """Random query, key and value for a mask."""
    counts = len(mask.weights), len(mask.groups), len(mask.groups)
    return tuple(random_tokens(count, seed=seed + number, batch=batch) for number, count in enumerate(counts))


def reference_attention(query, key, value, mask):
    """The definition in five lines: a softmax with weights, term by term, in double precision."""
    scores = (query.double() @ key.double().mT) / query.shape[-1] ** 0.5
    weights = mask.weights.double()[:, mask.groups]
    terms = (scores - scores.amax(dim=-1, keepdim=True)).exp() * weights
    return (terms / terms.sum(dim=-1, keepdim=True)) @ value.double()
