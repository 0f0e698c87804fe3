"""What artaug has to know of a model family. All facts of one family stand in its folder beside this file."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from PIL.Image import Image
from torch import Tensor, nn

from artaug._internal.modules import unwrap
from artaug._internal.offloading import offload_hooks
from artaug.canvas import Canvas
from artaug.diffusion.caches import check_guide_beside_cache
from artaug.diffusion.families import common
from artaug.diffusion.families.canvases import (
    PipelineCall,
    check_control,
    check_size,
    controlled_call,
    mask_image,
    noised_call,
    plain_pipeline,
    steps_rounded_up,
)
from artaug.diffusion.families.tokenized import TokenizedPrompt
from artaug.diffusion.offload import encoders_of, on_cpu
from artaug.diffusion.word_embeddings import digest_of_installed, installed_tokens, mean_embeddings
from artaug.errors import GuideError, ModelError
from artaug.lora.formats import KeyMap
from artaug.plan import Plan, Region
from artaug.regional.denoiser import Conditioning, Denoiser, EncodedPrompt
from artaug.regional.guide import Guide, declines, embed, moves_embeddings
from artaug.regional.guided_run import EncodedPlan, EncodedRegion, GuidedRun
from artaug.regional.isolation import BALANCED, Isolation
from artaug.tokens import InstalledTokens, Tokens
from artaug.training.noise_schedule import NoiseSchedule
from artaug.training.sampled_latents import SampledLatents

_PROMPTS_PER_CALL = 64
"""So many region prompts are encoded together, at most: 64 of 512 tokens take about 10 GB in T5 XXL."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Family(ABC):
    """A diffusers pipeline of one model family, set to one picture size: how to draw, guide, train, estimate, export.

    A trainer sees it as a `DiffusionModel`, a synthesizer also calls the pipeline by it, and a guide gets a `Denoiser`
    from it. For a pipeline that artaug does not know, write a subclass and pass it as ``family=`` to
    `DiffusersSynthesizer`, `estimate` and `verify_export`.

    Raises:
        ModelError: by a subclass's ``__post_init__``, for a size or an option that its pipeline cannot work with.
    """

    pipeline_class: ClassVar[type]
    """The diffusers class of this family's pipelines. Its ``lora_state_dict`` also reads the family's LoRA files."""
    default_max_sequence_length: ClassVar[int] = 512
    """Tokens of a prompt that the model reads unless the user says otherwise."""
    key_map: ClassVar[KeyMap | None] = None
    """Names of the denoiser's layers in LoRA files other than diffusers' own; None if there are only diffusers' names."""
    rows_are_independent: ClassVar[bool] = False
    """Whether a prompt's row of `encode_prompts` is the same, to rounding, whatever prompts it is encoded with: its encoders
    read prompts padded to one length, or do not see padding. Region prompts are then encoded together, else one by one."""
    isolation: ClassVar[Isolation] = BALANCED
    """What regions and prompts see of each other unless the guide says otherwise. `denoiser` hands it on."""

    text_encoders: ClassVar[Mapping[str, str]] = {}
    """The pipeline's parts that read prompts by tokens, as ``text_encoder_2``, by their names in files of `artaug.Tokens` (``clip_l``,
    ``clip_g``, ``t5xxl``, as ComfyUI calls them). The tokenizer of each has the same number. Empty: words cannot be added."""

    image_to_image_class: ClassVar[type | None] = None
    """The diffusers class that draws from a canvas without a mask, with the parts of the pipeline; None if there is none."""
    inpainting_class: ClassVar[type | None] = None
    """The diffusers class that draws from a canvas with a mask; None if there is none."""
    control_class: ClassVar[type | None] = None
    """The diffusers class that draws with a ControlNet beside the parts of the pipeline; a pipeline may be of it, too."""
    control_argument: ClassVar[str] = "image"
    """What its call names the picture for the ControlNet."""
    noising_method: ClassVar[str] = "scale_noise"
    """The scheduler's method by which these add noise to a picture."""

    edits: ClassVar[bool] = False
    """Whether the model reads the picture of a canvas beside its noise, and draws all steps: then a canvas has no strength. Such a
    model is not trained, and has no guide where it edits."""

    needs_canvas: ClassVar[bool] = False
    """Whether the model can only edit: a plan without a canvas is refused."""

    pipeline: Any
    """The pipeline, an instance of ``pipeline_class``."""
    width: int
    """In pixels."""
    height: int
    """In pixels."""
    guidance_scale: float | None
    """Strength of guidance, distilled or classifier-free as the model has it; None for what the family recommends."""
    negative_prompt: str | None
    """What not to draw; None for the family's default."""
    true_cfg_scale: float
    """Strength of classifier-free guidance in a model whose ``guidance_scale`` is something else; 1 is none."""
    max_sequence_length: int
    """Tokens of a prompt that the model reads."""
    sampled: SampledLatents | None = None
    """Where the latents of its drawings are kept, which trainings learn from; None to encode pictures."""

    @property
    @abstractmethod
    def negative(self) -> str | None:
        """The prompt that classifier-free guidance leads away from, or None where a run has no such guidance."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts as the pipeline itself would, without gradient, with a warning of every word that is cut."""

    def encode_differentiably(self, prompts: Sequence[str]) -> Conditioning:
        """What `encode_prompts` returns, computed anew, with the gradient of the text encoders' embeddings where they ask for one.

        Raises:
            ModelError: in the default, for a family that does not say how.
        """
        raise ModelError(
            f"{type(self).__name__} does not say how prompts are encoded with gradient, so no words can be learned. Write its "
            "`encode_differentiably`."
        )

    def installed(self, tokens: Tokens) -> AbstractContextManager[InstalledTokens]:
        """Let the text encoders read words of one's own in a ``with`` block; after it they are as before, to the object.

        Raises:
            TokensError: before anything changes, if the tokenizers know a word already, or no text encoder has rows as wide.
            ModelError: if the family does not say which its text encoders are.
        """
        return installed_tokens(self.pipeline, self.text_encoders, tokens)

    def embedding_of(self, text: str) -> Mapping[str, Tensor]:
        """The mean embedding of a text's tokens in each text encoder: float32, shape (width,), by the encoder's name.

        Raises:
            ModelError: if the family does not say which its text encoders are.
            TokensError: if one of them does not know the text.
        """
        return mean_embeddings(self.pipeline, self.text_encoders, text)

    @property
    def tokens_digest(self) -> str:
        """Of all words of one's own that are installed; empty if there are none."""
        return digest_of_installed(self.pipeline, self.text_encoders)

    def encode_plans(self, plans: Sequence[Plan]) -> Conditioning:
        """Encode the prompts of plans that start alike. Override it where the encoder reads the pictures of canvases, too."""
        return self.encode_prompts([plan.prompt for plan in plans])

    def embed(self, guide: Guide, plans: Sequence[Plan], conditioning: Conditioning) -> Conditioning:
        """What `encode_plans` returned, with the embeddings that a guide makes of the plans' prompts."""
        if not moves_embeddings(guide) or declines(guide, plans):
            return conditioning
        self.check_guided(guide, plans)
        embeds = conditioning["prompt_embeds"]
        slices = self.token_slices([plan.prompt for plan in plans])
        encoded = [EncodedPlan(plan, tokens, self.phrase_tokens) for plan, tokens in zip(plans, slices, strict=True)]
        moved = embed(guide, encoded, embeds)
        return conditioning if moved is embeds else {**conditioning, "prompt_embeds": moved}

    def encode_negative(self, plans: Sequence[Plan]) -> Conditioning | None:
        """Encode the negative prompt once for each plan, as `encode_plans` does; None where a run has no such guidance."""
        return None if self.negative is None else self.encode_prompts([self.negative] * len(plans))

    @abstractmethod
    def token_slices(self, prompts: Sequence[str]) -> list[slice]:
        """Where each prompt's own tokens are in a row of what `encode_prompts` returns; the rest is padding."""

    def encode_separately(self, prompts: Sequence[str]) -> list[EncodedPrompt]:
        """Each prompt as it is encoded by itself, for regions: in one call of the encoders where that makes no difference."""
        length = _PROMPTS_PER_CALL if self.rows_are_independent else 1
        return [
            EncodedPrompt(self.select_prompt(conditioning, row), token_slice)
            for together in (prompts[start : start + length] for start in range(0, len(prompts), length))
            for conditioning in [self.encode_prompts(together)]
            for row, token_slice in enumerate(self.token_slices(together))
        ]

    def select_prompt(self, conditioning: Conditioning, row: int) -> Conditioning:
        """One prompt of what `encode_prompts` returned, as if it had been encoded alone.

        Override it where a shorter prompt is padded to the longest of its batch: here without that padding.
        """
        return {name: column[row : row + 1] for name, column in conditioning.items()}

    def encode_regions(self, plans: Sequence[Plan]) -> list[list[EncodedRegion]]:
        """Encode the prompts of every plan's regions, positive and negative. One that occurs several times is encoded once."""
        regions = [region for plan in plans for region in plan.regions]
        optional = [*(region.prompt for region in regions), *(region.negative_prompt for region in regions)]
        prompts = list(dict.fromkeys(prompt for prompt in optional if prompt is not None))
        encoded = dict(zip(prompts, self.encode_separately(prompts), strict=True))

        def encode(region: Region) -> EncodedRegion:
            negative = None if region.negative_prompt is None else encoded[region.negative_prompt]
            return EncodedRegion(region, encoded[region.prompt], negative)

        return [[encode(region) for region in plan.regions] for plan in plans]

    @torch.no_grad()
    def initial_noise(self, seeds: Sequence[int], conditioning: Conditioning) -> Tensor:
        """The noise that the pipeline draws from with these seeds and encoded prompts: float32, one row for each seed.

        It is laid out as `encode_images` lays out latents, and standard normal. The default asks the pipeline's own
        ``prepare_latents`` as the pipelines of diffusers do, in the type of ``prompt_embeds``, since the random numbers depend
        on it. Override it for a pipeline that does otherwise, or scales the noise.
        """
        return common.prepared_noise(
            self.pipeline, seeds, width=self.width, height=self.height, dtype=conditioning["prompt_embeds"].dtype
        )

    def tokenized(self, prompt: str) -> Sequence[TokenizedPrompt]:
        """A prompt as each encoder reads it whose tokens are in a row of `encode_prompts`; `phrase_tokens` looks there.

        Raises:
            GuideError: in the default, for a family that does not say.
        """
        raise GuideError(
            f"{type(self).__name__} does not say which tokens the words of {prompt!r} become, so no phrase can be found. "
            "Write its `tokenized`."
        )

    def phrase_tokens(self, prompt: str, phrases: Sequence[str]) -> list[tuple[int, ...]]:
        """Which tokens of the prompt's row in `encode_prompts` hold each phrase: their numbers, rising.

        A phrase is found by whole words, in upper or lower case, wherever it stands in the prompt; the chat around a prompt
        is not searched. A token counts if it holds any character of the phrase, and if the encoder reads it: those beyond
        its limit are left out. If the tokens of several encoders stand one after the other, all of them count.

        Args:
            prompt: as `encode_prompts` gets it.
            phrases: parts of it.

        Returns:
            The tokens of each phrase, none for one that the prompt does not hold.
        """
        tokenized = self.tokenized(prompt)
        return [
            tuple(sorted(token for encoded in tokenized for token in encoded.positions(phrase))) for phrase in phrases
        ]

    def check_guided(self, guide: Guide, plans: Sequence[Plan]) -> None:
        """Refuse plans in whose drawing a guide cannot act.

        Raises:
            GuideError: for a canvas of an editing model, whose tokens no guide distinguishes from those that it draws, and for
                a model with a cache that the guide does not work with.
        """
        check_guide_beside_cache(guide, self.module)
        if self.edits and any(plan.canvas is not None for plan in plans):
            raise GuideError(
                f"{type(self).__name__} reads the pictures of canvases beside what it draws, where a guide cannot act. Leave the "
                "guide out, or draw from a canvas with a model that takes a strength."
            )

    def guided_run(self, plans: Sequence[Plan], conditioning: Conditioning) -> GuidedRun:
        """What a guide gets of the run that draws, or predicts, with the plans' encoded prompts."""
        return GuidedRun(
            denoiser=self.denoiser(conditioning),
            plans=plans,
            regions=self.encode_regions(plans),
            phrase_tokens=self.phrase_tokens,
            token_slices=self.token_slices([plan.prompt for plan in plans]),
        )

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of one row of what `encode_prompts` returns for a prompt of ``max_sequence_length`` tokens or more.

        `estimate` calls it on a pipeline whose models are on the meta device, and whose tokenizers have no vocabulary if
        it was built from configs alone. The default encodes such a prompt. Override it where the encoder looks at values
        of tensors, which the meta device does not have, or the tokenizer needs a chat template.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the words that are cut
            encoded = self.encode_prompts(["word " * self.max_sequence_length])
        return {name: tuple(tensor.shape[1:]) for name, tensor in encoded.items()}

    def strength_steps(self, strength: float, steps: int) -> int:
        """How many of ``steps`` are drawn from a canvas of this strength. Override it where ``get_timesteps`` rounds down."""
        return steps_rounded_up(strength, steps)

    def check_start(self, plan: Plan, steps: int) -> None:
        """Refuse what a plan starts from, if nothing can be drawn from it.

        Raises:
            ModelError: as `canvas_steps`, or for a plan without a canvas if the model only edits.
        """
        if plan.canvas is not None:
            self.canvas_steps(plan.canvas, steps)
        elif self.needs_canvas:
            raise ModelError(
                f"{type(self).__name__} only edits pictures, and the plan of {plan.prompt!r} has no canvas. Draw what it edits "
                "with another model: EditingSynthesizer(base=..., editor=...)."
            )

    def canvas_steps(self, canvas: Canvas, steps: int) -> int:
        """How many of ``steps`` are drawn from this canvas.

        Raises:
            ModelError: if there is no pipeline for it, if it has another size than what is drawn, no strength, references that
                the model does not read, or if no step or no pixel would be drawn.
        """
        if canvas.references:
            self.check_references(canvas)
        if canvas.has_control:
            check_control(self, canvas)
        if self.edits:
            return self._edit_steps(canvas, steps)
        if not canvas.has_image:
            return steps
        name = type(self.pipeline).__name__
        if (self.image_to_image_class if canvas.mask is None else self.inpainting_class) is None:
            what = "canvas" if canvas.mask is None else "canvas with a mask"
            raise ModelError(
                f"{type(self).__name__} cannot draw from a {what}: diffusers has no such pipeline for a {name}."
            )
        if not hasattr(self.pipeline.scheduler, self.noising_method):
            raise ModelError(
                f"{type(self.pipeline.scheduler).__name__} cannot add noise to a picture: it has no {self.noising_method}. Draw "
                "from a canvas with another scheduler, such as the one that the pipeline came with."
            )
        check_size(self.pipeline, canvas, width=self.width, height=self.height)
        if canvas.strength is None:
            raise ModelError(
                f"{canvas!r} is for an editing model, and this {name} draws from a noised picture: expected a strength."
            )
        drawn = self.strength_steps(canvas.strength, steps)
        if drawn < 1:
            raise ModelError(
                f"{canvas!r} would not be changed: at strength {canvas.strength:g}, {type(self).__name__} draws {drawn} of {steps} "
                "steps. Raise the strength, or the steps."
            )
        if canvas.mask is not None and mask_image(canvas.mask, (self.width, self.height)).getbbox() is None:
            raise ModelError(
                f"{canvas!r} would not be changed: its mask covers none of the {self.width} x {self.height} pixels by a half. Make it "
                "larger, or its weights higher."
            )
        return drawn

    def check_references(self, canvas: Canvas) -> None:
        """Refuse the references of a canvas that the model would not read. Override it, and `reading_references`, where it can.

        Raises:
            ModelError: in the default, always.
        """
        raise ModelError(
            f"{type(self).__name__} would ignore the references of {canvas!r}: it reads none. Stable Diffusion and SDXL read them "
            "with an IP-Adapter (pipeline.load_ip_adapter). Leave them out."
        )

    def reading_references(self, plans: Sequence[Plan]) -> AbstractContextManager[Mapping[str, Any]]:
        """A ``with`` block in which the model reads the references of plans that start alike, possibly none.

        It yields what the pipeline's call takes for them.
        """
        return nullcontext({})

    def check_trainable(self) -> None:
        """Refuse to train what reads pictures in every call, where a training has none.

        Raises:
            ModelError: for a model that edits, or was given an IP-Adapter.
        """
        if self.edits:
            raise ModelError(
                f"{type(self.pipeline).__name__} edits pictures, and trainings here show it none. Train the model that draws, and "
                "let this one edit: EditingSynthesizer(base, editor=...)."
            )

    @property
    def settings(self) -> Mapping[str, object]:
        """What decides pictures beside the configs and weights of the pipeline's parts, and the fields: by default nothing."""
        return {}

    def _edit_steps(self, canvas: Canvas, steps: int) -> int:
        """All steps, of an editing model."""
        check_size(self.pipeline, canvas, width=self.width, height=self.height)
        if not canvas.has_image:
            raise ModelError(f"{canvas!r} has no picture, and {type(self).__name__} edits one: expected an image.")
        unread = [name for name in ("strength", "mask") if getattr(canvas, name) is not None]
        if unread:
            raise ModelError(
                f"{type(self).__name__} would ignore the {' and the '.join(unread)} of {canvas!r}: it reads the picture, and edits "
                "as the prompt says. Leave it out."
            )
        return steps

    def pipeline_call(self, canvases: Sequence[Canvas]) -> PipelineCall:
        """The pipeline that draws, and its arguments of size and canvas; ``canvases`` is empty, or has one for each picture."""
        if canvases:
            return controlled_call(self, canvases) if canvases[0].has_control else noised_call(self, canvases)
        return PipelineCall(plain_pipeline(self), {"width": self.width, "height": self.height})

    @abstractmethod
    def pipeline_kwargs(self, conditioning: Conditioning, negative: Conditioning | None) -> Mapping[str, Any]:
        """Keyword arguments of the pipeline's call that are particular to this family: no size, steps or seeds."""

    @abstractmethod
    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        """The denoiser as a guide sees it, in the run that draws with ``conditioning``."""

    @property
    def module(self) -> nn.Module:
        """The denoiser without wrappers, which LoRAs are put on: the pipeline's transformer, unless a family overrides this.

        The pipeline's own is called to predict, since it may be compiled or sharded by its wrapper.
        """
        return unwrap(self.pipeline.transformer)

    @property
    @abstractmethod
    def noise_schedule(self) -> NoiseSchedule:
        """How pictures are noised in training, and what the denoiser predicts."""

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes, also when it is offloaded."""
        device: torch.device = self.pipeline._execution_device  # noqa: SLF001 - .device is wrong under offload
        return device

    def at_size(self, width: int, height: int) -> Self:
        """The same pipeline, set to another picture size."""
        return self if (width, height) == (self.width, self.height) else replace(self, width=width, height=height)

    def without_encoders(self) -> AbstractContextManager[None]:
        """Keep VAE and text encoders on the CPU in a ``with`` block, if the pipeline's owner put them elsewhere."""
        return on_cpu(encoders_of(self.pipeline))

    def without_denoiser(self) -> AbstractContextManager[None]:
        """Keep the denoiser on the CPU in a ``with`` block, if it was elsewhere and its libraries let it move."""
        return on_cpu([self.module])

    @abstractmethod
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """Latents as the denoiser takes them, scaled, float32, one row for each picture, without gradient.

        Raises:
            ModelError: if a picture has another size.
        """

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pictures of latents in the layout of `encode_images`, as the pipeline decodes them, with gradient to the latents.

        The VAE's weights get none. Its activations stay for the backward pass, of all rows at once: a decoder of Stable
        Diffusion's or FLUX's size keeps about 12 GB a picture of 1024 x 1024 pixels in bfloat16. Few rows, or a part of the
        latents, cost less in proportion; ``pipeline.vae.enable_gradient_checkpointing()`` helps inside `decoding`.

        Returns:
            Float32, (batch, 3, height, width), in [0, 1]; where the VAE leaves that range, there is no gradient.

        Raises:
            ModelError: in the default, for a family that does not say how, and for a VAE that has to be in another precision
                until gradients have come back, outside `decoding`.
        """
        raise ModelError(
            f"{type(self).__name__} does not say how latents are decoded, so pictures cannot be looked at in training. Write its "
            "`decode_latents`."
        )

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """A ``with`` block in which pictures are decoded with gradient: as `without_encoders`, but the VAE stays, frozen.

        Raises:
            ModelError: if the VAE's weights are moved by hooks for every call: a backward pass would not find them.
        """
        vae = self.pipeline.vae
        if offload_hooks(vae):
            raise ModelError(
                f"{type(vae).__name__} is moved to the device for every call (enable_model_cpu_offload and the like), and a "
                "backward pass would not find its weights. Put the pipeline on the device to decode in training."
            )
        with on_cpu([part for part in encoders_of(self.pipeline) if part is not vae]), common.frozen(vae):
            yield

    @abstractmethod
    def encode_masks(self, masks: Tensor) -> Tensor:
        """Masks of latents from masks of pixels (batch, height, width) in [0, 1].

        They are laid out as `encode_images` lays out latents, float32: the mean over the pixels that a latent stands for.

        Raises:
            ModelError: if the masks have another size than the pictures.
            InvalidValueError: if a value is outside [0, 1].
        """

    @abstractmethod
    def predict(self, noisy: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output, in the type of ``noisy``, at noise levels ``sigmas`` (batch,) in [0, 1]."""
