"""The probe: a guide that reads how much every image token attends to phrases of the prompt, and changes nothing."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar, final

import torch
from jaxtyping import Float
from PIL.Image import Image, Resampling
from torch import Tensor, nn
from torch.nn.functional import interpolate

from artaug._internal.annotations import checked
from artaug._internal.arguments import argument_error, check_count, check_items
from artaug._internal.contracts import contract_error
from artaug._internal.images import as_rgb
from artaug.drawing import draw_heatmap
from artaug.errors import GuideError, InvalidValueError
from artaug.plan import Plan
from artaug.regional.attention_layers import Attended, AttentionLayers
from artaug.regional.bias import WindowBias
from artaug.regional.denoiser import AttentionSite, Span
from artaug.regional.guide import Guide
from artaug.regional.guided_run import DenoiserCall, GuidedRun
from artaug.regional.key_maps import key_maps

_PREVIEW_PX = 512

P = TypeVar("P")

Phrase: TypeAlias = str | int
"""A part of a prompt, or the number of one token in a row of `artaug.diffusion.Family.encode_prompts`."""

Phrases: TypeAlias = Sequence[Phrase] | Callable[[Plan], Sequence[Phrase]]
"""The phrases of every plan, or a function that gives those of each."""


@dataclass(frozen=True, eq=False)
class LayerMaps:
    """The maps of one attention layer in one call of the denoiser."""

    block: int
    """The layer's number in the order of computation, as `artaug.regional.AttentionSite.block`."""
    grid: tuple[int, int]
    """Rows and columns of the layer's image tokens."""
    maps: Float[Tensor, "batch phrases *heads tokens"]
    """The probability that an image token attends to a phrase, in [0, 1]: the sum over the phrase's tokens. Image tokens are row
    by row of ``grid``; all zeros for a picture whose prompt does not hold the phrase, or that has fewer phrases than others. Float32,
    with a gradient where the denoiser was called with one."""


