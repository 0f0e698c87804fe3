"""A check of guides, on a tiny real transformer whose image and text tokens attend to each other."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from artaug._internal.annotations import checked
from artaug.geometry import Box
from artaug.plan import Plan, Region
from artaug.regional.denoiser import (
    AttentionFn,
    AttentionSite,
    AttentiveDenoiser,
    Branches,
    EncodedPrompt,
    ForwardKwargs,
    Span,
)
from artaug.regional.guide import Guide, declines, steer
from artaug.regional.guided_run import EncodedRegion, GuidedRun

_GRID = (4, 4)
_IMAGE_TOKENS, _TEXT_TOKENS, _CHANNELS, _HEADS = 16, 6, 16, 2
_TOLERANCE = 1e-4


@checked
def check_guide(guide: Guide) -> None:
    """Check that a guide acts on a batch as on its pictures, makes regions count, and leaves no trace on the model.

    It steers a denoiser of two attention layers with random weights, an `artaug.regional.AttentiveDenoiser`, for the prompts "a
    red barn" and "a lake". A guide with ``reads_regions = False`` gets no regions, and may change pictures without any.

    Raises:
        AssertionError: if it does not; the message says which rule was broken.
    """
    name = type(guide).__name__
    prompts = ["a red barn", "a lake"]
    denoiser = _tiny_denoiser(prompts)
    left, top = Region(Box(0, 0, 0.5, 1), "a blue door"), Region(Box(0, 0, 1, 0.5), "a stormy sky", weight=2.0)
    rows = [_encode_regions(left, top), _encode_regions(top)] if guide.reads_regions else [[], []]
    plain, traces = denoiser.predict(), _traces(denoiser.module)
    if guide.reads_regions:
        _check_without_regions(guide, denoiser, prompts, plain)
        _check_no_trace(denoiser, traces, plain, f"{name}, after a run without regions,")

    with steer(guide, _run_of(denoiser, prompts, rows)):
        guided = denoiser.predict()
        repeated = denoiser.predict()
    assert guided.isfinite().all(), f"{name} makes the denoiser predict NaN or infinity"
    assert guided.shape == plain.shape, f"{name} changes the shape of a prediction: {tuple(guided.shape)}"
    assert torch.equal(guided, repeated), f"{name} predicts differently for the same call"
    for row, prompt in enumerate(prompts):
        if guide.reads_regions:
            assert not torch.equal(guided[row], plain[row]), f"{name} ignores the regions of picture {row} of a batch"
        alone = _tiny_denoiser([prompt], first_row=row)
        with steer(guide, _run_of(alone, [prompt], [rows[row]])):
            by_itself = alone.predict()[0]
        assert torch.allclose(guided[row], by_itself, atol=_TOLERANCE), (
            f"{name} predicts picture {row} of a batch differently than alone, by up to "
            f"{(guided[row] - by_itself).abs().max():.2g}"
        )
    if guide.reads_regions:
        with steer(guide, _run_of(denoiser, prompts, [rows[0], []])):
            mixed = denoiser.predict()
        assert torch.allclose(mixed[1], plain[1], atol=_TOLERANCE), (
            f"{name} changes the prediction of a picture without regions, because another of its batch has some"
        )
    _check_no_trace(denoiser, traces, plain, f"{name}, after a run,")

    try:
        _interrupted_run(guide, denoiser, _run_of(denoiser, prompts, rows))
    except _InterruptedError:
        pass
    else:
        raise AssertionError(f"{name}.applied swallows an exception of its with block")
    _check_no_trace(denoiser, traces, plain, f"{name}, after an exception,")


def _check_without_regions(guide: Guide, denoiser: "_TinyDenoiser", prompts: Sequence[str], plain: Tensor) -> None:
    run = _run_of(denoiser, prompts, [[], []])
    if declines(guide, run.plans):
        return
    with steer(guide, run):
        unguided = denoiser.predict()
    assert torch.equal(unguided, plain), (
        f"{type(guide).__name__} changes the prediction of pictures without regions: expected the same bits"
    )


class _InterruptedError(Exception):
    """Raised in the middle of a run."""


def _interrupted_run(guide: Guide, denoiser: "_TinyDenoiser", run: GuidedRun) -> None:
    with steer(guide, run):
        denoiser.predict()
        raise _InterruptedError


def _check_no_trace(denoiser: "_TinyDenoiser", before: dict[str, Any], plain: Tensor, who: str) -> None:
    after = _traces(denoiser.module)
    changed = [what for what, state in before.items() if after[what] != state]
    assert not changed, f"{who} leaves a trace on the model: {', '.join(changed)}"
    assert torch.equal(denoiser.predict(), plain), f"{who} leaves a trace: the model predicts something else"


def _traces(module: nn.Module) -> dict[str, Any]:
    """What a guide could leave behind: hooks, replaced forwards and processors, weights."""
    layers = list(module.modules())
    return {
        "a forward hook": [list(layer._forward_hooks.values()) for layer in layers],  # noqa: SLF001 - listed nowhere else
        "a forward pre-hook": [list(layer._forward_pre_hooks.values()) for layer in layers],  # noqa: SLF001
        "a replaced forward": ["forward" in vars(layer) for layer in layers],
        "an attention processor": [id(layer.processor) for layer in layers if isinstance(layer, _Attention)],
        "training mode": [layer.training for layer in layers],
        "other weights": {name: tensor.tolist() for name, tensor in module.state_dict().items()},
    }


# --- the tiny denoiser -------------------------------------------------------------------------------------------


def _encode(prompt: str) -> EncodedPrompt:
    """Encode a prompt: random tokens that follow from its text, and zeros as padding after its words."""
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")
    embeds = torch.randn(1, _TEXT_TOKENS, _CHANNELS, generator=torch.Generator().manual_seed(seed))
    words = slice(0, min(len(prompt.split()), _TEXT_TOKENS))
    embeds[:, words.stop :] = 0
    return EncodedPrompt({"embeds": embeds}, words)


def _encode_regions(*regions: Region) -> list[EncodedRegion]:
    return [EncodedRegion(region, _encode(region.prompt)) for region in regions]


def find_words(prompt: str, phrases: Sequence[str]) -> list[tuple[int, ...]]:
    """The tokens of phrases in a prompt, of which each word is one."""
    words = prompt.split()[:_TEXT_TOKENS]
    found = []
    for phrase in phrases:
        count = len(phrase.split())
        starts = [start for start in range(len(words)) if words[start : start + count] == phrase.split()]
        found.append(tuple(sorted({start + word for start in starts for word in range(count)})))
    return found


def _run_of(denoiser: "_TinyDenoiser", prompts: Sequence[str], regions: Sequence[Sequence[EncodedRegion]]) -> GuidedRun:
    plans = [
        Plan(prompt, tuple(encoded.region for encoded in row)) for prompt, row in zip(prompts, regions, strict=True)
    ]
    return GuidedRun(denoiser=denoiser, plans=plans, regions=regions, phrase_tokens=find_words)


class _TinyAttentionProcessor:
    """Computes a joint attention layer of text and image tokens with ``attention_fn``."""

    def __init__(self, attention_fn: AttentionFn) -> None:
        self._attention_fn = attention_fn

    def __call__(self, attn: "_Attention", hidden_states: Tensor) -> Tensor:
        # (batch, tokens, channels) to (batch, heads, tokens, channels of a head) and back
        heads = (
            layer(hidden_states).unflatten(-1, (_HEADS, -1)).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        attended: Tensor = attn.to_out(self._attention_fn(*heads).transpose(1, 2).flatten(2))
        return attended


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(_CHANNELS, _CHANNELS) for _ in range(4))
        self.processor: Any = _TinyAttentionProcessor(functional.scaled_dot_product_attention)

    def set_processor(self, processor: Any) -> None:  # noqa: ANN401 - as in diffusers
        self.processor = processor

    def forward(self, hidden_states: Tensor) -> Tensor:
        attended: Tensor = self.processor(self, hidden_states)
        return attended


class _TinyTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Attention() for _ in range(2))
        self.proj_out = nn.Linear(_CHANNELS, _CHANNELS)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        joint = torch.cat([encoder_hidden_states, hidden_states + timestep[:, None, None]], dim=1)
        for block in self.blocks:
            joint = joint + block(joint)
        prediction: Tensor = self.proj_out(joint[:, encoder_hidden_states.shape[1] :])
        return prediction


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class _TinyDenoiser(AttentiveDenoiser):
    prompt_embeds: Tensor
    latents: Tensor

    @torch.no_grad()
    def predict(self) -> Tensor:
        prediction: Tensor = self.module(
            hidden_states=self.latents,
            encoder_hidden_states=self.prompt_embeds,
            timestep=torch.full((len(self.latents),), 0.7),
        )
        return prediction

    def branches(self, kwargs: ForwardKwargs) -> Branches:
        return Branches(cond=range(len(kwargs["hidden_states"])))

    def with_prompt_embeds(
        self, kwargs: ForwardKwargs, rows: Sequence[int], prompts: Sequence[EncodedPrompt]
    ) -> dict[str, Any]:
        of_rows = {name: kwargs[name][list(rows)] for name in ("hidden_states", "timestep")}
        return {**of_rows, "encoder_hidden_states": torch.cat([prompt.conditioning["embeds"] for prompt in prompts])}

    @property
    def sites(self) -> Sequence[AttentionSite]:
        module: Any = self.module
        return [AttentionSite(attention, block) for block, attention in enumerate(module.blocks)]

    def noise_level(self, kwargs: ForwardKwargs) -> float:
        return float(kwargs["timestep"][0])

    def append_prompts(
        self, kwargs: ForwardKwargs, prompts: Sequence[Sequence[EncodedPrompt]], *, trim_padding: bool
    ) -> tuple[dict[str, Any], list[tuple[Span, ...]]]:
        added = [
            [prompt.conditioning["embeds"][0, prompt.token_slice if trim_padding else slice(None)] for prompt in row]
            for row in prompts
        ]
        longest = max(sum(map(len, row)) for row in added)
        joined, spans = [], []
        for own, row in zip(kwargs["encoder_hidden_states"], added, strict=True):
            missing = longest - sum(map(len, row))
            joined.append(torch.cat([own, *row, own.new_zeros(missing, _CHANNELS)]))
            texts = [
                Span("text", len(own)),
                *(Span("text", len(text), index) for index, text in enumerate(row, start=1)),
            ]
            padding = [Span("padding", missing)] if missing else []
            spans.append((*texts, *padding, Span("image", _IMAGE_TOKENS)))
        return {**kwargs, "encoder_hidden_states": torch.stack(joined)}, spans

    def processor(self, site: AttentionSite, attention_fn: AttentionFn) -> _TinyAttentionProcessor:
        return _TinyAttentionProcessor(attention_fn)


def tiny_transformer() -> nn.Module:
    """The same random weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _TinyTransformer().eval()


