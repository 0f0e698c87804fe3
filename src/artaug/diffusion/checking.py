"""`check_family`: a conformance check for people who write a `Family`.

It raises `AssertionError` with a sentence that says what was expected and what came.
"""

# ruff: noqa: S101 - a check asserts, as in artaug.testing

import dataclasses
import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, final

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from artaug._internal.annotations import checked
from artaug.diffusion.families.base import Family
from artaug.diffusion.synthesizer import DiffusersSynthesizer, without_progress_bar
from artaug.errors import ModelError
from artaug.geometry import Box
from artaug.plan import Plan, Region
from artaug.regional.attention_probe import AttentionMaps, AttentionProbe
from artaug.regional.denoiser import (
    AttentionFn,
    AttentionProcessor,
    AttentionSite,
    AttentiveDenoiser,
    Branches,
    Conditioning,
    Denoiser,
    EncodedPrompt,
    ForwardKwargs,
    Span,
)
from artaug.regional.guide import Guide
from artaug.regional.isolation import Isolation
from artaug.regional.latent_guide import LatentGuide, LatentStep, Predict
from artaug.regional.output_mix import OutputMix
from artaug.regional.regional_attention import RegionalAttention

_LEFT, _RIGHT, _FULL = Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1), Box(0, 0, 1, 1)
_TOLERANCE = 2e-4
_ROUNDING = 1e-5
_NOISE_TOLERANCE = 0.05
"""A UNet gets s / sqrt(s^2 + 1) of the noise, where s is the scheduler's highest level, about 14."""


@checked
def check_family(
    synthesizer: DiffusersSynthesizer, *, prompt: str = "a red barn", tolerance: float = _TOLERANCE
) -> None:
    """Check that a family draws and can be guided, with a synthesizer of its pipeline.

    Checked are: masks of pixels become masks of latents; the noise of a seed is what the denoiser of a drawing gets first; a
    plan without regions draws what the pipeline draws, bit for bit, with any guide; prompts that are encoded together are
    encoded as alone; a region over the full picture that repeats the plan's prompt changes nothing; every method of
    `RegionalAttention` agrees with the dense mask; another prompt in one half changes nothing that the tokens of the
    other half see in the first layer; a batch draws what each picture draws alone; noise levels fall; hooks and
    processors of the model are as before. A `LatentGuide` gets latents in the form of `Family.encode_images`, what it makes of
    them reaches the model, and one that moves nothing draws the plain picture, bit for bit. For a family that writes `Family.tokenized`: the tokens of a phrase are a prompt's
    own, and a drawing in which `AttentionProbe` reads them is the plain one, bit for bit. A small model with random weights in
    float32 and two steps are enough.

    Args:
        synthesizer: set to draw small pictures; its guide is not used.
        prompt: one that the model's encoders read.
        tolerance: of predictions, relative to their largest magnitude.

    Raises:
        AssertionError: with a sentence that names the failed check.
        ModelError: for a pipeline in another precision than float32, in which no two ways of computing agree so closely.
    """
    for name, part in synthesizer.pipeline.components.items():
        if isinstance(part, nn.Module) and (others := {weight.dtype for weight in part.parameters()} - {torch.float32}):
            raise ModelError(
                f"check_family compares ways of computing that agree in float32 alone: received the {name} in {others.pop()}. "
                "Load the pipeline in it, dtype=torch.float32, or call synthesizer.pipeline.to(torch.float32)."
            )
    checks = _FamilyChecks(dataclasses.replace(synthesizer, steps=max(2, synthesizer.steps)), prompt, tolerance)
    checks.check_masks()
    checks.check_initial_noise()
    checks.check_decoding()
    checks.check_plain()
    checks.check_prompts()
    checks.check_output_mix()
    checks.check_latents()
    checks.check_phrases()
    if checks.is_attentive:
        checks.check_noise_levels()
        checks.check_repeated_prompt()
        checks.check_methods()
        checks.check_leakage()
        checks.check_batch()


