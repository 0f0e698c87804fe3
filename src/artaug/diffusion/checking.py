"""For people who write a `Family`: one call that checks what guides promise of every model.

The check raises `AssertionError` with a sentence that says what was promised and what came.
"""

# ruff: noqa: S101 - asserting is what a check is for, as in artaug.testing

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor

from artaug.diffusion.families.base import Family
from artaug.diffusion.spying import First, Spy
from artaug.diffusion.synthesizer import DiffusersSynthesizer, _without_progress_bar
from artaug.geometry import Box
from artaug.plan import Plan, Region
from artaug.regional.denoiser import AttentiveDenoiser, Conditioning, Denoiser
from artaug.regional.guide import Guide
from artaug.regional.isolation import Isolation
from artaug.regional.output_mix import OutputMix
from artaug.regional.regional_attention import RegionalAttention

_LEFT, _RIGHT, _ALL = Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1), Box(0, 0, 1, 1)
_TOLERANCE = 2e-4
_ROUNDING = 1e-5


def check_family(
    synthesizer: DiffusersSynthesizer, *, prompt: str = "a red barn", tolerance: float = _TOLERANCE
) -> None:
    """Check that a family draws, and is guided, as guides promise, on a synthesizer of its pipeline.

    Checked are: masks become masks of latents; a plan without regions draws what no guide draws, bit for bit; a region of everything that repeats the
    plan's prompt changes nothing; every way of computing attention agrees with the dense mask; another prompt in one
    half changes nothing that the other half sees in the first layer; a batch draws what each picture draws alone; noise
    levels fall; nothing is left behind on the model. A small model with random weights in float32 and two steps will do.

    Args:
        synthesizer: set to draw small pictures; its guide is not used.
        prompt: one the model's encoders read.
        tolerance: of predictions, relative to their largest magnitude.

    Raises:
        AssertionError: with a sentence naming the promise that was broken.
    """
    runs = _Runs(dataclasses.replace(synthesizer, steps=max(2, synthesizer.steps)), prompt, tolerance)
    runs.check_masks()
    runs.check_plain()
    runs.check_output_mix()
    if runs.attentive:
        runs.check_levels()
        runs.check_repeating()
        runs.check_methods()
        runs.check_leakage()
        runs.check_batch()


