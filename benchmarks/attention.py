"""The seconds of single operations of regional attention, kernel beside kernel: where a price that is off comes from."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

import artaug as aa
from artaug.regional import ELIGEN
from artaug.regional.attention import attention_with_lse, split_attention
from artaug.regional.attention_costs import TILE, AttentionShape, costs_on
from artaug.regional.attention_mask import GroupMask, joint_mask
from artaug.regional.denoiser import Span
from artaug.regional.flex import FlexMask, masked_flex_attention
from artaug.regional.region_weights import split_grid
from artaug.regional.split_plan import plan_splits
from benchmarks import _flux as flux
from benchmarks import _memory as memory
from benchmarks import _record as record

Work = Callable[[], object]

_SAMPLES = 5
_SECONDS_OF_A_SAMPLE = 0.02
_LONG = 8192
"""Tokens above which there are no masks a row, and no backward passes, which hold scores in memory."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The attention layer whose operations are timed."""

    device: str
    dtype: torch.dtype
    heads: int
    head_channels: int
    base_tokens: int
    """Tokens of a prompt."""
    region_tokens: int
    """Tokens of a region's prompt."""

    @classmethod
    def of(cls, geometry: flux.Geometry) -> "Layer":
        """The layers of a transformer."""
        return cls(
            device=geometry.device,
            dtype=geometry.dtype,
            heads=geometry.heads,
            head_channels=geometry.head_channels,
            base_tokens=geometry.base_tokens,
            region_tokens=geometry.region_tokens,
        )

    def random(self, batch: int, tokens: int) -> Tensor:
        """(batch, heads, tokens, channels), laid out in memory as a transformer's projections are."""
        shape = (batch, tokens, self.heads, self.head_channels)
        return torch.randn(shape, device=self.device, dtype=self.dtype).transpose(1, 2)

    def flops(self, batch: int, queries: int, keys: int) -> int:
        """Of queries times keys and weights times values."""
        return 4 * batch * self.heads * self.head_channels * queries * keys


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured: each entry is a point."""

    squares: Sequence[tuple[int, int]]
    """(batch, tokens) of attention among all tokens, plain and masked."""
    pieces: Sequence[tuple[int, int]]
    """(queries, keys) of the attentions that a split plan consists of."""
    layouts: Sequence[tuple[int, int]]
    """(side of the image in tokens, regions) of whole layouts."""
    backward: bool = False
    """Whether a backward pass is timed, too."""


ON_GPU = Sizes(
    squares=((1, 320), (4, 320), (16, 320), (1, 1536), (4, 1536), (1, 4608), (4, 4608), (1, 16896)),
    pieces=((4096, 32), (4096, 512), (1024, 32), (1024, 512), (1024, 4096), (512, 4608), (32, 4608), (256, 128)),
    layouts=((64, 4), (128, 4)),
    backward=True,
)
ON_CPU = Sizes(
    squares=((1, 96), (4, 96), (16, 96), (1, 384), (4, 384), (1, 1152), (1, 4224)),
    pieces=((1024, 32), (1024, 128), (256, 32), (256, 128), (256, 1024), (128, 1152), (32, 1152)),
    layouts=((16, 3), (32, 1), (32, 4), (32, 16)),
    backward=True,
)
QUICK = Sizes(squares=((1, 96), (2, 384)), pieces=((256, 32), (128, 384)), layouts=((16, 3),))


def measure(*, quick: bool) -> Iterator[record.Row]:
    """Time the operations that regional attention consists of, one at a time.

    With CUDA the layer is FLUX.1-dev's in bfloat16, else that of the scaled-down FLUX in float32 and bfloat16.
    ``seconds`` is the median of samples, each of as many calls in a row as take 20 ms, without waiting in between: so on a
    GPU it is the time of the kernels, or of launching them where that takes longer. ``first_seconds`` is the first call,
    in which a kernel is compiled or chosen. A kernel that a device or a version of torch does not have leaves its ``error``.
    """
    if torch.cuda.is_available():
        yield from measure_layer(Layer.of(flux.FLUX_DEV), QUICK if quick else ON_GPU)
        return
    for dtype in (torch.float32, torch.bfloat16):
        yield from measure_layer(Layer.of(replace(flux.SCALED_DOWN, dtype=dtype)), QUICK if quick else ON_CPU)


def measure_layer(layer: Layer, sizes: Sizes, *, flex: bool = True) -> Iterator[record.Row]:
    """The rows of one layer."""
    one = torch.zeros(1, device=layer.device)
    yield from timed(layer, {"launch": lambda: one + 1}, batch=1, queries=1, keys=0)
    for batch, tokens in sizes.squares:
        yield from square_rows(layer, batch, tokens, backward=sizes.backward)
        yield from token_rows(layer, batch, tokens)
    for queries, keys in sizes.pieces:
        works = kernels_with_lse(layer, layer.random(1, queries), layer.random(1, keys))
        yield from timed(layer, works, batch=1, queries=queries, keys=keys)
    for side, regions in sizes.layouts:
        yield from layout_rows(layer, side, regions, flex=flex, backward=sizes.backward)


def square_rows(layer: Layer, batch: int, tokens: int, *, backward: bool) -> Iterator[record.Row]:
    """Attention among all tokens: plain, under one mask for all rows, under a mask a row, and with its log-sum-exp."""
    query = layer.random(batch, tokens)
    attend = partial(functional.scaled_dot_product_attention, query, query, query)
    works: dict[str, Work] = {"plain": attend, **kernels_with_lse(layer, query, query)}
    bias = torch.zeros(1, 1, tokens, tokens, device=layer.device, dtype=layer.dtype)
    bias[..., ::3] = -torch.inf
    works["masked"] = partial(attend, attn_mask=bias)
    if batch > 1 and tokens <= _LONG:
        works["masked rows"] = partial(attend, attn_mask=bias.repeat(batch, 1, 1, 1))
    if backward and tokens <= _LONG:
        masked = partial(functional.scaled_dot_product_attention, attn_mask=bias)
        works["plain, backward"] = with_backward(functional.scaled_dot_product_attention, query)
        works["masked, backward"] = with_backward(masked, query)
    yield from timed(layer, works, batch=batch, queries=tokens, keys=tokens)


def kernels_with_lse(layer: Layer, query: Tensor, key: Tensor) -> dict[str, Work]:
    """The kernels that return a log-sum-exp, by name: the one in use, and on a GPU the others."""
    works: dict[str, Work] = {"with lse": partial(attention_with_lse, query, key, key)}
    if layer.device == "cuda":
        aten = torch.ops.aten
        others = {
            "with lse, efficient": aten._scaled_dot_product_efficient_attention,  # noqa: SLF001
            "with lse, cudnn": aten._scaled_dot_product_cudnn_attention,  # noqa: SLF001
        }
        works |= {name: partial(kernel, query, key, key, None, True) for name, kernel in others.items()}
    return works


def token_rows(layer: Layer, batch: int, tokens: int) -> Iterator[record.Row]:
    """What is done to tokens beside attention: every other one gathered and scattered, results merged, a linear layer."""
    source, out = layer.random(batch, tokens), layer.random(batch, tokens)
    half = torch.arange(0, tokens, 2, device=layer.device)
    part = source[:, :, ::2].contiguous()
    yield from timed(
        layer,
        {
            "gather": partial(source.index_select, 2, half),
            "scatter": partial(out.__setitem__, (slice(None), slice(None), half), part),
        },
        batch=batch,
        queries=len(half),
        keys=0,
    )
    lse, lse_part = torch.rand(2, batch, layer.heads, tokens, device=layer.device)
    channels = layer.heads * layer.head_channels
    weight = torch.randn(4 * channels, channels, device=layer.device, dtype=layer.dtype)
    flat = torch.randn(batch, tokens, channels, device=layer.device, dtype=layer.dtype)
    yield from timed(
        layer,
        {"merge": partial(merge, out, source, lse, lse_part), "linear": partial(functional.linear, flat, weight)},
        batch=batch,
        queries=tokens,
        keys=0,
    )


def merge(out: Tensor, part: Tensor, lse: Tensor, lse_part: Tensor) -> tuple[Tensor, Tensor]:
    """Two results and their log-sum-exps made one, as `split_attention` does."""
    fraction = torch.sigmoid(lse_part - lse).unsqueeze(-1).to(part.dtype)
    return torch.lerp(out, part, fraction), torch.logaddexp(lse, lse_part)


def layout_rows(layer: Layer, side: int, regions: int, *, flex: bool, backward: bool) -> Iterator[record.Row]:
    """A whole layer by every method; ``density`` is the share of tiles of 128 x 128 scores that flex computes."""
    mask = mask_of(layer, side, regions)
    tokens = len(mask.groups)
    query = layer.random(1, tokens)
    attend = partial(functional.scaled_dot_product_attention, query, query, query)
    works: dict[str, Work] = {"layout plain": attend, "layout dense": partial(attend, attn_mask=mask.bias.to(query))}
    notes: dict[str, record.Row] = {}
    shape = AttentionShape.of(query, layers=1, drawings=1)
    price = partial(costs_on(query.device, query.dtype).split_seconds, shape=shape)
    for method in ("merged", "grouped"):
        splits = plan_splits([mask], method, price).splits(query.device, query.dtype)
        split = partial(split_attention, splits=splits)
        names = [f"layout {method}"]
        works[names[0]] = partial(split, query, query, query)
        if backward and method == "merged" and tokens <= _LONG:
            names.append(f"layout {method}, backward")
            works[names[1]] = with_backward(split, query)
        notes |= {name: {"splits": len(splits)} for name in names}
    if flex:
        start = time.perf_counter()
        flex_mask = FlexMask.of([mask], query.device)
        notes["layout flex"] = {"density": tile_density(flex_mask), "prepare_seconds": time.perf_counter() - start}
        works["layout flex"] = partial(masked_flex_attention, query, query, query, flex_mask, compiled=True)
    torch.compiler.reset()  # so that no kernel of an earlier layout or run is free
    with torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
        for row in timed(layer, works, batch=1, queries=tokens, keys=tokens):
            yield {**row, "regions": regions, **notes.get(row["operation"], {})}


def mask_of(layer: Layer, side: int, regions: int) -> GroupMask:
    """The mask of a layer of joint attention for boxes along the token grid."""
    areas = tuple(aa.Region(box, "a") for box in flux.boxes(regions, side=side))
    prompts = [Span("text", layer.region_tokens, number + 1) for number in range(regions)]
    spans = (Span("text", layer.base_tokens), *prompts, Span("image", side**2))
    return joint_mask(spans, split_grid(areas, (side, side), base_weight=ELIGEN.base_weight), ELIGEN)


def tile_density(mask: FlexMask) -> float:
    """The share of tiles that are computed."""
    padded = -(-mask.query_order.shape[1] // TILE) * -(-mask.key_order.shape[1] // TILE)
    return mask.num_tiles / padded


def with_backward(attend: Callable[..., Tensor], tokens: Tensor) -> Work:
    """A forward and a backward pass of attention among tokens."""
    inputs = [tokens.detach().clone().requires_grad_() for _ in range(3)]
    gradient = torch.randn_like(tokens)

    def work() -> object:
        return torch.autograd.grad(attend(*inputs), inputs, gradient)

    return work


def timed(layer: Layer, works: Mapping[str, Work], *, batch: int, queries: int, keys: int) -> Iterator[record.Row]:
    """A row for each operation on the same tokens, their samples interleaved."""
    first, calls, flops = dict[str, float](), dict[str, int](), layer.flops(batch, queries, keys)
    point = {
        "dtype": str(layer.dtype).removeprefix("torch."),
        "batch": batch,
        "queries": queries,
        "keys": keys,
        "channels": layer.heads * layer.head_channels,
    }
    for name, work in works.items():
        try:
            first[name] = seconds_of(work, calls=1)
        except (RuntimeError, NotImplementedError) as error:  # a kernel that this device or these sizes do not have
            yield {"operation": name, **point, "error": str(error)[:300]}
            continue
        calls[name] = max(1, int(_SECONDS_OF_A_SAMPLE / max(seconds_of(work, calls=2), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in first}
    for _ in range(_SAMPLES):
        for name, timings in samples.items():
            timings.append(seconds_of(works[name], calls=calls[name]))
    for name, timings in samples.items():
        yield {
            "operation": name,
            **point,
            "seconds": median(timings),
            "seconds_low": min(timings),
            "seconds_high": max(timings),
            "first_seconds": first[name],
            "flops": flops,
            "tflops_per_second": flops / median(timings) / 1e12,
        }


def seconds_of(work: Work, *, calls: int) -> float:
    """Seconds of a call, the mean of several in a row."""
    memory.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    memory.synchronize()
    return (time.perf_counter() - start) / calls


def plot(rows: Sequence[record.Row]) -> Figure:
    """Seconds over the number of scores (of tokens, where there are none): a line for every operation."""
    figure = Figure(figsize=(11, 4))
    panels = {"attention": True, "other operations": False}
    for place, (title, attends) in enumerate(panels.items()):
        axes = figure.add_subplot(1, 2, place + 1, title=title, xscale="log", yscale="log", ylabel="seconds")
        axes.set_xlabel("pictures x queries x keys" if attends else "pictures x tokens")
        shown = [row for row in rows if bool(row["keys"]) == attends and "seconds" in row]
        for operation, dtype in dict.fromkeys((row["operation"], row["dtype"]) for row in shown):
            line = sorted(
                (row["batch"] * row["queries"] * (row["keys"] or 1), row["seconds"])
                for row in shown
                if (row["operation"], row["dtype"]) == (operation, dtype)
            )
            axes.plot(*zip(*line, strict=True), marker=".", label=f"{operation}, {dtype}")
        axes.legend(fontsize=5)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    record.run("attention", measure, plot)
