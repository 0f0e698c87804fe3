"""The exact guide: one forward pass a step, with attention that keeps regions and their prompts apart."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

from torch import Tensor, nn

from artaug._internal.annotations import checked
from artaug._internal.modules import outside_graphs, uncompiled
from artaug._internal.text import short_repr
from artaug.errors import GuideError, InvalidValueError
from artaug.lora.lora import LoRA
from artaug.plan import Plan, Region
from artaug.regional.attention_costs import AttentionShape
from artaug.regional.attention_layers import Attended, AttentionLayers, PlainAttention
from artaug.regional.attention_mask import GroupMask, cross_mask, joint_mask, text_mask
from artaug.regional.bias import GroupBias
from artaug.regional.denoiser import AttentionSite, Branches, EncodedPrompt, bind_forward_args
from artaug.regional.guide import Guide
from artaug.regional.guided_call import GuidedCall, GuidedRow
from artaug.regional.guided_run import GuidedRun
from artaug.regional.isolation import Isolation
from artaug.regional.prepared import LayoutCache, Method, PreparedAttention, prepare_attention
from artaug.regional.region_weights import RegionWeights, split_grid
from artaug.regional.token_lora import check_loras, find_lora, token_loras_applied

_PLAIN = PlainAttention()
_PREPARED = LayoutCache(64 << 20)
"""Attention of the layouts drawn last: a loop draws the same ones again and again."""


@checked
@final
@dataclass(frozen=True, kw_only=True)
class RegionalAttention(Guide):
    """Lets every image token attend to the prompts of its regions, in the one forward pass of a step.

    The region prompts join the model's text tokens. The regions and the ``isolation`` say what attends to what, and how
    strongly. This is masked attention, softmax(q k / sqrt(d) + log w) v, with w a weight for each query and group of
    keys; it is computed exactly and without a mask in memory.

    The ``method`` that computes it changes the speed, not the result. Rows of a batch are computed together, whatever their
    layouts, unless it is faster to take one layout after the other:

    - ``"auto"``: the cheapest for the sizes at hand, by a model of their cost that was fitted to measurements. On CUDA it may
      be flex, if that saves more than it takes to compile.
    - ``"grouped"``: one unmasked attention for all queries that attend to the same keys. Refuses soft weights.
    - ``"merged"``: an unmasked attention to what all see alike, and small ones for the rest, averaged by log-sum-exp.
    - ``"flex"``: PyTorch's FlexAttention over sorted tokens. Compiles at first use; on the CPU not for training.
    - ``"dense"``: a mask of queries x keys. The definition; slow and large, except for small pictures.

    >>> import artaug as aa
    >>> aa.RegionalAttention(method="merged").trim_padding
    True
    """

    runs_compiled: ClassVar[bool] = True

    isolation: Isolation | None = None
    """What attends to what; None for the default of the model's family."""
    overlap: Literal["share", "over"] = "share"
    """Where regions overlap: all prompts share the place, or the later region lies over the earlier."""
    trim_padding: bool = True
    """Leave the padding of region prompts out: faster. A model that was trained to see padding draws a little
    differently without it."""
    method: Method = "auto"
    """How to compute it."""
    expected_drawings: int = 100
    """How many drawings of one size are to come, about: ``"auto"`` compiles only what they pay back. It changes no result."""
    loras: Mapping[str, LoRA] = field(default_factory=dict, repr=False, hash=False)
    """The LoRAs that regions may name (`Region.lora`)."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        check_loras("RegionalAttention", self.loras)
        if self.expected_drawings < 1:
            raise InvalidValueError(
                f"RegionalAttention(expected_drawings={self.expected_drawings}): expected 1 or more; 1 never compiles."
            )

    @property
    def runs_cached(self) -> bool:
        return (
            self.isolation is None or not self.isolation.depends_on_sigma
        )  # or prompts would come and go between steps

    def declines(self, plans: Sequence[Plan]) -> bool:
        return not any(plan.regions for plan in plans)

    @contextmanager
    def applied(self, run: GuidedRun) -> Iterator[None]:
        if not any(run.regions):
            yield
            return
        with run.attention() as layers, _RegionalRun(self, run, layers).installed():
            yield


@dataclass(frozen=True)
class _RowRequest:
    """What a row of a call's batch gets beside its own prompt. The family makes its sequence, hence a `GuidedRow`."""

    prompts: tuple[EncodedPrompt, ...] = ()
    regions: tuple[Region, ...] = ()
    """One for each of ``prompts``."""
    lora_regions: tuple[Region, ...] = ()