@dataclass(eq=False)
class Recording:
    """What a `RecordingDenoiser` has recorded of one run."""

    noise_levels: list[float] = field(default_factory=list)
    """One for each call of the denoiser under a guide."""
    spans: tuple[Span, ...] = ()
    """Of the last row of the last call."""
    first_output: list[Tensor] = field(default_factory=list)
    """Output of the first attention layer with image tokens: at the tokens of the left half, and of the first region's
    prompt where prompts are in the same sequence."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class RecordingDenoiser(AttentiveDenoiser):
    """A denoiser that computes as the one it wraps, and records what a guide sees of it."""

    wrapped: Any
    recording: Recording

    def patched(self) -> AbstractContextManager[None]:
        patched: AbstractContextManager[None] = self.wrapped.patched()
        return patched

    @property
    def sites(self) -> Sequence[AttentionSite]:
        sites: Sequence[AttentionSite] = self.wrapped.sites
        return sites

    @property
    def token_grid(self) -> tuple[int, int]:
        grid: tuple[int, int] = self.wrapped.token_grid
        return grid

    def branches(self, kwargs: ForwardKwargs) -> Branches:
        branches: Branches = self.wrapped.branches(kwargs)
        return branches

    def with_prompt_embeds(
        self, kwargs: ForwardKwargs, rows: Sequence[int], prompts: Sequence[EncodedPrompt]
    ) -> dict[str, Any]:
        changed: dict[str, Any] = self.wrapped.with_prompt_embeds(kwargs, rows, prompts)
        return changed

    def noise_level(self, kwargs: ForwardKwargs) -> float:
        level = float(self.wrapped.noise_level(kwargs))
        self.recording.noise_levels.append(level)
        return level

    def append_prompts(
        self, kwargs: ForwardKwargs, prompts: Sequence[Sequence[EncodedPrompt]], *, trim_padding: bool
    ) -> tuple[dict[str, Any], list[tuple[Span, ...]]]:
        changed, spans = self.wrapped.append_prompts(kwargs, prompts, trim_padding=trim_padding)
        self.recording.spans = spans[-1]
        return changed, spans

    def processor(self, site: AttentionSite, attention_fn: AttentionFn) -> AttentionProcessor:
        def recorded(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            output = attention_fn(query, key, value, attn_mask)
            if site.kind != "text" and not self.recording.first_output:
                self.recording.first_output = self._left_tokens(site, output[-1:].clone())
            return output

        return self.wrapped.processor(site, recorded)

    def _left_tokens(self, site: AttentionSite, output: Tensor) -> list[Tensor]:
        """Of (1, heads, tokens, channels), the image tokens of the left half and the tokens of region 1's prompt."""
        rows, columns = site.grid or self.token_grid
        left = (torch.arange(rows)[:, None] * columns + torch.arange(columns // 2)).flatten()
        if site.kind == "cross":
            return [output[:, :, left]]
        selected, start = [], 0
        for span in self.recording.spans:
            if span.kind == "image":
                selected.append(output[:, :, left + start])
            elif span.kind == "text" and span.prompt == 1:
                selected.append(output[:, :, start : start + span.length])
            start += span.length
        return selected


@final
@dataclass(frozen=True, eq=False)
class _Shift(LatentGuide):
    """Moves latents by a number, and keeps the shapes of latents and predictions."""

    by: float
    shapes: list[torch.Size] = field(default_factory=list)

    def moved(self, latents: Tensor, step: LatentStep, predict: Predict) -> Tensor:
        self.shapes.extend([latents.shape, predict(latents).shape])
        return latents + self.by


@dataclass(frozen=True, eq=False)
class _FamilyChecks:
    """The checks, on the predictions of one synthesizer under several guides."""

    synthesizer: DiffusersSynthesizer
    prompt: str
    tolerance: float

    @property
    def name(self) -> str:
        return type(self.family).__name__

    @property
    def family(self) -> Family:
        return self.synthesizer._bound_family  # noqa: SLF001 - of the same package

    @property
    def denoiser(self) -> Denoiser:
        return self.family.denoiser(self.family.encode_prompts([self.prompt]))

    @property
    def is_attentive(self) -> bool:
        return isinstance(self.denoiser, AttentiveDenoiser)

    @property
    def strict_isolation(self) -> Isolation:
        """The strictest isolation that has an effect on the model."""
        denoiser = self.denoiser
        joint = isinstance(denoiser, AttentiveDenoiser) and any(site.kind == "joint" for site in denoiser.sites)
        return Isolation(image_to_image="regions" if joint else "open")

    def check_masks(self) -> None:
        width, height = self.synthesizer.width, self.synthesizer.height
        latents = self.family.encode_images([Image.new("RGB", (width, height))])
        left_half = (torch.arange(width) < width // 2).float().expand(height, width)
        top_half = (torch.arange(height) < height // 2).float()[:, None].expand(height, width)
        subject = f"{self.name}: encode_masks gives"
        for half in (left_half, top_half):
            full, inside, outside = self.family.encode_masks(torch.stack([torch.ones_like(half), half, 1 - half]))
            assert full.shape == latents.shape[1:], (
                f"{subject} rows of shape {tuple(full.shape)} for latents of shape {tuple(latents.shape)}"
            )
            assert (full == 1).all(), f"{subject} other than ones for a mask of ones"
            mean, expected = inside.mean().item(), half.mean().item()
            assert abs(mean - expected) < _ROUNDING, f"{subject} a mean of {mean} for a mask with a mean of {expected}"
            assert torch.equal(inside, 1 - outside), f"{subject} masks that do not add up for two that do"

    def check_initial_noise(self) -> None:
        latents = self.family.encode_images([Image.new("RGB", (self.synthesizer.width, self.synthesizer.height))])
        noise = self.family.initial_noise([0], self.family.encode_prompts([self.prompt]))
        subject = f"{self.name}: initial_noise gives"
        assert noise.shape == latents.shape, (
            f"{subject} rows of shape {tuple(noise.shape[1:])} for latents of shape {tuple(latents.shape[1:])}"
        )
        calls: list[object] = []
        watch = self.family.module.register_forward_pre_hook(
            lambda _module, *inputs: calls.append(inputs), with_kwargs=True
        )
        with watch:
            dataclasses.replace(self.synthesizer, guide=None).synthesize(Plan(self.prompt), seed=0)
        # Which input is the latents, and which of its rows has the plan's prompt, each model decides: the last one has.
        inputs = [value.float().flatten() for value in tree_leaves(calls[0]) if isinstance(value, Tensor)]
        expected, count = noise.flatten(), noise.numel()
        gaps = [float((each[-count:] - expected).abs().max()) for each in inputs if each.numel() >= count]
        gap = min(gaps, default=math.inf) / float(expected.abs().max())
        assert gap <= _NOISE_TOLERANCE, f"{subject} other noise than the denoiser gets in the first step of a drawing"

    def check_decoding(self) -> None:
        family = self.family
        if type(family).decode_latents is Family.decode_latents:  # whose latents cannot be decoded
            return
        final: list[Tensor] = []
        subject = f"{self.name}: decode_latents gives"

        def keep_latents(
            _pipeline: object, _step: int, _timestep: object, kwargs: dict[str, Tensor]
        ) -> dict[str, Tensor]:
            final.append(kwargs["latents"])
            return kwargs

        pictures = self._drawn_by_pipeline(output_type="np", callback_on_step_end=keep_latents)
        drawn = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        with torch.no_grad():
            decoded = family.decode_latents(final[-1].float())
        assert decoded.shape == drawn.shape, (
            f"{subject} the shape {tuple(decoded.shape)}: expected {tuple(drawn.shape)}"
        )
        gap = float((decoded - drawn).abs().max())
        assert gap <= _ROUNDING, f"{subject} another picture than the pipeline, by up to {gap:.3g} of [0, 1]"
        with torch.enable_grad(), family.decoding():
            latents = torch.zeros_like(final[-1], dtype=torch.float32, requires_grad=True)
            family.decode_latents(latents).sum().backward()
        assert latents.grad is not None, f"{subject} pictures without gradient"
        assert latents.grad.any(), f"{subject} pictures with a gradient of 0"

    def check_plain(self) -> None:
        (reference,) = self._drawn_by_pipeline()
        for guide in (None, OutputMix(), *([RegionalAttention()] if self.is_attentive else [])):
            image = dataclasses.replace(self.synthesizer, guide=guide).synthesize(Plan(self.prompt), seed=0)
            assert image.tobytes() == reference.tobytes(), (
                f"{self.name} with guide {guide!r} draws a plan without regions otherwise than its pipeline"
            )

    @torch.no_grad()
    def _drawn_by_pipeline(self, **options: Any) -> Any:  # noqa: ANN401 - of the pipeline's call, whose output depends on them
        negative = self.family.negative
        with without_progress_bar(self.synthesizer.pipeline):
            return self.synthesizer.pipeline(
                **self.family.pipeline_kwargs(
                    self.family.encode_prompts([self.prompt]),
                    None if negative is None else self.family.encode_prompts([negative]),
                ),
                width=self.synthesizer.width,
                height=self.synthesizer.height,
                num_inference_steps=self.synthesizer.steps,
                generator=[torch.Generator().manual_seed(0)],
                **options,
            ).images

    def check_prompts(self) -> None:
        prompts = [self.prompt, f"{self.prompt} at night", ""]
        for prompt, encoded in zip(prompts, self.family.encode_separately(prompts), strict=True):
            (alone,) = self.family.encode_separately([prompt])
            subject = f"{self.name}: {prompt!r} encoded with other prompts"
            remedy = "Expected the same as alone: leave rows_are_independent False, or override select_prompt"
            assert encoded.token_slice == alone.token_slice, (
                f"{subject} has its tokens at {encoded.token_slice}, alone at {alone.token_slice}. {remedy}"
            )
            for name, expected in alone.conditioning.items():
                column = encoded.conditioning[name]
                shapes = f"has {name!r} of shape {tuple(column.shape)}, alone {tuple(expected.shape)}"
                assert column.shape == expected.shape, f"{subject} {shapes}. {remedy}"
                gap = float((column - expected).abs().max() / expected.abs().max().clamp_min(_ROUNDING))
                assert gap <= self.tolerance, f"{subject} differs in {name!r} by {gap:.1e}. {remedy}"

    def check_phrases(self) -> None:
        if type(self.family).tokenized is Family.tokenized or not self.prompt.strip():
            return
        (own,) = self.family.token_slices([self.prompt])
        whole, absent = self.family.phrase_tokens(self.prompt, [self.prompt, f"{self.prompt} at night"])
        subject = f"{self.name}: phrase_tokens gives"
        assert whole, f"{subject} no tokens for the whole of {self.prompt!r}"
        assert own.start <= whole[0] <= whole[-1] < own.stop, (
            f"{subject} the tokens {whole} for the whole of {self.prompt!r}, whose own tokens are at {own}"
        )
        assert not absent, f"{subject} the tokens {absent} for a phrase that {self.prompt!r} does not hold"
        words = self.family.phrase_tokens(self.prompt, self.prompt.split())
        spelled = set().union(*map(set, words))
        assert spelled <= set(whole), f"{subject} tokens for the words of {self.prompt!r} that the whole of it lacks"
        if self.is_attentive:
            maps: list[AttentionMaps] = []
            plain = self._predictions([Plan(self.prompt)], None)
            read = self._predictions([Plan(self.prompt)], AttentionProbe(phrases=[self.prompt], receive=maps.append))
            assert all(map(torch.equal, read, plain)), f"{self.name}: AttentionProbe changes a prediction"
            least = min(float(layer.maps.min()) for call in maps for layer in call.layers)
            most = max(float(layer.maps.max()) for call in maps for layer in call.layers)
            assert 0 <= least <= most <= 1 + _ROUNDING, f"{self.name}: probabilities run from {least} to {most}"

    def check_latents(self) -> None:
        plain = self._predictions([Plan(self.prompt)], None)
        still, shifted = (_Shift(by) for by in (0.0, 1.0))
        moved = self._predictions([Plan(self.prompt)], shifted)
        kept = self._predictions([Plan(self.prompt)], still)
        assert all(map(torch.equal, kept, plain)), f"{self.name}: a LatentGuide that moves nothing changes a prediction"
        assert not torch.equal(moved[0], plain[0]), (
            f"{self.name}: latents that a LatentGuide moves do not reach the model"
        )
        expected = self.family.initial_noise([0], self.family.encode_prompts([self.prompt])).shape
        assert set(still.shapes) == {expected}, (
            f"{self.name}: a LatentGuide gets latents and predictions of the shapes {set(still.shapes)}, and latents have {expected}"
        )

    def check_output_mix(self) -> None:
        plain = self._predictions([Plan(self.prompt)], None)
        mixed = self._predictions([self._plan(_FULL, self.prompt)], OutputMix())
        self._assert_close(mixed, plain, "OutputMix with a region over everything that repeats the plan's prompt")
        changed = self._predictions([self._plan(_FULL, f"{self.prompt} at night")], OutputMix())
        assert not torch.equal(plain[0], changed[0]), f"{self.name}: OutputMix does not read a region's prompt"

    def check_noise_levels(self) -> None:
        # With the default of all levels, none is read.
        reading = Isolation(sigma_range=(_ROUNDING, 1.0))
        recording = self._record(self._plan(_LEFT, self.prompt), RegionalAttention(isolation=reading))
        levels = recording.noise_levels
        message = f"{self.name}: noise levels of a run are {levels}: expected them to fall, in [0, 1]"
        assert all(later <= earlier for earlier, later in pairwise(levels)), message
        assert all(0 <= level <= 1 for level in levels), message
        assert recording.first_output, f"{self.name}: no layer of denoiser.sites was computed in a run"

    def check_repeated_prompt(self) -> None:
        plain = self._predictions([Plan(self.prompt)], None)
        for isolation in (Isolation(), self.strict_isolation):
            guide = RegionalAttention(isolation=isolation, trim_padding=False)
            guided = self._predictions([self._plan(_FULL, self.prompt)], guide)
            self._assert_close(guided, plain, f"{guide!r} with a region over everything that repeats the plan's prompt")
        changed = self._predictions(
            [self._plan(_FULL, f"{self.prompt} at night")], RegionalAttention(isolation=self.strict_isolation)
        )
        assert not torch.equal(plain[0], changed[0]), f"{self.name}: RegionalAttention does not read a region's prompt"

    def check_methods(self) -> None:
        soft = Region(Box(0.1, 0.2, 0.6, 0.9), "a blue door", weight=2.0, feather=0.05)
        plan = Plan(self.prompt, (soft, Region(_LEFT, "ivy")))
        for isolation in (None, self.strict_isolation):
            dense = self._predictions([plan], RegionalAttention(isolation=isolation, method="dense"))
            for method in ("auto", "merged"):
                guided = self._predictions([plan], RegionalAttention(isolation=isolation, method=method))
                self._assert_close(guided, dense, f"RegionalAttention(method={method!r}) against the dense mask")

    def check_leakage(self) -> None:
        short, long, reordered = "ivy", "a very old and crooked oak", "a crooked old and very oak"
        seen = {
            prompt: self._record(
                Plan(self.prompt, (Region(_LEFT, "a blue door"), Region(_RIGHT, prompt))),
                RegionalAttention(isolation=self.strict_isolation),
            ).first_output
            for prompt in (short, long, reordered)
        }
        what = "what the left half sees in the first layer, by another prompt in the right half"
        # A longer sequence is summed in another order.
        self._assert_close(seen[short], seen[long], what)
        lengths = {len(range(*tokens.indices(1 << 20))) for tokens in self.family.token_slices([long, reordered])}
        if len(lengths) == 1:
            assert all(map(torch.equal, seen[long], seen[reordered])), f"{self.name}: {what}, differs"

    def check_batch(self) -> None:
        plans = [self._plan(_LEFT, "a blue door"), Plan(self.prompt), self._plan(_RIGHT, "ivy on a wall")]
        together = self._predictions(plans, RegionalAttention())[0]
        for index, plan in enumerate(plans):
            alone = self._predictions([plan], RegionalAttention(), seeds=[index])[0]
            what = f"picture {index} of a batch against the same picture alone"
            self._assert_close([together[index]], [alone[0]], what)

    def _record(self, plan: Plan, guide: Guide) -> Recording:
        """Draw one plan, and record what the guide sees of the denoiser."""
        recording = Recording()

        class RecordingFamily(type(self.family)):  # type: ignore[misc]
            def denoiser(self, conditioning: Conditioning) -> Denoiser:
                wrapped = super().denoiser(conditioning)
                return RecordingDenoiser(
                    module=wrapped.module,
                    grid=wrapped.grid,
                    isolation=wrapped.isolation,
                    wrapped=wrapped,
                    recording=recording,
                )

        dataclasses.replace(self.synthesizer, guide=guide, family=RecordingFamily).synthesize(plan, seed=0)
        return recording

    def _predictions(
        self, plans: Sequence[Plan], guide: Guide | None, *, seeds: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Predictions of a run, step by step, after guidance; fails if the run left something on the model."""
        module, scheduler = self.family.module, self.synthesizer.pipeline.scheduler
        before, predictions, step = _hooks_and_processors(module), [], scheduler.step
        synthesizer = dataclasses.replace(self.synthesizer, guide=guide)

        @functools.wraps(step)
        def recording_step(prediction: Tensor, *args: object, **kwargs: object) -> object:
            predictions.append(prediction.clone())
            return step(prediction, *args, **kwargs)

        scheduler.step = recording_step
        try:
            synthesizer.synthesize_batch(plans, seeds=seeds or range(len(plans)))
        finally:
            del scheduler.step
        assert _hooks_and_processors(module) == before, f"{self.name}: {guide!r} left something behind on the model"
        return predictions

    def _plan(self, box: Box, prompt: str) -> Plan:
        return Plan(self.prompt, (Region(box, prompt),))

    def _assert_close(self, predictions: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
        counts = f"{len(predictions)} predictions instead of {len(expected)}"
        assert len(predictions) == len(expected), f"{self.name}: {what}: {counts}"
        for step, (prediction, reference) in enumerate(zip(predictions, expected, strict=True)):
            gap = float((reference - prediction).abs().max() / reference.abs().max())
            assert gap <= self.tolerance, f"{self.name}: {what}: predictions differ by {gap:.1e} at step {step + 1}"


def _hooks_and_processors(root: torch.nn.Module) -> list[object]:
    """What a guide could leave on a model."""
    return [
        (
            list(module._forward_hooks.values()),  # noqa: SLF001 - torch has no public list of them
            list(module._forward_pre_hooks.values()),  # noqa: SLF001 - likewise
            "forward" in vars(module),
            getattr(module, "processor", None),
        )
        for module in root.modules()
    ]
