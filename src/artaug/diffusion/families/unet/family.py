"""The UNets: Stable Diffusion 1.x and 2.x (Rombach et al. 2022), and SDXL (Podell et al. 2023).

Text: the tokens of CLIP, always 77, padding included; SDXL reads two CLIPs side by side, their pooled vector and the
picture's size. Guidance: classifier-free, both branches in one batch. Attention: image tokens attend to the text in
transformer blocks at several resolutions; a self-attention among image tokens stands beside each. Noise: a variance
preserving schedule of betas (Ho et al. 2020) with whole timesteps; the models predict noise, some 2.x v.
"""

import math
from abc import abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, final, get_args

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    Transformer2DModel,
    UNet2DConditionModel,
)
from PIL.Image import Image
from torch import Tensor, nn

from artaug._internal.modules import named_modules, unwrap
from artaug.canvas import Canvas
from artaug.diffusion.encodings import kept_encoding
from artaug.diffusion.families import common
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.canvases import steps_rounded_down
from artaug.diffusion.families.tokenized import TokenizedPrompt, tokenize_prompt
from artaug.diffusion.families.unet.attention import RegionalCrossProcessor
from artaug.diffusion.families.unet.ip_adapter import RegionalIPAdapterProcessor, adapters_of, references_read
from artaug.errors import GuideError, ModelError
from artaug.lora.formats import SD15, SDXL, KeyMap
from artaug.plan import Plan
from artaug.regional.denoiser import (
    AttentionFn,
    AttentionLayer,
    AttentionSite,
    AttentiveDenoiser,
    Branches,
    Conditioning,
    Denoiser,
    EncodedPrompt,
    ForwardKwargs,
    Span,
    with_first,
)
from artaug.training.noise_schedule import BetaSchedule, EpsilonPrediction, VPrediction