def predict_under(guide: Guide, module: nn.Module, noisy: Tensor, sigmas: Tensor, plans: Sequence[Plan]) -> Tensor:
    """What a tiny transformer predicts under a guide for latents of at most 16 channels and 4 x 4 pixels."""
    embeds = torch.cat([_encode(plan.prompt).conditioning["embeds"] for plan in plans])
    tokens = noisy.flatten(2).mT  # (batch, tokens, channels)
    padded = functional.pad(tokens, (0, _CHANNELS - tokens.shape[-1]))
    denoiser = _TinyDenoiser(module=module, grid=_GRID, prompt_embeds=embeds, latents=padded)
    with steer(guide, GuidedRun(denoiser=denoiser, plans=plans, regions=[()] * len(plans), phrase_tokens=find_words)):
        predicted: Tensor = module(hidden_states=padded, encoder_hidden_states=embeds, timestep=sigmas)
    return predicted[..., : tokens.shape[-1]].mT.reshape(noisy.shape)


def _tiny_denoiser(prompts: Sequence[str], *, first_row: int = 0) -> _TinyDenoiser:
    """The denoiser of one run; ``first_row`` of the latents belongs to the first prompt."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = (
            _TinyTransformer().eval()
        )  # as `tiny_transformer`, whose random numbers come before those of the latents
        latents = torch.randn(first_row + len(prompts), _IMAGE_TOKENS, _CHANNELS)[first_row:]
    embeds = torch.cat([_encode(prompt).conditioning["embeds"] for prompt in prompts])
    return _TinyDenoiser(module=module, grid=_GRID, prompt_embeds=embeds, latents=latents)