class _RegionalRun:
    """One run with regions: the hook that adds prompts to a call, and the attention that reads them.

    What depends on the call under way is in `CurrentCall` alone; everything else here is fixed for the run, or cached by
    all that it depends on.
    """

    def __init__(self, guide: RegionalAttention, run: GuidedRun, layers: AttentionLayers) -> None:
        self._guide = guide
        self._run = run
        self._layers = layers
        self._denoiser = layers.denoiser
        self._regions = regions = run.regions
        self._isolation = guide.isolation or self._denoiser.isolation
        if self._isolation.depends_on_sigma and getattr(self._denoiser.module, "is_cache_enabled", False):
            raise GuideError(
                f"the isolation of {type(self._denoiser).__name__} lets prompts come and go with the noise level, and a cache reuses "
                "what was computed with others. Call disable_cache() of the model, or pass an isolation for all noise levels."
            )
        self._sites = layers.sites
        if self._isolation.image_to_image != "open" and all(site.kind != "joint" for site in self._sites):
            raise GuideError(
                f"Isolation(image_to_image={self._isolation.image_to_image!r}) would have no effect: in a "
                f"{type(self._denoiser.module).__name__} guides reach cross-attention only. Use image_to_image='open'."
            )
        self._current = layers.current
        self._uncalled = {site.attention for site in self._sites}
        """Layers that have not attended to regions yet."""
        loras = {encoded.region.lora: find_lora(encoded.region, guide.loras) for row in regions for encoded in row}
        self._loras = {name: lora for name, lora in loras.items() if name is not None and lora is not None}
        for row in regions:
            self._check_effect(tuple(encoded.region for encoded in row))

    def _check_effect(self, regions: tuple[Region, ...]) -> None:
        """Refuse a region that covers nothing before anything is drawn, and warn of one that others cover."""
        weights = self._split_grid(regions, self._denoiser.token_grid).weights[1:]
        covered = [region for region, row in zip(regions, weights, strict=True) if not row.any()]
        if covered:
            warnings.warn(
                f"other regions leave no share of any image token to {len(covered)} of {len(regions)} regions (first: "
                f"{covered[0]!r}), so their prompts have no effect. Move them later in the list, or leave them out.",
                stacklevel=2,
            )

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put the hooks and the attention in place, and everything back afterwards."""
        computers = {site: _RegionalComputer(self, site, applies=self._applies(site)) for site in self._sites}
        module = self._denoiser.module
        with ExitStack() as undo:
            if self._loras:  # what they do to a layer depends on the call under way, which compiled code does not read
                undo.enter_context(uncompiled())
            undo.enter_context(self._layers.computed_by(self._guide, computers))
            hook = module.register_forward_pre_hook(outside_graphs(self._before_forward), with_kwargs=True)
            undo.callback(hook.remove)
            proof = module.register_forward_hook(outside_graphs(self._check_called))
            undo.callback(proof.remove)
            undo.enter_context(
                token_loras_applied(self._denoiser, self._loras, current=self._current, split_grid=self._split_grid)
            )
            yield

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        if self._run.call is None:  # another guide's own prediction
            self._current.begin(())
            return None
        rows, kwargs = self._guided_rows(bind_forward_args(module, args, kwargs), self._run.call.branches)
        self._current.begin(rows)
        return ((), kwargs) if rows else None

    def _check_called(self, module: nn.Module, _args: object, _output: object) -> None:
        """Raise after a call with regions if layers have not attended to any."""
        if self._uncalled and self._current.value.has_prompts:
            raise GuideError(
                f"{len(self._uncalled)} of {len(self._sites)} attention layers of this {type(module).__name__} did not compute "
                "regional attention, so regions would not count there. Its blocks were exported or compiled ahead of time, or "
                "do not use their processors: put the model itself into the pipeline, or use OutputMix."
            )

    def _guided_rows(self, kwargs: dict[str, Any], branches: Branches) -> tuple[tuple[GuidedRow, ...], dict[str, Any]]:
        """The rows of a call, none if no region counts, and its arguments with the prompts of regions added."""
        isolation = self._isolation
        # The level is on the device, which would have to finish all that it has been given before it could be read.
        if isolation.depends_on_sigma and not isolation.applies_at_sigma(self._denoiser.noise_level(kwargs)):
            return (), kwargs
        requests = self._row_requests(branches)
        has_loras = any(region.lora for request in requests for region in request.lora_regions)
        if not has_loras and not any(request.prompts for request in requests):
            return (), kwargs
        prompts = [request.prompts for request in requests]
        kwargs, spans = self._denoiser.append_prompts(kwargs, prompts, trim_padding=self._guide.trim_padding)
        rows = tuple(
            GuidedRow(row_spans, request.regions, request.lora_regions)
            for row_spans, request in zip(spans, requests, strict=True)
        )
        return rows, kwargs

    def _row_requests(self, branches: Branches) -> list[_RowRequest]:
        """What every row of a call's batch gets."""
        requests = [_RowRequest()] * (len(branches.cond) + len(branches.uncond))
        for rows, is_negative in ((branches.cond, False), (branches.uncond, True)):
            if len(rows) not in (0, len(self._regions)):
                raise GuideError(f"regions of {len(self._regions)} pictures cannot steer a batch of {len(rows)}.")
            for row, regions in zip(rows, self._regions, strict=False):
                prompts = [(item.region, item.negative_prompt if is_negative else item.prompt) for item in regions]
                requests[row] = _RowRequest(
                    prompts=tuple(prompt for _, prompt in prompts if prompt is not None),
                    regions=tuple(region for region, prompt in prompts if prompt is not None),
                    lora_regions=tuple(item.region for item in regions),
                )
        return requests

    def _applies(self, site: AttentionSite) -> bool:
        """Whether the isolation applies at a site."""
        # Depth is counted where the image takes part. Among themselves prompts are kept apart throughout: what they
        # took from each other there they would carry into every layer.
        depths = sorted({other.block for other in self._sites if other.kind != "text"})
        return site.kind == "text" or self._isolation.applies_to_block(
            depths.index(site.block),
            num_blocks=len(depths),
            stack_start=sum(depth < site.stack_start for depth in depths),
        )

    def prepared(self, site: AttentionSite, query: Tensor, *, applies: bool) -> PreparedAttention | None:
        """The attention of the call under way at a site; None if no region counts in it."""
        call = self._current.value
        if not call.has_prompts:
            return None
        self._uncalled.discard(site.attention)
        return self._prepared(site, call, query, applies=applies)

    def bias(self, site: AttentionSite, query: Tensor, *, applies: bool) -> GroupBias:
        """What the weights of regions add to the scores of the call under way at a site."""
        call, grid = self._current.value, site.grid or self._denoiser.token_grid
        key = (site.kind, grid, applies, query.device)
        if key not in call.biases:
            isolation = self._isolation if applies else None
            masks = {row: self._mask(row, site.kind, grid, isolation) for row in call.row_numbers}
            by_row = list(masks.values()) if len(masks) == 1 else [masks[row] for row in call.rows]
            call.biases[key] = GroupBias.of_masks(by_row, query.device)
        return call.biases[key]

    def _prepared(self, site: AttentionSite, call: GuidedCall, query: Tensor, *, applies: bool) -> PreparedAttention:
        """Attention of a call at sites like this one, prepared once."""
        grid = site.grid or self._denoiser.token_grid
        shape = AttentionShape.of(query, layers=len(self._sites), drawings=self._guide.expected_drawings)
        key = (site.kind, grid, applies, shape)
        if key not in call.prepared:
            guide, isolation = self._guide, self._isolation if applies else None
            # By places alone: prompts do not matter here.
            layouts = tuple((row.spans, row.areas, tuple(numbers)) for row, numbers in call.row_numbers.items())
            kept_key = (*key, layouts, isolation, self._isolation.base_weight, guide.overlap, guide.method)

            def prepare() -> PreparedAttention:
                masks = [self._mask(row, site.kind, grid, isolation) for row in call.row_numbers]
                return prepare_attention(masks, list(call.row_numbers.values()), guide.method, shape)

            call.prepared[key] = _PREPARED.get_or_prepare(kept_key, prepare)
        return call.prepared[key]

    def _mask(
        self,
        row: GuidedRow,
        kind: Literal["joint", "cross", "text"],
        grid: tuple[int, int],
        isolation: Isolation | None,
    ) -> GroupMask:
        if kind == "text":
            return text_mask(row.spans, isolation)
        make_mask = cross_mask if kind == "cross" else joint_mask
        return make_mask(row.spans, self._split_grid(row.regions, grid), isolation)

    def _split_grid(self, regions: tuple[Region, ...], grid: tuple[int, int]) -> RegionWeights:
        return split_grid(regions, grid, base_weight=self._isolation.base_weight, overlap=self._guide.overlap)


@dataclass(frozen=True, eq=False)
class _RegionalComputer:
    """Computes the attention of one layer under regions; in a call where none counts, the model's own."""

    run: _RegionalRun
    site: AttentionSite
    applies: bool

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, /) -> Tensor:
        prepared = self._prepared(query, attn_mask)
        if prepared is None:
            return _PLAIN(query, key, value, attn_mask)
        return prepared.attention(query, key, value)

    def attended(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, /) -> Attended:
        prepared = self._prepared(query, attn_mask)
        if prepared is None:
            return _PLAIN.attended(query, key, value, attn_mask)
        bias = self.run.bias(self.site, query, applies=self.applies)
        if prepared.with_lse is None:
            return Attended(query, key, prepared.attention(query, key, value), None, bias)
        out, lse = prepared.with_lse(query, key, value)
        return Attended(query, key, out, lse, bias)

    def _prepared(self, query: Tensor, attn_mask: Tensor | None) -> PreparedAttention | None:
        prepared = self.run.prepared(self.site, query, applies=self.applies)
        if prepared is not None and attn_mask is not None:
            raise GuideError("an attention mask came with this call, and regional attention would ignore it.")
        return prepared
