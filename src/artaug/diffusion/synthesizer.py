"""The synthesizer for diffusers pipelines: it draws plans, with guidance by regions and with active LoRAs."""

import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, final

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor, nn

from artaug._internal.annotations import checked
from artaug._internal.arguments import check_argument, check_count, check_items
from artaug._internal.devices import DType, check_placement, component_dtypes, log_loaded, resolve_device
from artaug._internal.digests import digest
from artaug._internal.modules import frozen
from artaug._internal.text import changed_fields
from artaug._internal.weights import check_safetensors, model_errors
from artaug.canvas import Canvas
from artaug.diffusion.caches import cache_contexts_named, cache_settings, check_trains_uncached
from artaug.diffusion.families import common
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.canvases import Start
from artaug.diffusion.families.registry import family_at, family_of
from artaug.diffusion.latent_moves import moved_latents
from artaug.diffusion.locking import exclusive_drawing, exclusive_use
from artaug.diffusion.offload import check_trainable
from artaug.diffusion.precision import mixed_precision
from artaug.diffusion.seeding import check_reproducible, seeded_scheduler
from artaug.errors import GuideError, InvalidValueError, NonFiniteError, TokensError
from artaug.lora.applied import check_called
from artaug.lora.lora import LoRA
from artaug.plan import Plan
from artaug.regional.denoiser import Conditioning
from artaug.regional.guide import Guide, declines, steer
from artaug.regional.guided_run import GuidedRun
from artaug.regional.latent_guide import LatentMoves
from artaug.synthesis import Synthesizer
from artaug.tokens import Tokens
from artaug.training.model import DiffusionModel
from artaug.training.sampled_latents import SampledLatents


@checked
@dataclass(frozen=True, eq=False)
class ActiveLoRA:
    """A LoRA that a synthesizer draws with, and its scale."""

    lora: LoRA
    scale: float = 1.0