_PIPELINE_MULTIPLE_PX = 8
_DEFAULTS = {"prediction_type": "epsilon", "trained_betas": None, "rescale_betas_zero_snr": False}
"""Settings that configs of older schedulers lack."""
_SUPPORTED = {
    "prediction_type": ("epsilon", "v_prediction"),
    "beta_schedule": get_args(BetaSchedule),
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False, True),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class UNetFamily(Family):
    """A UNet whose image tokens attend to the tokens of CLIP.

    ``guidance_scale`` is classifier-free guidance; at 1 and below there is none, and a distilled model that takes the
    scale as an input (LCM) has none either. CLIP reads 77 tokens, whatever ``max_sequence_length`` above that says.

    All tokens of CLIP count as a prompt's own: its padding has attended to the words before it, and no UNet was trained
    without it.
    """

    rows_are_independent: ClassVar[bool] = True
    noising_method: ClassVar[str] = "add_noise"
    _components: ClassVar[Sequence[str]]
    """What the pipeline cannot do without."""
    _default_guidance_scale: ClassVar[float]
    """The default of its pipeline."""

    def __post_init__(self) -> None:
        common.check_components(self.pipeline, self._components)
        common.check_reads_latents_alone(self.pipeline, self.pipeline.unet)
        # diffusers' pipelines ask for multiples of 8 pixels whatever the VAE.
        multiple = math.lcm(_PIPELINE_MULTIPLE_PX, self.pipeline.vae_scale_factor)
        common.check_size(self.pipeline, width=self.width, height=self.height, multiple=multiple)
        common.check_no_true_cfg(self.pipeline, self.true_cfg_scale)
        common.check_negative_has_effect(
            self.pipeline, self.negative_prompt, is_guided=self._is_guided, scale=self._guidance
        )
        if self.max_sequence_length < self._clip_length:
            raise ModelError(
                f"max_sequence_length={self.max_sequence_length} would be ignored: CLIP always reads "
                f"{self._clip_length} tokens, padding included. Leave it at that or above."
            )

    @abstractmethod
    def _added_conditions(self, conditioning: Conditioning) -> Mapping[str, Tensor] | None:
        """The UNet's ``added_cond_kwargs`` for these prompts at this size, None if it takes none."""

    @property
    def negative(self) -> str | None:
        return (self.negative_prompt or "") if self._is_guided else None

    def strength_steps(self, strength: float, steps: int) -> int:
        return steps_rounded_down(strength, steps)

    def check_references(self, canvas: Canvas) -> None:
        if not adapters_of(self.module):
            super().check_references(canvas)

    def reading_references(self, plans: Sequence[Plan]) -> AbstractContextManager[Mapping[str, Any]]:
        return references_read(self.pipeline, plans, (self.width, self.height))

    def check_trainable(self) -> None:
        if adapters_of(self.module):
            raise ModelError(
                f"this {type(self.pipeline).__name__} has an IP-Adapter, and trainings here show it no pictures. Call its "
                "unload_ip_adapter() before training."
            )

    @property
    def settings(self) -> Mapping[str, object]:
        return {"ip_adapter_scales": [adapter.scale for adapter in adapters_of(self.module)]}

    def token_slices(self, prompts: Sequence[str]) -> list[slice]:
        return [slice(0, self._clip_length)] * len(prompts)

    def tokenized(self, prompt: str) -> list[TokenizedPrompt]:
        # Where there are two CLIPs, they share one vocabulary, and stand side by side on the channel axis.
        tokenizer = self.pipeline.tokenizer
        convert = partial(self.pipeline.maybe_convert_prompt, tokenizer=tokenizer)
        return [tokenize_prompt(tokenizer, prompt, limit=self._clip_length, convert=convert)]

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        factor, config = self.pipeline.vae_scale_factor, self.pipeline.scheduler.config
        return UNetDenoiser(
            module=self.module,
            grid=(self.height // factor, self.width // factor),
            isolation=self.isolation,
            pictures=len(conditioning["prompt_embeds"]),
            timesteps=config.num_train_timesteps if "beta_schedule" in config else None,
            scheduler=self.pipeline.scheduler,
        )

    @property
    def module(self) -> nn.Module:
        return unwrap(self.pipeline.unet)

    @property
    def noise_schedule(self) -> EpsilonPrediction | VPrediction:
        """The prediction type and the noise levels the scheduler's config names.

        Raises:
            ModelError: if it names others than training knows.
        """
        config = {**_DEFAULTS, **self.pipeline.scheduler.config}
        scheduler = type(self.pipeline.scheduler).__name__
        unsupported = {
            name: config.get(name) for name, supported in _SUPPORTED.items() if config.get(name) not in supported
        }
        if unsupported:
            expected = {name: list(_SUPPORTED[name]) for name in unsupported}
            raise ModelError(f"{scheduler} has {unsupported}, which training does not know. It knows {expected}.")
        betas = {name: config[name] for name in ("beta_start", "beta_end")}
        timesteps, schedule = config["num_train_timesteps"], config["beta_schedule"]
        if config["prediction_type"] == "v_prediction":
            zero_snr = config["rescale_betas_zero_snr"]
            return VPrediction(
                **betas, num_train_timesteps=timesteps, beta_schedule=schedule, rescale_betas_zero_snr=zero_snr
            )
        if config["rescale_betas_zero_snr"]:
            raise ModelError(
                f"{scheduler} has rescale_betas_zero_snr=True with prediction_type='epsilon': of pure noise, a model that "
                "predicts noise learns nothing. Expected prediction_type='v_prediction', or betas that are not rescaled."
            )
        return EpsilonPrediction(**betas, num_train_timesteps=timesteps, beta_schedule=schedule)

    def encode_images(self, images: Sequence[Image]) -> Tensor:
        return common.vae_latents(self.pipeline, images, width=self.width, height=self.height)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return common.vae_pictures(self.pipeline, latents)

    def encode_masks(self, masks: Tensor) -> Tensor:
        return common.latent_masks(self.pipeline, masks, width=self.width, height=self.height)

    def initial_noise(self, seeds: Sequence[int], conditioning: Conditioning) -> Tensor:
        # The pipeline scales the noise to where its scheduler begins.
        return super().initial_noise(seeds, conditioning) / float(self.pipeline.scheduler.init_noise_sigma)

    def predict(self, noisy: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        """As in `Family`, at the whole timestep whose noise level is nearest: the model was trained at no others."""
        embeds = conditioning["prompt_embeds"]
        prediction: Tensor = self.pipeline.unet(
            noisy.to(embeds),
            self._nearest_timesteps(sigmas).to(embeds.device),
            encoder_hidden_states=embeds,
            timestep_cond=self._embedded_guidance(embeds),
            added_cond_kwargs=self._added_conditions(conditioning),
            return_dict=False,
        )[0]
        return prediction.to(noisy)

    @property
    def _guidance(self) -> float:
        return self._default_guidance_scale if self.guidance_scale is None else self.guidance_scale

    @property
    def _is_guided(self) -> bool:
        return self._guidance > 1 and self.pipeline.unet.config.time_cond_proj_dim is None

    @property
    def _clip_length(self) -> int:
        return int(self.pipeline.tokenizer.model_max_length)

    def _nearest_timesteps(self, sigmas: Tensor) -> Tensor:
        # x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise, so sigma of timestep t is sqrt(1 - alpha_bar_t).
        timestep_sigmas: Tensor = (1 - self.pipeline.scheduler.alphas_cumprod.cpu().double()).sqrt()
        return (sigmas.cpu().double()[:, None] - timestep_sigmas).abs().argmin(dim=1)

    def _embedded_guidance(self, embeds: Tensor) -> Tensor | None:
        """The guidance scale as an input, for a model distilled to take it (LCM): None for any other."""
        embedding_dim = self.pipeline.unet.config.time_cond_proj_dim
        if embedding_dim is None:
            return None
        scale = torch.tensor(self._guidance - 1).repeat(len(embeds))
        embedded: Tensor = self.pipeline.get_guidance_scale_embedding(scale, embedding_dim=embedding_dim)
        return embedded.to(embeds)

    def _tokens(self, prompts: Sequence[str]) -> Hashable:
        # Where there are two CLIPs, they share one vocabulary and are cut at one length.
        tokenizer = self.pipeline.tokenizer
        converted = self.pipeline.maybe_convert_prompt(list(prompts), tokenizer)  # the words of a textual inversion
        return common.prompt_tokens(converted, tokenizer, reader="CLIP", limit=self._clip_length, remedy="Shorten it.")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class StableDiffusion(UNetFamily):
    """Stable Diffusion 1.5, what was made from it, and 2.x, which differs only in its configs.

    ``guidance_scale`` is classifier-free guidance, 7.5 by default.

    Raises:
        ModelError: for a pipeline that lacks a component, a size that is no multiple of 8 pixels, a negative prompt without
            guidance, or a ``max_sequence_length`` below what CLIP reads.
    """

    pipeline_class: ClassVar[type] = StableDiffusionPipeline
    image_to_image_class: ClassVar[type | None] = StableDiffusionImg2ImgPipeline
    inpainting_class: ClassVar[type | None] = StableDiffusionInpaintPipeline
    control_class: ClassVar[type | None] = StableDiffusionControlNetPipeline
    key_map: ClassVar[KeyMap | None] = SD15
    text_encoders: ClassVar[Mapping[str, str]] = {"clip_l": "text_encoder"}
    _components: ClassVar[Sequence[str]] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    _default_guidance_scale: ClassVar[float] = 7.5

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        encode = partial(self.encode_differentiably, prompts)
        return kept_encoding(self.pipeline, (type(self), self._tokens(prompts)), encode)

    def encode_differentiably(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds}

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"prompt_embeds": (self._clip_length, self.pipeline.unet.config.cross_attention_dim)}

    def pipeline_kwargs(self, conditioning: Conditioning, negative: Conditioning | None) -> Mapping[str, Any]:
        return {**common.prompt_kwargs(conditioning, negative), "guidance_scale": self._guidance}

    def _added_conditions(self, conditioning: Conditioning) -> Mapping[str, Tensor] | None:
        return None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class StableDiffusionXL(UNetFamily):
    """SDXL: base, turbo, and what was made from them.

    ``guidance_scale`` is classifier-free guidance, 5 by default. Without a negative prompt, the pipeline itself chooses what
    it leads away from: zeros, or the empty prompt if ``force_zeros_for_empty_prompt`` is off.

    Raises:
        ModelError: for a pipeline that lacks a component (as the refiner), a size that is no multiple of 8 pixels, a negative
            prompt without guidance, or a ``max_sequence_length`` below what CLIP reads.
    """

    pipeline_class: ClassVar[type] = StableDiffusionXLPipeline
    image_to_image_class: ClassVar[type | None] = StableDiffusionXLImg2ImgPipeline
    inpainting_class: ClassVar[type | None] = StableDiffusionXLInpaintPipeline
    control_class: ClassVar[type | None] = StableDiffusionXLControlNetPipeline
    key_map: ClassVar[KeyMap | None] = SDXL
    text_encoders: ClassVar[Mapping[str, str]] = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
    _components: ClassVar[Sequence[str]] = (
        "unet",
        "vae",
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "scheduler",
    )
    _default_guidance_scale: ClassVar[float] = 5.0

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        second = common.prompt_tokens(prompts, self.pipeline.tokenizer_2, reader=None, limit=self._clip_length)
        encode = partial(self.encode_differentiably, prompts)
        return kept_encoding(self.pipeline, (type(self), self._tokens(prompts), second), encode)

    def encode_differentiably(self, prompts: Sequence[str]) -> Conditioning:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {
            "prompt_embeds": (self._clip_length, self.pipeline.unet.config.cross_attention_dim),
            "pooled_prompt_embeds": (self.pipeline.text_encoder_2.config.projection_dim,),
        }

    def pipeline_kwargs(self, conditioning: Conditioning, negative: Conditioning | None) -> Mapping[str, Any]:
        explicit = negative if self.negative_prompt is not None else None
        return {**common.prompt_kwargs(conditioning, explicit), "guidance_scale": self._guidance}

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        with _float32_if_it_overflows(self.pipeline.vae):
            latents: Tensor = super().encode_images(images)
        mean, std = self._channel_statistics(latents)
        normalized: Tensor = (latents - mean) / std
        return normalized

    def decode_latents(self, latents: Tensor) -> Tensor:
        vae, (mean, std) = self.pipeline.vae, self._channel_statistics(latents)
        if _overflows(vae) and torch.is_grad_enabled() and latents.requires_grad:
            raise ModelError(
                "this VAE overflows in float16, and has to be in float32 until gradients have come back through it. Decode in a "
                "with block of decoding(), as a trainer does."
            )
        with _float32_if_it_overflows(vae):
            return super().decode_latents(latents * std + mean)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        with super().decoding(), _float32_if_it_overflows(self.pipeline.vae):
            yield

    def _channel_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of scaled latents, (channels, 1, 1); 0 and 1 unless the VAE's config has them."""
        config = self.pipeline.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return like.new_zeros(1, 1, 1), like.new_ones(1, 1, 1)
        mean, std = (like.new_tensor(channels).view(-1, 1, 1) for channels in (mean, std))
        return mean * config.scaling_factor, std

    def _added_conditions(self, conditioning: Conditioning) -> Mapping[str, Tensor] | None:
        pooled = conditioning["pooled_prompt_embeds"]
        size = (self.height, self.width)
        time_ids: Tensor = self.pipeline._get_add_time_ids(  # noqa: SLF001 - diffusers' own trainers do
            size, (0, 0), size, dtype=pooled.dtype, text_encoder_projection_dim=pooled.shape[-1]
        )
        return {"text_embeds": pooled, "time_ids": time_ids.to(pooled.device).repeat(len(pooled), 1)}


def _overflows(vae: AutoencoderKL) -> bool:
    return vae.dtype == torch.float16 and bool(vae.config.force_upcast)


@contextmanager
def _float32_if_it_overflows(vae: AutoencoderKL) -> Iterator[None]:
    """Keep a float16 VAE that is known to overflow in float32 for a ``with`` block, as the pipeline does to decode."""
    overflows = _overflows(vae)
    if overflows:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if overflows:
            vae.to(torch.float16)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class UNetDenoiser(AttentiveDenoiser):
    """A UNet in one run, as a guide sees it."""

    latents_name: ClassVar[str] = "sample"
    pictures: int
    """How many pictures the run draws."""
    timesteps: int | None
    """The timestep of noise level 1; None if the scheduler does not count timesteps."""
    scheduler: Any
    """The pipeline's, which scales latents to what the model takes."""

    def branches(self, kwargs: ForwardKwargs) -> Branches:
        return common.batched_branches(len(kwargs["sample"]), pictures=self.pictures)

    def with_prompt_embeds(
        self, kwargs: ForwardKwargs, rows: Sequence[int], prompts: Sequence[EncodedPrompt]
    ) -> dict[str, Any]:
        selected = list(rows)
        changed = {**kwargs, "sample": kwargs["sample"][selected]}
        changed["encoder_hidden_states"] = torch.cat([prompt.conditioning["prompt_embeds"] for prompt in prompts])
        if torch.is_tensor(kwargs["timestep"]) and kwargs["timestep"].ndim:
            changed["timestep"] = kwargs["timestep"][selected]
        if kwargs.get("timestep_cond") is not None:
            changed["timestep_cond"] = kwargs["timestep_cond"][selected]
        for name in ("down_block_additional_residuals", "mid_block_additional_residual"):  # of a ControlNet
            if kwargs.get(name) is not None:
                changed[name] = _rows(kwargs[name], selected)
        if (added := kwargs.get("added_cond_kwargs")) is not None:
            changed["added_cond_kwargs"] = {name: _rows(value, selected) for name, value in added.items()}
            if "text_embeds" in added:
                pooled = torch.cat([prompt.conditioning["pooled_prompt_embeds"] for prompt in prompts])
                changed["added_cond_kwargs"]["text_embeds"] = pooled
        return changed

    def latents_in(self, kwargs: ForwardKwargs) -> Tensor:
        sample = common.latent_pictures(self, kwargs["sample"], kwargs)
        return sample / self._scaled(torch.ones_like(sample[:1, :1, :1, :1]), kwargs)

    def with_latents(self, kwargs: ForwardKwargs, latents: Tensor) -> dict[str, Any]:
        return {**kwargs, "sample": with_first(kwargs["sample"], self._scaled(latents, kwargs))}

    def _scaled(self, latents: Tensor, kwargs: ForwardKwargs) -> Tensor:
        """Latents as the model takes them in the step under way: every scheduler of diffusers multiplies by a number."""
        scaled: Tensor = self.scheduler.scale_model_input(latents, kwargs["timestep"])
        return scaled

    def broadcast_weights(self, weights: Tensor) -> Tensor:
        return weights  # they multiply (channels, rows, columns)

    @property
    def token_grid(self) -> tuple[int, int]:
        """That of the coarsest level: a region with an image token there has some at every level."""
        return min((grid for _, grid in _cross_attention(self.module, self.grid)), key=math.prod)

    @property
    def sites(self) -> Sequence[AttentionSite]:
        return [
            AttentionSite(attention, block, kind="cross", grid=grid)
            for block, (attention, grid) in enumerate(_cross_attention(self.module, self.grid))
        ]

    def noise_level(self, kwargs: ForwardKwargs) -> float:
        if self.timesteps is None:
            raise GuideError(
                "this pipeline's scheduler does not count timesteps (EDM's give the logarithm of the noise instead), so "
                "regions cannot follow the noise level. Use a scheduler with betas, as DDIM's, or OutputMix."
            )
        return float(torch.as_tensor(kwargs["timestep"]).flatten()[0]) / self.timesteps

    def append_prompts(
        self, kwargs: ForwardKwargs, prompts: Sequence[Sequence[EncodedPrompt]], *, trim_padding: bool
    ) -> tuple[dict[str, Any], list[tuple[Span, ...]]]:
        base = kwargs["encoder_hidden_states"]
        joined, spans = common.join_prompts(
            base, prompts, name="prompt_embeds", trim_padding=trim_padding, prepend=False
        )
        return {**kwargs, "encoder_hidden_states": joined}, spans

    def token_stream(self, layer: str) -> Literal["image", "text", "joint"] | None:
        if ".transformer_blocks." in layer:
            return "text" if layer.endswith(("attn2.to_k", "attn2.to_v")) else "image"
        # Before and after those blocks stand linear layers on tokens, or convolutions on pixels, by the model. All other
        # linear layers work on the noise level.
        return "image" if ".attentions." in layer or layer in self._convolutions else None

    @cached_property
    def _convolutions(self) -> frozenset[str]:
        return frozenset(
            name for name, item in named_modules(self.module).items() if isinstance(item.module, nn.Conv2d)
        )

    def processor(
        self, site: AttentionSite, attention_fn: AttentionFn
    ) -> RegionalCrossProcessor | RegionalIPAdapterProcessor:
        if type(site.attention.processor) is RegionalIPAdapterProcessor.upstream:
            return RegionalIPAdapterProcessor.for_layer(site.attention, attention_fn)
        return RegionalCrossProcessor.for_layer(site.attention, attention_fn)


def _rows(value: Any, rows: list[int]) -> Any:  # noqa: ANN401 - a tensor, or several: one for each IP-Adapter or block
    return value[rows] if isinstance(value, Tensor) else type(value)(tensor[rows] for tensor in value)


def _cross_attention(
    unet: UNet2DConditionModel, grid: tuple[int, int]
) -> Iterator[tuple[AttentionLayer, tuple[int, int]]]:
    """Every cross-attention layer in the order of computation, with the rows and columns of its image tokens."""
    grids = [grid]
    for block in unet.down_blocks:
        for attention in _cross_attention_in(getattr(block, "attentions", ())):
            yield attention, grids[-1]
        if block.downsamplers is not None:
            rows, columns = grids[-1]
            grids.append(((rows + 1) // 2, (columns + 1) // 2))  # a strided convolution rounds up
    for attention in _cross_attention_in(getattr(unet.mid_block, "attentions", ())):
        yield attention, grids[-1]
    for block in unet.up_blocks:
        for attention in _cross_attention_in(getattr(block, "attentions", ())):
            yield attention, grids[-1]
        if block.upsamplers is not None:
            grids.pop()


def _cross_attention_in(transformers: Iterable[Transformer2DModel]) -> Iterator[AttentionLayer]:
    for transformer in transformers:
        for layer in transformer.transformer_blocks:
            for attention in (layer.attn1, layer.attn2):
                if attention is not None and attention.is_cross_attention:
                    yield attention
