"""The exact guide: one forward pass a step, in which attention itself keeps regions and prompts apart."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from artaug.errors import GuideError
from artaug.lora.lora import LoRA
from artaug.plan import Region
from artaug.regional.attention import attention_in_passes, can_merge, dense_attention
from artaug.regional.attention_mask import Sight, cross_sight, joint_sight, text_sight
from artaug.regional.claim import exclusive
from artaug.regional.denoiser import (
    AttentionFn,
    AttentionSite,
    AttentiveDenoiser,
    Denoiser,
    EncodedPrompt,
    ForwardKwargs,
    bind_forward_args,
)
from artaug.regional.guide import EncodedRegion, Guide
from artaug.regional.isolation import Isolation
from artaug.regional.region_weights import Shares, divided
from artaug.regional.split_plan import passes
from artaug.regional.token_lora import Row, lora_of, worn_in_regions

Method: TypeAlias = Literal["auto", "grouped", "merged", "flex", "dense"]


@dataclass(frozen=True, kw_only=True)
class RegionalAttention(Guide):
    """Lets every image token attend to the prompts of its regions, in the one forward pass of a step.

    The region prompts join the model's text tokens, and who may look at whom, and how strongly, follows from the
    regions and the ``isolation``. This is masked attention, softmax(q k / sqrt(d) + log w) v, with w a weight for each
    query and group of keys; it is computed exactly and without a mask in memory.

    Which ``method`` computes it changes the speed, not the result:

    - ``"auto"``: grouped passes or merged ones, whichever copy fewer tokens; where merging is needed and not possible
      (neither CPU nor CUDA), dense.
    - ``"grouped"``: one unmasked attention for all queries that see the same keys. Refuses soft weights.
    - ``"merged"``: one unmasked attention a group of keys, averaged by log-sum-exp.
    - ``"flex"``: PyTorch's FlexAttention over sorted tokens. Compiles at first use; on the CPU not for training.
    - ``"dense"``: a mask of queries x keys. The definition, slow and large.

    >>> import artaug as aa
    >>> aa.RegionalAttention(method="merged").trim_padding
    True
    """

    isolation: Isolation | None = None
    """Who may look at whom; None for what suits the model's family."""
    overlap: Literal["share", "over"] = "share"
    """Where regions overlap: all prompts share the place, or the later region lies over the earlier."""
    trim_padding: bool = True
    """Leave the padding of region prompts out: faster. A model that was trained to see padding draws a little
    differently without it."""
    method: Method = "auto"
    """How to compute it."""
    loras: Mapping[str, LoRA] = field(default_factory=dict, repr=False, hash=False)
    """What a region may wear (`Region.lora`), by name."""

    @contextmanager
    def steering(self, denoiser: Denoiser, regions: Sequence[Sequence[EncodedRegion]]) -> Iterator[None]:
        if not isinstance(denoiser, AttentiveDenoiser):
            raise GuideError(
                f"{type(denoiser).__name__} does not say where its model's attention is, so RegionalAttention cannot "
                "guide it. Use OutputMix, or make it an AttentiveDenoiser."
            )
        with exclusive(denoiser.module, self):
            if not any(regions):
                yield
                return
            with _Run(self, denoiser, regions).installed():
                yield