@checked
@final
@dataclass(frozen=True, kw_only=True, eq=False)
class DiffusersSynthesizer(Synthesizer):
    """Draws with a diffusers pipeline, which it does not change.

    A plan without regions draws bit for bit what ``pipeline(...)`` draws with the same options and
    ``generator=torch.Generator().manual_seed(seed)``. The pipeline is shared and never copied: guides and LoRAs are
    installed for one call and removed after it. Threads take turns: while one draws or trains with a pipeline, others
    that use it, or a part of it, wait.

    A scheduler that adds noise draws it from each picture's own generator.

    Raises:
        ModelError: for a pipeline of an unknown family, with a part in training mode or a scheduler whose noise no seed
            decides, or a size or option that its family does not support.
        InvalidValueError: for fewer than one step, or a negative prompt and ``true_cfg_scale`` that would be ignored.
        LoRAMismatchError: for a LoRA that names layers the model does not have.
        TokensError: for words that the model's tokenizers know already, or rows that are as wide as none of its embeddings.
    """

    pipeline: DiffusionPipeline = field(repr=False)
    """The diffusers pipeline, loaded and placed by its owner (offloaded, quantized, compiled)."""
    guide: Guide | None = None
    """What acts on the model while it draws, such as how regions take effect: without a guide that reads regions, a plan with
    regions is an error."""
    width: int = 1024
    """In pixels, a multiple of the model's image token."""
    height: int = 1024
    """In pixels, a multiple of the model's image token."""
    steps: int = 28
    """Denoising steps."""
    guidance_scale: float | None = None
    """Guidance scale; None for what the family recommends (FLUX.1: 3.5 where the model takes it)."""
    negative_prompt: str | None = None
    """Negative prompt of every picture; needs ``true_cfg_scale`` above 1."""
    true_cfg_scale: float = 1.0
    """Scale of classifier-free guidance against ``negative_prompt``. Above 1 it doubles the time of a step."""
    max_sequence_length: int | None = None
    """Tokens of a prompt that the model reads, None for the family's default; a longer prompt is cut with a warning."""
    loras: tuple[ActiveLoRA, ...] = ()
    """What `with_lora` has added; their updates add up."""
    tokens: Tokens | None = None
    """Words of one's own, which `with_tokens` has added. A drawing in whose prompts none of them occurs is an error."""
    sampled: SampledLatents | None = field(default=None, repr=False)
    """Where the latents of what it draws are kept, see `keeping_latents`."""
    family: type[Family] | None = field(default=None, repr=False)
    """Adapter for the pipeline; None to recognise it. Give your own for a pipeline that artaug does not know."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InvalidValueError(f"DiffusersSynthesizer(steps={self.steps}) would draw noise: need at least 1.")
        module = self._bound_family.module
        check_reproducible(self.pipeline)
        for active in self.loras:
            active.lora.check_fits(module)
        if self.tokens is not None:
            with exclusive_use(self.pipeline), self._bound_family.installed(self.tokens):
                pass  # which has refused what does not fit

    def __repr__(self) -> str:
        """The pipeline's class, where it is from, and the settings that are not the defaults."""
        source = "/".join(Path(getattr(self.pipeline.config, "_name_or_path", "") or "").parts[-2:])  # not a whole path
        model = f"{type(self.pipeline).__name__} {source!r}" if source else type(self.pipeline).__name__
        return f"DiffusersSynthesizer({', '.join([model, *changed_fields(self)])})"

    @classmethod
    def from_pretrained(  # noqa: D417, PLR0913 - the class's own fields, documented there
        cls,
        source: str | os.PathLike[str],
        *,
        guide: Guide | None = None,
        dtype: DType = "auto",
        device: str | torch.device = "auto",
        width: int = 1024,
        height: int = 1024,
        steps: int = 28,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        true_cfg_scale: float = 1.0,
        max_sequence_length: int | None = None,
        allow_pickle: bool = False,
    ) -> Self:
        """Load a pipeline from a folder or the Hub and draw with it.

        Args:
            source: a folder that ``save_pretrained`` wrote, or a Hub name like ``"black-forest-labs/FLUX.1-dev"``.
            guide: how regions take effect.
            dtype: of the weights; ``"auto"`` for what each part has in the checkpoint (FLUX.1: bfloat16), on a CPU float32
                in place of float16, which is slow there.
            device: where to put the pipeline; ``"auto"`` for the GPU where there is one, else the CPU. To offload, load it
                yourself and use the constructor.
            width, height, steps, guidance_scale, negative_prompt, true_cfg_scale, max_sequence_length: the fields.
            allow_pickle: also read weights that are not in safetensors, which can run code when they are read.

        Raises:
            ModelError: if there is no pipeline at ``source``, or one of an unknown family, or no such ``device``; no weights
                are read then. If a part of it has no weights in safetensors and ``allow_pickle`` is False.
            InvalidValueError: for a ``dtype`` or ``device`` that torch does not have; nothing is read then.
        """
        check_placement("DiffusersSynthesizer.from_pretrained", dtype=dtype, device=device)
        placed_on = resolve_device(device)
        family = family_at(source)
        expected = (
            f"Expected a {family.pipeline_class.__name__} with weights in safetensors; pickled ones (.bin), which can run "
            "code, are read only with allow_pickle=True."
        )
        with model_errors(f"{str(source)!r} could not be loaded", expected=expected):
            use_safetensors = None if allow_pickle else True
            download = family.pipeline_class.download  # type: ignore[attr-defined]
            folder = Path(source if Path(source).is_dir() else download(source, use_safetensors=use_safetensors))
            if not allow_pickle:
                check_safetensors(folder)
            pipeline = family.pipeline_class.from_pretrained(  # type: ignore[attr-defined]
                source,
                dtype={"default": torch.float32, **component_dtypes(folder, placed_on)} if dtype == "auto" else dtype,
                use_safetensors=use_safetensors,
            )
        with model_errors(f"{str(source)!r} could not be moved to {str(placed_on)!r}"):
            pipeline = pipeline.to(placed_on)
        parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        log_loaded(source, parts)
        return cls(
            pipeline=pipeline,
            guide=guide,
            width=width,
            height=height,
            steps=steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            true_cfg_scale=true_cfg_scale,
            max_sequence_length=max_sequence_length,
        )

    def synthesize(self, plan: Plan, *, seed: int) -> Image:
        """Draw one picture.

        Raises:
            GuideError: if the plan has regions and this synthesizer no guide.
            NonFiniteError: if latents or pixels hold NaN or infinity.
        """
        check_argument("synthesize", "plan", plan, Plan)
        return self.synthesize_batch([plan], seeds=[seed])[0]

    def synthesize_batch(self, plans: Sequence[Plan], *, seeds: Sequence[int]) -> list[Image]:
        """Draw several pictures in one call of the pipeline; each plan has its own regions, or none.

        Plans whose canvases differ in more than the picture and the mask, or that have none, take a call for each kind.

        A picture of a batch equals the same picture drawn alone up to rounding, because how a matrix product rounds
        depends on its size.

        Raises:
            GuideError: if a plan has regions and this synthesizer no guide.
            ModelError: if a hook or callback of a drawing calls this, the scheduler draws from torch's global state, or a
                canvas cannot be drawn from; then nothing is drawn.
            NonFiniteError: if latents or pixels hold NaN or infinity.
        """
        if len(plans) != len(seeds):
            raise InvalidValueError(f"each plan needs its seed: received {len(plans)} plans and {len(seeds)} seeds.")
        check_items("synthesize_batch", "plans", plans, Plan)
        family = self._bound_family
        starts: dict[Start, list[int]] = {}
        for index, plan in enumerate(plans):
            family.check_start(plan, self.steps)
            starts.setdefault(Start.of(plan), []).append(index)
        images: dict[int, Image] = {}
        for members in starts.values():
            drawn = self._draw(family, [plans[index] for index in members], [seeds[index] for index in members])
            images |= zip(members, drawn, strict=True)
        return [images[index] for index in range(len(plans))]

    def _draw(self, family: Family, plans: Sequence[Plan], seeds: Sequence[int]) -> list[Image]:
        """Draw plans that start alike."""
        common.warn_if_tiled(self.pipeline, width=self.width, height=self.height)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with (
            torch.no_grad(),
            exclusive_drawing(self.pipeline),
            _offloaded_after_error(self.pipeline),
            self._active_loras(family.module),
            without_progress_bar(self.pipeline),
            seeded_scheduler(self.pipeline.scheduler, generators),
            self._installed_tokens(family, plans),
            family.reading_references(plans) as references,
        ):
            check_reproducible(self.pipeline)
            conditioning = family.encode_plans(plans)
            if self.guide is not None:
                conditioning = family.embed(self.guide, plans, conditioning)
            # After the guide, whose hooks know the tensors that the pipeline was given.
            with self._guidance(family, conditioning, plans) as run, mixed_precision(self.pipeline, family.module):
                given = [plan.canvas for plan in plans if plan.canvas is not None]
                canvases = [canvas for canvas in given if canvas.has_image or canvas.has_control]
                call = family.pipeline_call(canvases)
                with moved_latents(call.pipeline, run) as moves, cache_contexts_named(call.pipeline, family.module):
                    check = _StepCheck(family.module, self.guide, run, moves)
                    output = call.pipeline(
                        **family.pipeline_kwargs(conditioning, family.encode_negative(plans)),
                        **call.kwargs,
                        **references,
                        num_inference_steps=self.steps,
                        generator=generators,
                        callback_on_step_end=check,
                        output_type="pt",
                    )
            if (
                call.pipeline is not self.pipeline
            ):  # which has not offloaded what the hooks of this one brought to the device
                self.pipeline.maybe_free_model_hooks()
            check.raise_if_not_finite()
        _warn_of_black_images(output, plans)
        images = self._to_pil(output.images)
        if self.sampled is not None:
            self.sampled.add(images, check.latents)
        return images

    def with_lora(self, lora: LoRA, *, scale: float = 1.0) -> Self:
        """A synthesizer that draws with ``lora`` in addition to those active already; this one is not changed.

        Both share the pipeline: nothing is copied, loaded or fused, and they can draw in turn. It keeps no latents.

        Raises:
            LoRAMismatchError: if the LoRA names layers the model does not have.
        """
        return dataclasses.replace(self, loras=(*self.loras, ActiveLoRA(lora, scale)), sampled=None)

    def keeping_latents(self, sampled: SampledLatents) -> Self:
        """A synthesizer that keeps the final latents of what it draws; this one is not changed.

        A training with it learns from these instead of encoding the pictures again: of its own drawings alone. It draws the
        same pictures.
        """
        check_argument("keeping_latents", "sampled", sampled, SampledLatents)
        return dataclasses.replace(self, sampled=sampled)

    def with_tokens(self, tokens: Tokens) -> Self:
        """A synthesizer whose prompts can use the words of ``tokens``, beside those that it has; this one is not changed.

        Both share the pipeline. Tokenizers and embeddings read the words during a drawing, and are as before after it. It keeps no
        latents.

        Raises:
            TokensError: for a word that the model's tokenizers, or tokens added before, know already, or for rows that are as wide
                as none of its embeddings.
        """
        check_argument("with_tokens", "tokens", tokens, Tokens)
        return dataclasses.replace(self, tokens=tokens if self.tokens is None else self.tokens | tokens, sampled=None)

    def new_tokens(self, word: str, *, like: str, vectors: int = 1) -> Tokens:
        """Rows to begin with: each is the mean embedding of the tokens of ``like``, in every text encoder.

        diffusers' script of textual inversion begins so, with a ``like`` of one token.

        Args:
            word: what the new tokens are to be called.
            like: a word, or several, that the model knows.
            vectors: rows of the word in each encoder.

        Raises:
            TokensError: if a text encoder does not know ``like``.
            ModelError: if the family does not say which its text encoders are.
        """
        check_count("new_tokens", "vectors", vectors)
        with exclusive_use(self.pipeline):
            rows = self._bound_family.embedding_of(like)
        return Tokens({word: {encoder: row.repeat(vectors, 1) for encoder, row in rows.items()}})

    @contextmanager
    def training(self) -> Iterator[DiffusionModel]:
        """Yield the model to a trainer for a ``with`` block: frozen, with the LoRAs of this synthesizer active.

        Raises:
            ModelError: if the denoiser is offloaded in a way that does not allow a backward pass, or a hook or callback of
                a drawing calls this, or the model edits pictures.
        """
        family = self._bound_family
        family.check_trainable()
        check_trainable(family.module)
        check_trains_uncached(family.module)
        with (
            exclusive_use(self.pipeline),
            self._active_loras(family.module),
            nullcontext() if self.tokens is None else family.installed(self.tokens),
            frozen(family.module),
            mixed_precision(self.pipeline, family.module),
        ):
            yield family

    @property
    def draws_regions(self) -> bool:
        """Whether it has a guide that reads them."""
        return self.guide is not None and self.guide.reads_regions

    def canvas_steps(self, canvas: Canvas) -> int:
        """How many of its steps it draws when it starts from this canvas: a strength becomes steps as the pipeline counts.

        SD and SDXL round down, flow models up. Editing models draw all.

        Raises:
            ModelError: if the model has no pipeline for it, the canvas has another size than what is drawn, or no step would be
                drawn.
        """
        return self._bound_family.canvas_steps(canvas, self.steps)

    def check_plan(self, plan: Plan) -> None:
        """Refuse a plan that it cannot draw.

        Raises:
            GuideError: for regions without a guide that reads them, or a guide that cannot act on the model as the plan needs it.
            ModelError: for a canvas that it cannot draw from, or a plan without one for a model that only edits.
        """
        family = self._bound_family
        family.check_start(plan, self.steps)
        self._check_regions(family, [plan])
        if self.guide is not None and not declines(self.guide, [plan]):
            family.check_guided(self.guide, [plan])

    @property
    def picture_size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height

    @property
    def models(self) -> Sequence[nn.Module]:
        """The pipeline's denoiser, text encoders, VAE and whatever other modules it has."""
        return [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]

    @property
    def fingerprint(self) -> str:
        """What the model's predictions depend on beside its weights: LoRAs, guidance, schedule, length of prompts."""
        loras = ", ".join(f"{active.lora.digest[:16]} x {active.scale!r}" for active in self.loras)
        # Names that begin with _ are private to diffusers, and their order differs from process to process.
        settings = sorted(item for item in self.pipeline.scheduler.config.items() if item[0][0] != "_")
        schedule = digest(repr(settings))[:16]
        return (
            f"LoRAs [{loras}], guidance {self.guidance_scale}, schedule {schedule}, length {self.max_sequence_length}"
            f"{'' if self.tokens is None else f', tokens {self.tokens.digest}'}{'' if self.sampled is None else ', sampled latents'}"
        )

    @property
    def identity(self) -> Mapping[str, object]:
        """All that decides its pictures, by name: settings, guide, LoRAs, and every part of the pipeline with its place."""
        family = self._bound_family
        parts = {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}
        settings = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.repr}
        return {
            "pipeline": type(self.pipeline),
            "family": self.family or family_of(self.pipeline),
            "components": parts,
            "configs": {name: _public_config(part) for name, part in parts.items()},
            "dtypes": {name: part.dtype for name, part in parts.items() if hasattr(part, "dtype")},
            "device": str(self.pipeline.device),
            "cache": cache_settings(family.module),
            **family.settings,
            "scheduler": {"class": type(self.pipeline.scheduler), **_public_config(self.pipeline.scheduler)},
            **settings,
            "loras": [f"{active.lora.digest} x {active.scale!r}" for active in self.loras],
        }

    @property
    def _bound_family(self) -> Family:
        family = self.family or family_of(self.pipeline)
        return family(
            pipeline=self.pipeline,
            width=self.width,
            height=self.height,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            true_cfg_scale=self.true_cfg_scale,
            max_sequence_length=family.default_max_sequence_length
            if self.max_sequence_length is None
            else self.max_sequence_length,
            sampled=self.sampled,
        )

    @contextmanager
    def _installed_tokens(self, family: Family, plans: Sequence[Plan]) -> Iterator[None]:
        """The words of this synthesizer, of which one at least has to occur in a prompt."""
        if self.tokens is None:
            yield
            return
        regions = [region for plan in plans for region in plan.regions]
        texts = [*(plan.prompt for plan in plans), *(region.prompt for region in regions)]
        texts += [text for text in (family.negative, *(region.negative_prompt for region in regions)) if text]
        if not any(word in text for word in self.tokens.words for text in texts):
            raise TokensError(
                f"none of the words {list(self.tokens.words)} occurs in a prompt (first: {plans[0].prompt!r}), so these tokens would "
                "have no effect. Use one as it is written there, or draw with the synthesizer that has no tokens."
            )
        with family.installed(self.tokens):
            yield

    @contextmanager
    def _active_loras(self, module: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for active in self.loras:
                stack.enter_context(active.lora.applied_to(module, scale=active.scale))
            yield

    def _guidance(
        self, family: Family, conditioning: Conditioning, plans: Sequence[Plan]
    ) -> AbstractContextManager[GuidedRun | None]:
        """The guide, applied unless it declines; then the plain pipeline draws."""
        self._check_regions(family, plans)
        if self.guide is None or declines(self.guide, plans):
            return nullcontext()
        family.check_guided(self.guide, plans)
        return steer(self.guide, family.guided_run(plans, conditioning))

    def _check_regions(self, family: Family, plans: Sequence[Plan]) -> None:
        """Refuse regions that would have no effect."""
        regional = [plan for plan in plans if plan.regions]
        if regional and (self.guide is None or not self.guide.reads_regions):
            reader = "no guide" if self.guide is None else f"{self.guide!r}, which does not read them, and no guide"
            raise GuideError(
                f"{len(regional)} of {len(plans)} plans have regions (first: {regional[0].prompt!r}, "
                f"{len(regional[0].regions)} of them) and this synthesizer has {reader} to read them. "
                "Give it one: DiffusersSynthesizer(..., guide=artaug.OutputMix()); Together applies several."
            )
        negative = [region for plan in regional for region in plan.regions if region.negative_prompt is not None]
        if negative and family.negative is None:
            raise GuideError(
                f"{negative[0]!r} has a negative prompt, and this synthesizer draws without classifier-free guidance, "
                "so it would have no effect. Set a negative prompt and a guidance scale for the whole picture, too."
            )

    def _to_pil(self, pixels: Tensor) -> list[Image]:
        """Convert (batch, channels, height, width) to images; diffusers alone would turn NaN into black silently."""
        if not pixels.isfinite().all():
            raise NonFiniteError(
                "the VAE decoded finite latents to NaN. In float16 some overflow: load it in bfloat16 or float32."
            )
        processor = self.pipeline.image_processor
        images: list[Image] = processor.numpy_to_pil(processor.pt_to_numpy(pixels))
        return images


def _public_config(part: object) -> Mapping[str, object]:
    """The configuration of a part of diffusers; names that begin with _ say where it is from, and by what version."""
    config = getattr(part, "config", None)
    if not isinstance(config, Mapping):  # of transformers, where the weights' shapes say as much
        return {}
    return {name: item for name, item in sorted(config.items()) if name[0] != "_"}


def _warn_of_black_images(output: object, plans: Sequence[Plan]) -> None:
    """Warn of pictures that the pipeline's safety checker replaced by black ones."""
    flags = getattr(output, "nsfw_content_detected", None) or []
    flagged = [plan.prompt for plan, flag in zip(plans, flags, strict=False) if flag]
    if flagged:
        warnings.warn(
            f"the pipeline's safety checker painted {len(flagged)} of {len(plans)} pictures black "
            f"(first prompt: {flagged[0]!r}). They are of no use for training.",
            stacklevel=3,
        )


class _StepCheck:
    """The pipeline's callback: LoRAs and guide acted in the first step, and latents are finite after every step.

    What moves latents gets to know here what the pipeline goes on with.
    """

    def __init__(
        self, module: nn.Module, guide: Guide | None, run: GuidedRun | None, moves: LatentMoves | None
    ) -> None:
        self._module, self._guide, self._run, self._moves = module, guide, run, moves
        self.latents = torch.empty(0)
        """After the last step that was taken."""
        self._finite: list[Tensor] = []
        """Of each step, on the device. To read one after each step, the device would have to wait for the next."""

    def __call__(
        self, _pipeline: DiffusionPipeline, _step: int, _timestep: Tensor, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        if not self._finite:
            check_called(self._module)
            if self._run is not None:
                self._run.check_called(self._guide)
        self.latents = tensors["latents"]
        self._finite.append(self.latents.isfinite().all())
        if self._moves is not None:
            self._moves.end_step(tensors["latents"])
        return {}

    def raise_if_not_finite(self) -> None:
        """Refuse what came out of a step that made NaN.

        Raises:
            NonFiniteError: naming the first such step.
        """
        finite = torch.stack(self._finite).tolist() if self._finite else []
        if not all(finite):
            raise NonFiniteError(
                f"the latents hold NaN or infinity after step {finite.index(False) + 1}. "
                "Check the weights and the active LoRAs; a float16 model may need bfloat16."
            )


@contextmanager
def _offloaded_after_error(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Take the models of a pipeline with model offload off the device after an exception in a ``with`` block.

    A pipeline does so at its end only. A model that was left there would take the room that a smaller batch needs.
    """
    try:
        yield
    except BaseException:
        pipeline.maybe_free_model_hooks()
        raise


@contextmanager
def without_progress_bar(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Hide a pipeline's progress bar for a ``with`` block: the loop shows one bar for all pictures."""
    config = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**config, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**config)