@checked
@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """The maps of one call of the denoiser, of all layers that were probed."""

    call: int
    """Its number among the calls for the plans' prompts, from 0: the step, where a step is one call. 0 in what a guide tries."""
    phrases: tuple[tuple[Phrase, ...], ...]
    """The phrases of each picture of the batch, in the order of the maps."""
    layers: tuple[LayerMaps, ...]
    """In the order of computation."""

    def mean(self, grid: tuple[int, int] | None = None) -> Float[Tensor, "batch phrases rows columns"]:
        """The mean over layers and heads, each averaged over the areas of one grid's tokens.

        Args:
            grid: rows and columns; None for the finest of the layers.
        """
        grid = grid or max((layer.grid for layer in self.layers), key=math.prod)
        resized = []
        for layer in self.layers:
            maps = layer.maps if layer.maps.ndim == 3 else layer.maps.mean(dim=2)
            pictures = maps.unflatten(-1, layer.grid)
            if layer.grid != grid:
                pictures = interpolate(pictures, grid, mode="area")
            resized.append(pictures)
        return torch.stack(resized).mean(dim=0)

    def preview(self, image: Image, phrase: Phrase, *, row: int = 0, scale: int | None = None) -> Image:
        """Draw the mean map of a phrase over a picture, and its largest probability below it.

        Args:
            image: what is drawn over, such as the picture that the call belonged to.
            phrase: one of the ``phrases``.
            row: which picture of the batch.
            scale: pixels of the copy for each pixel of ``image``; None for 512 pixels or what comes near.

        Raises:
            InvalidValueError: for a row or a phrase that has no map.
        """
        if not 0 <= row < len(self.phrases) or phrase not in self.phrases[row]:
            have = (
                f"row {row} has {', '.join(map(repr, self.phrases[row]))}"
                if 0 <= row < len(self.phrases)
                else f"there are {len(self.phrases)} rows"
            )
            raise InvalidValueError(f"AttentionMaps.preview({phrase!r}, row={row}): there is no such map; {have}.")
        weights = self.mean()[row, self.phrases[row].index(phrase)].detach().float().cpu().numpy()
        factor = scale or max(_PREVIEW_PX // max(image.size), 1)
        large = as_rgb(image).resize((image.width * factor, image.height * factor), Resampling.BICUBIC)
        return draw_heatmap(large, weights, heading=f"{phrase}, at most {weights.max():.2g}")


@checked
@final
@dataclass(frozen=True, kw_only=True)
class AttentionProbe(Guide):
    """Reads how much every image token attends to phrases of the plan's prompt, layer by layer, and changes no picture.

    A map is the exact probability of the layer's own attention: in a UNet that of cross-attention, in an MMDiT that of joint
    attention, whose softmax image tokens share with all text. It is computed from queries and keys as the layer has them, only
    for the phrase's tokens, as ``exp(q k / sqrt(d) - lse)`` with the log-sum-exp that the layer's kernel returns, in blocks, so
    that no matrix of queries and keys is ever in memory. Together with `RegionalAttention` it is the probability under the
    regions' weights.

    With classifier-free guidance the branch of the plans' prompts is read. Where the denoiser is called with gradients, as in
    training, the maps have theirs, to queries and all keys.

    Raises:
        InvalidValueError: without phrases, for one that is neither text nor a number of 0 or more, or for layers that are no
            numbers.

    >>> import artaug as aa
    >>> maps = []
    >>> probe = aa.AttentionProbe(phrases=["red cone", "blue ball"], receive=maps.append)
    """

    phrases: Phrases
    """Parts of the plans' prompts, see `artaug.regional.GuidedRun.phrase`, or numbers of single tokens, which may be special ones or
    padding; or a function of a plan, which may give none. A number beyond a picture's prompt stands for no token."""
    receive: Callable[[AttentionMaps], object] = field(repr=False, compare=False)
    """Called with the maps of every call of the denoiser, after it."""
    layers: Sequence[int] | None = None
    """The numbers of the layers to read (`artaug.regional.AttentionSite.block`); None for all in which image tokens attend to text."""
    heads: bool = False
    """Keep the heads apart, as an axis before the image tokens; else their mean."""
    over: Literal["sequence", "prompt"] = "sequence"
    """What probabilities sum to 1 over: all that a token attends to; or the tokens of the plan's prompt alone, as the maps of a
    UNet do, which methods made for UNets expect of an MMDiT as well."""

    def __post_init__(self) -> None:
        if not callable(self.phrases):
            check_items("AttentionProbe", "phrases", self.phrases, object)
            if not self.phrases:
                raise InvalidValueError("AttentionProbe(phrases=[]) would read nothing: give one or more.")
            for phrase in self.phrases:
                if not isinstance(phrase, str):
                    check_count("AttentionProbe", "phrases", phrase, least=0)
            object.__setattr__(self, "phrases", tuple(self.phrases))
        if self.layers is not None:
            check_items("AttentionProbe", "layers", self.layers, int)
            if not self.layers:
                raise InvalidValueError(
                    "AttentionProbe(layers=[]) would read nothing: give one or more, or None for all."
                )
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.over not in {"sequence", "prompt"}:
            raise argument_error("AttentionProbe", "over", self.over, expected="'sequence' or 'prompt'")

    @property
    def reads_regions(self) -> bool:
        return False

    def declines(self, plans: Sequence[Plan]) -> bool:
        """Whether there is nothing to read: no phrase of any plan."""
        return callable(self.phrases) and not any(phrases_of(self.phrases, plan) for plan in plans)

    @contextmanager
    def applied(self, run: GuidedRun) -> Iterator[None]:
        with run.attention() as layers:
            probe = _ProbedRun(self, run, layers)
            module = run.denoiser.module
            with (
                module.register_forward_pre_hook(probe.before_forward),
                layers.observed_by(probe.observe),
                module.register_forward_hook(probe.after_forward),
            ):
                yield


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where image tokens and phrases are in the attention of one call's rows, for layers of one kind."""

    rows: slice
    """Of the batch: those of the plans' prompts."""
    image: slice
    """The image tokens, among queries."""
    selected: Tensor
    """The tokens of all phrases, among keys: (rows, selected)."""
    members: Tensor
    """Which of them are in each phrase: (rows, phrases, selected)."""
    prompts: tuple[slice, ...]
    """The prompt of each row, among keys."""


class _ProbedRun:
    """One run with a probe."""

    def __init__(self, probe: AttentionProbe, run: GuidedRun, layers: AttentionLayers) -> None:
        self._probe, self._run, self._layers = probe, run, layers
        self._trial = run.trial
        """The trials whose calls are read; None for the calls that draw."""
        self._tokens, self._phrases = _phrase_tokens(probe.phrases, run)
        readable = [site for site in layers.sites if site.kind != "text"]
        blocks = {site.block for site in readable} if probe.layers is None else set(probe.layers)
        self._sites = [site for site in readable if site.block in blocks]
        if unknown := blocks - {site.block for site in readable}:
            raise GuideError(
                f"AttentionProbe(layers=...) names the layers {sorted(unknown)}, where no image attends to text in this "
                f"{type(run.denoiser.module).__name__}. Expected numbers of {sorted({site.block for site in readable})}."
            )
        self._readable = frozenset(self._sites)
        self._calls = 0
        self._call: DenoiserCall | None = None
        """The call whose layers are being read; None between calls."""
        self._read: dict[AttentionSite, Tensor] = {}
        self._layouts: dict[str, _Layout] = {}
        """Of the last call that was read, by the kind of layers."""
        self._known: set[tuple[object, ...]] = set()
        """The different layouts of the run."""

    def before_forward(self, _module: nn.Module, _args: object) -> None:
        call = self._run.call
        if call is None or call.trial is not self._trial or not call.branches.cond:
            return  # another guide's own prediction, or the negative branch
        self._call, self._read, self._layouts = call, {}, {}

    def observe(self, site: AttentionSite, attended: Attended) -> None:
        if site not in self._readable or self._run.trial is not self._trial:
            return
        is_reading = self._call is not None and self._run.call is self._call
        if not is_reading and not _in_backward():
            return
        if not is_reading and len(self._known) > len(self._layouts):
            raise GuideError(
                "a layer was computed again for its backward pass (gradient checkpointing) after another call with other "
                "tokens. Go back through each call before the next one."
            )
        # Computed again, too, when a checkpointed block is: what it saves for its backward pass has to be the same.
        maps = self._maps(site, attended)
        if is_reading:
            self._read[site] = maps

    def after_forward(self, module: nn.Module, _args: object, _output: object) -> None:
        if self._call is None or self._run.call is not self._call:
            return
        if missing := [site.block for site in self._sites if site not in self._read]:
            raise GuideError(
                f"{len(missing)} of {len(self._sites)} attention layers of this {type(module).__name__} (first: {missing[0]}) "
                "were not read: its blocks were exported or compiled ahead of time, or do not use their processors. Put the "
                "model itself into the pipeline."
            )
        layers = tuple(LayerMaps(site.block, self._grid(site), self._read[site]) for site in self._sites)
        self._call, self._read = None, {}
        self._calls += 1
        self._probe.receive(AttentionMaps(self._calls - 1, self._phrases, layers))

    def _maps(self, site: AttentionSite, attended: Attended) -> Tensor:
        layout = self._layouts.get(site.kind) or self._lay_out(site.kind, attended.key.device)
        rows = list(range(layout.rows.start, layout.rows.stop))
        query, key = attended.query[layout.rows, :, layout.image], attended.key[layout.rows]
        bias = None if attended.bias is None else attended.bias.of_rows(rows).of_queries(layout.image)
        lse = None if attended.lse is None else attended.lse[layout.rows, :, layout.image]
        selected = layout.selected
        if self._probe.over == "prompt":
            window = slice(
                min(prompt.start for prompt in layout.prompts), max(prompt.stop for prompt in layout.prompts)
            )
            key, selected, lse = key[:, :, window], selected - window.start, None
            bias = WindowBias.of_keys(bias, window, layout.prompts, key.device)
        maps = key_maps(query, key, selected, layout.members, lse=lse, bias=bias, heads=self._probe.heads)
        rows_of_grid, columns = self._grid(site)
        if maps.shape[-1] != rows_of_grid * columns:
            raise GuideError(
                f"layer {site.block} has {maps.shape[-1]} image tokens, and its grid is {rows_of_grid} x {columns}: "
                f"{type(self._layers.denoiser).__name__} does not fit the model. Correct its sites or spans."
            )
        return maps

    def _grid(self, site: AttentionSite) -> tuple[int, int]:
        return site.grid or self._layers.denoiser.token_grid

    def _lay_out(self, kind: str, device: torch.device) -> _Layout:
        call = self._run.call
        if call is None:
            raise GuideError("the probe was asked for a layer before any call of the denoiser.")
        rows = call.branches.cond
        if len(rows) != len(self._tokens):
            raise GuideError(f"phrases of {len(self._tokens)} pictures cannot be read in a batch of {len(rows)}.")
        spans = [row.spans for row in self._layers.current.value.rows] or self._layers.denoiser.spans(call.kwargs)
        places = [_places(spans[row], kind) for row in rows]
        lengths = [prompt.stop - prompt.start for _, prompt in places]
        numbers = [
            sorted({token for phrase in phrases for token in phrase if token < length})
            for phrases, length in zip(self._tokens, lengths, strict=True)
        ]
        most = max(map(len, numbers))
        selected = torch.zeros(len(rows), most, dtype=torch.long)
        members = torch.zeros(len(rows), max(map(len, self._tokens)), most)
        for row, (phrases, tokens, (_, prompt)) in enumerate(zip(self._tokens, numbers, places, strict=True)):
            selected[row] = prompt.start  # what stands for nothing is a token of the prompt, whose score is finite
            selected[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long) + prompt.start
            for number, phrase in enumerate(phrases):
                members[row, number, : len(tokens)] = torch.tensor([float(token in phrase) for token in tokens])
        layout = _Layout(
            slice(rows.start, rows.stop),
            places[0][0],
            selected.to(device),
            members.to(device),
            tuple(prompt for _, prompt in places),
        )
        self._layouts[kind] = layout
        self._known.add((kind, rows, tuple(selected.flatten().tolist()), layout.image.start, layout.image.stop))
        return layout


def _phrase_tokens(
    phrases: Phrases, run: GuidedRun
) -> tuple[list[list[tuple[int, ...]]], tuple[tuple[Phrase, ...], ...]]:
    """The tokens of the phrases of each picture, and the phrases."""
    if not callable(phrases):
        by_phrase = [
            run.phrase(phrase) if isinstance(phrase, str) else ((phrase,),) * len(run.plans) for phrase in phrases
        ]
        return [list(tokens) for tokens in zip(*by_phrase, strict=True)], (tuple(phrases),) * len(run.plans)
    of_plans = [tuple(phrases_of(phrases, plan)) for plan in run.plans]
    tokens = [
        [
            tuple(run.phrase_tokens(plan.prompt, [phrase])[0]) if isinstance(phrase, str) else (phrase,)
            for phrase in of_plan
        ]
        for plan, of_plan in zip(run.plans, of_plans, strict=True)
    ]
    for plan, of_plan, found in zip(run.plans, of_plans, tokens, strict=True):
        if absent := [phrase for phrase, numbers in zip(of_plan, found, strict=True) if not numbers]:
            raise GuideError(f"the phrases {absent} are not in the prompt {plan.prompt!r} as the model reads it.")
    return tokens, tuple(of_plans)


def phrases_of(phrases: Callable[[Plan], Sequence[P]], plan: Plan) -> Sequence[P]:
    """What a function of plans gives as the phrases of one.

    Raises:
        ContractError: for one text, which to Python is a list of letters, or no list.
    """
    given = phrases(plan)
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise contract_error(
            "phrases", "", received=repr(given), inputs=repr(plan.prompt), expected="a list, empty for no phrase"
        )
    return given


def _places(spans: Sequence[Span], kind: str) -> tuple[slice, slice]:
    """Where the image is among the queries of a row, and its own prompt among the keys."""
    image, prompt, start = slice(0, None), slice(0, 0), 0
    for span in spans:
        if kind == "cross" and span.kind not in {"text", "padding"}:
            continue
        if span.kind == "image":
            image = slice(start, start + span.length)
        elif span.kind == "text" and span.prompt == 0:
            prompt = slice(start, start + span.length)
        start += span.length
    return image, prompt


def _in_backward() -> bool:
    """Whether autograd is at work, which computes checkpointed layers again."""
    task: Any = torch._C._current_graph_task_id()  # noqa: SLF001 - there is no public name
    return bool(task != -1)