class _Run:
    """One run of a guided model: the hook that adds prompts to a call, and the attention that reads them."""

    def __init__(
        self, guide: RegionalAttention, denoiser: AttentiveDenoiser, regions: Sequence[Sequence[EncodedRegion]]
    ) -> None:
        self._guide = guide
        self._denoiser = denoiser
        self._regions = regions
        self._isolation = guide.isolation or denoiser.isolation
        self._sites = denoiser.sites
        if self._isolation.image_to_image != "open" and all(site.kind != "joint" for site in self._sites):
            raise GuideError(
                f"Isolation(image_to_image={self._isolation.image_to_image!r}) would have no effect: in a "
                f"{type(denoiser.module).__name__} guides reach cross-attention only. Use image_to_image='open'."
            )
        self._rows: tuple[Row, ...] = ()
        """Of the call under way, or of the last one: a checkpointed layer computes once more in the backward pass."""
        self._prepared: dict[Any, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
        named_loras = {one.region.lora: lora_of(one.region, guide.loras) for row in regions for one in row}
        self._loras = {name: lora for name, lora in named_loras.items() if name is not None and lora is not None}
        for row in regions:  # regions that nobody would read are refused before anything is drawn
            self._shares(tuple(one.region for one in row), denoiser.token_grid)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put the hook and the processors in place, and everything back afterwards."""
        processors = [self._denoiser.processor(site, self._attention_fn_at(site)) for site in self._sites]
        with ExitStack() as undo:
            undo.enter_context(self._denoiser.patched())
            for site, processor in zip(self._sites, processors, strict=True):
                undo.callback(site.attention.set_processor, site.attention.processor)
                site.attention.set_processor(processor)
            hook = self._denoiser.module.register_forward_pre_hook(self._before, with_kwargs=True)
            undo.callback(hook.remove)
            undo.enter_context(
                worn_in_regions(self._denoiser, self._loras, rows=lambda: self._rows, shares=self._shares)
            )
            yield

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        kwargs = bind_forward_args(module, args, kwargs)
        self._rows = ()
        if not self._isolation.applies_at_sigma(self._denoiser.noise_level(kwargs)):
            return None
        texts, regions, dressed = self._texts(kwargs)
        if not any(texts) and not any(one.lora for row in dressed for one in row):
            return None
        kwargs, spans = self._denoiser.append_prompts(kwargs, texts, trim_padding=self._guide.trim_padding)
        self._rows = tuple(Row(*row) for row in zip(spans, regions, dressed, strict=True))
        return (), kwargs

    def _texts(
        self, kwargs: ForwardKwargs
    ) -> tuple[list[list[EncodedPrompt]], list[tuple[Region, ...]], list[tuple[Region, ...]]]:
        """The prompts to add to every row of a call, the regions they are of, and all regions of its picture."""
        branches = self._denoiser.branches(kwargs)
        count = len(branches.cond) + len(branches.uncond)
        texts: list[list[EncodedPrompt]] = [[] for _ in range(count)]
        regions: list[tuple[Region, ...]] = [() for _ in range(count)]
        dressed: list[tuple[Region, ...]] = [() for _ in range(count)]
        for rows, negative in ((branches.cond, False), (branches.uncond, True)):
            if len(rows) not in (0, len(self._regions)):
                raise GuideError(f"regions of {len(self._regions)} pictures cannot steer a batch of {len(rows)}.")
            for row, of_picture in zip(rows, self._regions, strict=False):
                said = [(one.region, one.negative_prompt if negative else one.prompt) for one in of_picture]
                texts[row] = [text for _, text in said if text is not None]
                regions[row] = tuple(region for region, text in said if text is not None)
                dressed[row] = tuple(region for region, _ in said)
        return texts, regions, dressed

    def _attention_fn_at(self, site: AttentionSite) -> AttentionFn:
        # Depth is counted where the image takes part. Among themselves prompts are kept apart throughout, since what
        # they take from each other there they would carry into every layer.
        depths = sorted({one.block for one in self._sites if one.kind != "text"})
        holds = site.kind == "text" or self._isolation.applies_to_block(depths.index(site.block), of=len(depths))

        def attention_fn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if not any(row.regions for row in self._rows):
                return functional.scaled_dot_product_attention(query, key, value)
            if len(set(self._rows)) == 1:
                return self._for(site, self._rows[0], holds, query)(query, key, value)
            result = torch.empty_like(query)
            for row in dict.fromkeys(self._rows):
                which = [number for number, other in enumerate(self._rows) if other == row]
                computed = self._for(site, row, holds, query)(query[which], key[which], value[which])
                result[which] = computed
            return result

        # Compiled blocks call it from outside their graphs: what it does depends on the layout, not on tensors. Who never
        # compiled anything is spared loading the compiler.
        return torch.compiler.disable(attention_fn) if "torch._dynamo" in sys.modules else attention_fn

    def _for(
        self, site: AttentionSite, row: Row, holds: bool, query: Tensor
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Attention for rows like this one at sites like this one, prepared once a layout."""
        grid = site.grid or self._denoiser.token_grid
        learns = torch.is_grad_enabled() and query.requires_grad
        key = (row, site.kind, grid, holds, query.device, learns)
        if key not in self._prepared:
            sight = self._sight(site.kind, row, grid, holds)
            self._prepared[key] = prepared(sight, self._guide.method, query.device, learns=learns)
        return self._prepared[key]

    def _sight(self, kind: str, row: Row, grid: tuple[int, int], holds: bool) -> Sight:
        isolation = self._isolation if holds else None
        if kind == "text":
            return text_sight(row.spans, isolation)
        shares = self._shares(row.regions, grid)
        return (cross_sight if kind == "cross" else joint_sight)(row.spans, shares, isolation)

    def _shares(self, regions: tuple[Region, ...], grid: tuple[int, int]) -> Shares:
        return divided(regions, grid, base_weight=self._isolation.base_weight, overlap=self._guide.overlap)


def prepared(sight: Sight, method: Method, device: torch.device, *, learns: bool) -> AttentionFn:
    """Attention under a sight, ready to be called many times.

    Args:
        sight: who sees whom.
        method: see `RegionalAttention`.
        device: of the queries.
        learns: whether gradients will be asked for.

    Raises:
        GuideError: if the method cannot do it.
    """
    if method == "flex":
        if learns and device.type == "cpu":
            raise GuideError("compiled FlexAttention has no backward on the CPU. Use method='auto' for training.")
        from artaug.regional.flex import FlexSight, attention_by_flex  # noqa: PLC0415 - loads torch's compiler

        flexed = FlexSight.of(sight, device)
        return lambda query, key, value: attention_by_flex(query, key, value, flexed, compiled=True)
    if method in {"auto", "grouped", "merged"}:
        planned = tuple(one.on(device) for one in passes(sight, method))
        if can_merge(device) or all(one.stage == "alone" for one in planned):
            return lambda query, key, value: attention_in_passes(query, key, value, planned)
        if method == "merged":
            raise GuideError(
                f"attention on {device} does not tell its log-sum-exp, so passes cannot be merged there. "
                "Use method='auto' or 'dense'."
            )
    bias = sight.bias.to(device)
    return lambda query, key, value: dense_attention(query, key, value, bias)