@dataclass(frozen=True, eq=False)
class _Runs:
    """Runs of one synthesizer under several guides, and what its denoiser predicted in them."""

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
    def attentive(self) -> bool:
        return isinstance(self.family.denoiser(self.family.encode_prompts([self.prompt])), AttentiveDenoiser)

    @property
    def apart(self) -> Isolation:
        """The strictest isolation that has an effect on the model."""
        denoiser = self.family.denoiser(self.family.encode_prompts([self.prompt]))
        joint = isinstance(denoiser, AttentiveDenoiser) and any(site.kind == "joint" for site in denoiser.sites)
        return Isolation(image_to_image="regions" if joint else "open")

    def check_masks(self) -> None:
        width, height = self.synthesizer.width, self.synthesizer.height
        latents = self.family.encode_images([Image.new("RGB", (width, height))])
        across = (torch.arange(width) < width // 2).float().expand(height, width)
        down = (torch.arange(height) < height // 2).float()[:, None].expand(height, width)
        said = f"{self.name}: encode_masks gives"
        for half in (across, down):
            everything, inside, outside = self.family.encode_masks(torch.stack([torch.ones_like(half), half, 1 - half]))
            assert everything.shape == latents.shape[1:], (
                f"{said} rows of shape {tuple(everything.shape)} for latents of shape {tuple(latents.shape)}"
            )
            assert (everything == 1).all(), f"{said} other than ones for a mask of ones"
            share, wanted = inside.mean().item(), half.mean().item()
            assert abs(share - wanted) < _ROUNDING, f"{said} a mean of {share} for a mask with a mean of {wanted}"
            assert torch.equal(inside, 1 - outside), f"{said} masks that do not add up for two that do"

    def check_plain(self) -> None:
        with torch.no_grad(), _without_progress_bar(self.synthesizer.pipeline):
            bare = self.synthesizer.pipeline(
                **self.family.arguments(self.family.encode_prompts([self.prompt]), self._negative()),
                width=self.synthesizer.width,
                height=self.synthesizer.height,
                num_inference_steps=self.synthesizer.steps,
                generator=[torch.Generator().manual_seed(0)],
            ).images[0]
        for guide in (None, OutputMix(), *([RegionalAttention()] if self.attentive else [])):
            drawn = dataclasses.replace(self.synthesizer, guide=guide).synthesize(Plan(self.prompt), seed=0)
            assert drawn.tobytes() == bare.tobytes(), (
                f"{self.name} with guide {guide!r} draws a plan without regions otherwise than its pipeline"
            )

    def check_output_mix(self) -> None:
        plain = self._predictions([Plan(self.prompt)], None)
        mixed = self._predictions([self._plan(_ALL, self.prompt)], OutputMix())
        self._same(plain, mixed, "OutputMix with a region of everything that repeats the plan's prompt")
        changed = self._predictions([self._plan(_ALL, f"{self.prompt} at night")], OutputMix())
        assert not torch.equal(plain[0], changed[0]), f"{self.name}: OutputMix does not read a region's prompt"

    def check_levels(self) -> None:
        levels: list[float] = []
        with self._spied(lambda spy: levels.append(spy.level)):
            self._predictions([self._plan(_LEFT, self.prompt)], RegionalAttention())
        said = f"{self.name}: noise levels of a run are {levels}: expected them to fall, in [0, 1]"
        assert levels, f"{self.name}: no layer of denoiser.sites was computed in a run"
        assert all(later <= earlier for earlier, later in pairwise(levels)), said
        assert all(0 <= level <= 1 for level in levels), said

    def check_repeating(self) -> None:
        plain = self._predictions([Plan(self.prompt)], None)
        for isolation in (Isolation(), self.apart):
            guide = RegionalAttention(isolation=isolation, trim_padding=False)
            told = self._predictions([self._plan(_ALL, self.prompt)], guide)
            self._same(plain, told, f"{guide!r} with a region of everything that repeats the plan's prompt")
        changed = self._predictions(
            [self._plan(_ALL, f"{self.prompt} at night")], RegionalAttention(isolation=self.apart)
        )
        assert not torch.equal(plain[0], changed[0]), f"{self.name}: RegionalAttention does not read a region's prompt"

    def check_methods(self) -> None:
        soft = Region(Box(0.1, 0.2, 0.6, 0.9), "a blue door", weight=2.0, feather=0.05)
        plan = Plan(self.prompt, (soft, Region(_LEFT, "ivy")))
        for isolation in (None, self.apart):
            dense = self._predictions([plan], RegionalAttention(isolation=isolation, method="dense"))
            for method in ("auto", "merged"):
                told = self._predictions([plan], RegionalAttention(isolation=isolation, method=method))
                self._same(dense, told, f"RegionalAttention(method={method!r}) against the dense mask")

    def check_leakage(self) -> None:
        told = []
        for said in ("ivy", "a very old and crooked oak"):
            first = First()
            with self._spied(first):
                plan = Plan(self.prompt, (Region(_LEFT, "a blue door"), Region(_RIGHT, said)))
                self._predictions([plan], RegionalAttention(isolation=self.apart))
            told.append(first.tokens)
        assert all(map(torch.equal, *told)), (
            f"{self.name}: another prompt in the right half changes what the left half sees in the first layer"
        )

    def check_batch(self) -> None:
        plans = [self._plan(_LEFT, "a blue door"), Plan(self.prompt), self._plan(_RIGHT, "ivy on a wall")]
        together = self._predictions(plans, RegionalAttention())[0]
        for number, plan in enumerate(plans):
            alone = self._predictions([plan], RegionalAttention(), seeds=[number])[0]
            self._same([alone[0]], [together[number]], f"picture {number} of a batch against the same picture alone")

    @contextmanager
    def _spied(self, watch: Callable[[Spy], None]) -> Iterator[None]:
        """Let ``watch`` see what guides see, for a while."""
        family = type(self.family)

        class Spied(family):  # type: ignore[misc, valid-type]
            def denoiser(self, conditioning: Conditioning) -> Denoiser:
                inner = super().denoiser(conditioning)
                return Spy(module=inner.module, grid=inner.grid, inner=inner, watch=watch)

        kept = self.synthesizer.family
        object.__setattr__(self.synthesizer, "family", Spied)
        try:
            yield
        finally:
            object.__setattr__(self.synthesizer, "family", kept)

    def _predictions(
        self, plans: Sequence[Plan], guide: Guide | None, *, seeds: Sequence[int] | None = None
    ) -> list[Tensor]:
        """What a run predicted, step by step, guidance included; and check that it left nothing behind."""
        module, scheduler = self.family.module, self.synthesizer.pipeline.scheduler
        before, told, step = _traces(module), [], scheduler.step
        synthesizer = dataclasses.replace(self.synthesizer, guide=guide)

        def watched(prediction: Tensor, *args: object, **options: object) -> object:
            told.append(prediction.clone())
            return step(prediction, *args, **options)

        scheduler.step = watched
        try:
            synthesizer.synthesize_batch(plans, seeds=seeds or range(len(plans)))
        finally:
            del scheduler.step
        assert _traces(module) == before, f"{self.name}: {guide!r} left something behind on the model"
        return told

    def _plan(self, box: Box, said: str) -> Plan:
        return Plan(self.prompt, (Region(box, said),))

    def _negative(self) -> Conditioning | None:
        return None if self.family.negative is None else self.family.encode_prompts([self.family.negative])

    def _same(self, wanted: Sequence[Tensor], told: Sequence[Tensor], what: str) -> None:
        assert len(wanted) == len(told), f"{self.name}: {what}: {len(told)} predictions instead of {len(wanted)}"
        for step, (one, other) in enumerate(zip(wanted, told, strict=True)):
            gap = float((one - other).abs().max() / one.abs().max())
            assert gap <= self.tolerance, f"{self.name}: {what}: predictions differ by {gap:.1e} at step {step + 1}"


def _traces(module: torch.nn.Module) -> list[object]:
    """What a run could leave behind."""
    return [
        (
            list(one._forward_hooks.values()),  # noqa: SLF001 - torch lists them nowhere else
            list(one._forward_pre_hooks.values()),  # noqa: SLF001 - likewise
            "forward" in vars(one),
            getattr(one, "processor", None),
        )
        for one in module.modules()
    ]
